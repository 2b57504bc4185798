"""Measures how often the 95 % intervals of a mean loss contain the truth: `python benchmarks/interval_coverage.py`.

A pool of texts has a known mean difference of two losses. From it `--sets` test sets are drawn, each with its interval.
A row of the table is the share of intervals that contain the pool's difference, and their mean width over the spread
of the estimates, 2 x 1.96 standard deviations: the width of a perfect interval. Exits with 1 if a share is outside 93
to 97 % (20 documents: below 90 %), or a width above 1.3.

The pools: documents with lengths spread as exp(N(0, 1)), whose losses have an effect of the document and noise of the
tokens, before and after correlated; the same with gains that are skewed; rows of a long text whose gains depend on
their neighbours, in order, or as passages at a random place of each stretch (octavo.data.passages), also of chapters
that gain differently. With `--model` also the plays in src/octavo/shakespeare as paragraphs, all of them as one text
with passages, and the held-out one as rows in order: the losses are those of the model in full precision and under
`--scheme`, or with `--adapter` those under `--scheme` without and with it (many minutes on a CPU; `--losses` keeps them
in an .npz file, and reads it if it exists). Rows in order are at most a quarter of their text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.intervals import DOCUMENTS, PASSAGES, ROWS, Units, difference

PLAYS = Path(__file__).parents[1] / "src" / "octavo" / "shakespeare"
SIZES = {DOCUMENTS: (20, 50, 200), PASSAGES: (20, 40), ROWS: (50, 100, 200)}
LEAST, MOST, WIDEST = 0.93, 0.97, 1.3
LEAST_OF_FEW, FEW = 0.90, 20  # documents or passages
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pool:
    """The losses (P,) in nats before and after of texts of so many tokens, in order except for DOCUMENTS."""

    name: str
    over: str
    before: Floats
    after: Floats
    tokens: npt.NDArray[np.int64]

    @property
    def gain(self) -> float:
        """The mean difference of a token."""
        return float((self.before - self.after).sum() / self.tokens.sum())

    def test_set(self, n: int, generator: np.random.Generator) -> tuple[Units, Units]:
        """The units before and after of n documents, of a row of each of n stretches, or of n rows in order."""
        if self.over == ROWS:
            chosen = generator.integers(0, len(self.tokens) - n) + np.arange(n)
        elif self.over == PASSAGES:
            edges = np.arange(n + 1) * len(self.tokens) // n
            chosen = generator.integers(edges[:-1], edges[1:])
        else:
            chosen = generator.choice(len(self.tokens), n, replace=False)
        tokens = self.tokens[chosen]
        before, after = (Units(self.over, nats[chosen], tokens, n, n) for nats in (self.before, self.after))
        return before, after


@dataclass(frozen=True)
class Coverage:
    """Of the intervals of many test sets of one size."""

    pool: str
    over: str
    size: int
    share: float  # of the intervals that contain the pool's difference
    width: float  # mean, over the spread of the estimates

    @property
    def as_promised(self) -> bool:
        few = self.over != ROWS and self.size <= FEW
        return (LEAST_OF_FEW if few else LEAST) <= self.share <= (1 if few else MOST) and self.width <= WIDEST


def documents(n: int = 6000, *, seed: int = 0, skewed: bool = False) -> Pool:
    """Documents of 8 to 16,000 tokens; longer ones are easier, and difficult ones gain more."""
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal
    size = normal(n)
    tokens = np.clip(250 * np.exp(size), 8, 16_000).astype(np.int64)
    difficulty = 0.5 * normal(n) - 0.15 * size
    before = 3.2 + difficulty + 2.7 / np.sqrt(tokens) * normal(n)
    gain = (
        0.05 + 0.025 * difficulty + 0.03 * size + 0.06 * generator.standard_t(5, n) + 0.5 / np.sqrt(tokens) * normal(n)
    )
    if skewed:
        gain += 0.05 * np.exp(normal(n))
    return Pool("skewed gains" if skewed else "documents", DOCUMENTS, before * tokens, (before - gain) * tokens, tokens)


def rows(n: int = 400_000, *, seed: int = 0, correlation: float = 0.5, over: str = ROWS, chapters: float = 0.0) -> Pool:
    """Rows of 512 tokens of one text: gains are an autoregressive series and noise, half of its deviation.

    `chapters` is the deviation of the gains of seven equal parts, in that of the series.
    """
    generator = np.random.default_rng(seed)
    kernel = correlation ** np.arange(60) * (1 - correlation**2) ** 0.5

    def series() -> Floats:
        return np.convolve(generator.standard_normal(n + len(kernel) - 1), kernel, "valid")

    tokens = np.full(n, 512)
    before = 3.2 + 0.3 * series()
    gain = 0.05 + 0.03 * series() + 0.015 * generator.standard_normal(n)
    gain += 0.03 * chapters * generator.standard_normal(7)[np.arange(n) * 7 // n]
    name = f"correlation {correlation:g}" + ", chapters" * bool(chapters)
    return Pool(name, over, before * tokens, (before - gain) * tokens, tokens)


def coverage(pool: Pool, size: int, *, sets: int = 500, seed: int = 1) -> Coverage:
    """Draws test sets of one size and compares their intervals with the difference of the pool."""
    generator = np.random.default_rng([seed, size])
    covered, widths, estimates = 0, [], []
    for _ in range(sets):
        before, after = pool.test_set(size, generator)
        found = difference(before, after)
        assert found is not None
        covered += found.low <= pool.gain <= found.high
        widths.append(found.high - found.low)
        estimates.append((before.nats - after.nats).sum() / after.tokens.sum())
    return Coverage(pool.name, pool.over, size, covered / sets, float(np.mean(widths) / (3.92 * np.std(estimates))))


def plays(model: str, scheme: str, adapter: Path | None, losses: Path | None) -> Iterator[Pool]:
    """The paragraphs of the plays, rows of all of them, and those of the held-out one, scored by two models."""
    if losses is None or not losses.is_file():
        arrays = score_plays(model, scheme, adapter)
        if losses:
            np.savez(losses, **arrays)  # type: ignore[arg-type]
    else:
        arrays = dict(np.load(losses))
    pair = "none, " + scheme if adapter is None else "before, after"
    for over in (DOCUMENTS, PASSAGES, ROWS):
        yield Pool(f"plays, {pair}", over, *(arrays[f"{over} {name}"] for name in ("before", "after", "tokens")))


def score_plays(model: str, scheme: str, adapter: Path | None) -> dict[str, npt.NDArray[Any]]:
    """{"documents before": nats (P,), "documents after": (P,), "documents tokens": (P,)} of all paragraphs of more than
    20 characters; the same of the rows of all plays, as passages, and of the rows in order of the held-out play."""
    from octavo import adapters
    from octavo.commands.data import to_text
    from octavo.commands.loading import load_model, opened
    from octavo.config import ModelOptions, TextOptions
    from octavo.data.documents import Reading
    from octavo.data.records import from_text
    from octavo.metrics import score
    from octavo.ops.quantize import scheme_named
    from octavo.reporting import Report
    from octavo.runs.adapter import adapter_folder
    from octavo.store import peft

    texts = [part for file in sorted(PLAYS.glob("*/*.txt")) for part in file.read_text("utf-8").split("\n\n")]
    named = [from_text(text, source=f"paragraph {i}", line=0) for i, text in enumerate(texts) if len(text.strip()) > 20]
    # Of the held-out play alone: a fine-tuning changes one play more than another, and an interval of rows in order is
    # about other parts of the same text.
    [held_out] = sorted(PLAYS.glob("test/*.txt"))
    alone = [from_text(held_out.read_text("utf-8"), source=held_out.name, line=0)]
    plays = [from_text(file.read_text("utf-8"), source=file.name, line=0) for file in sorted(PLAYS.glob("*/*.txt"))]
    arrays: dict[str, npt.NDArray[Any]] = {}
    with Report() as report:
        hardware, source = opened(ModelOptions(model=model), report)
        for name, chosen in (("before", "none" if adapter is None else scheme), ("after", scheme)):
            loaded = load_model(source, scheme_named(chosen), hardware, report)
            if adapter is not None and name == "after":
                folder = adapter_folder(adapter, say=report.say, warn=report.warn)
                adapters.apply_(loaded, peft.read(folder))
            for over, texts_of, length in ((DOCUMENTS, named, 256), (PASSAGES, plays, 128), (ROWS, alone, 128)):
                packed = to_text(Reading(texts_of), TextOptions(seq_len=length), source.tokenizer(), report)
                scored = packed.measurable(0)
                with report.progress(len(scored), f"Scoring {over} ({name})") as bar:
                    units = score(loaded, scored, n_bytes=1, batch_size=8, progress=bar.advance).units
                assert units is not None
                assert units.over == (ROWS if over == PASSAGES else over)
                arrays |= {f"{over} {name}": units.nats, f"{over} tokens": units.tokens}
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=2000, help="test sets of each size")
    parser.add_argument("--model", help="also measure on the plays scored by this model, as smollm2")
    parser.add_argument("--scheme", default="nf4", help="the scheme of the second losses, with --adapter of both")
    parser.add_argument("--adapter", type=Path, help="an adapter or run that only the second losses are with")
    parser.add_argument("--losses", type=Path, help="file that keeps the losses of --model")
    args = parser.parse_args()
    pools = [documents(), documents(skewed=True), rows(), rows(correlation=0.3)]
    pools += [rows(over=PASSAGES), rows(over=PASSAGES, chapters=1.0)]
    if args.model:
        pools += plays(args.model, args.scheme, args.adapter, args.losses)
    failed = False
    sys.stdout.write(f"{'pool':<26} {'units':>20} {'coverage':>9} {'width / spread':>15}\n")
    for pool in pools:
        for size in SIZES[pool.over]:
            if pool.over == ROWS and 4 * size > len(pool.tokens):
                continue  # its test sets would be nearly the same ones
            found = coverage(pool, size, sets=args.sets)
            failed |= not found.as_promised
            mark = "" if found.as_promised else "  outside"
            units = f"{size} {pool.over}"
            sys.stdout.write(f"{pool.name:<26} {units:>20} {found.share:>9.1%} {found.width:>15.2f}{mark}\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
