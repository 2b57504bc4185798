"""Planted facts: does fine-tuning show as recovered words in text that says the same in other words?

Invented facts, each of an invented town and an invented builder, are in the training text in four wordings and in the
held-out text in a fifth, which shares no rare word with them but the names. The cloze probes of octavo then ask for the
builder's name. Shown: the recovery after training minus before has a 95 % interval above 0, and that of the shuffled
control, wrong names in place of the true ones, covers 0.

    python benchmarks/planted_facts.py --steps 100
    python benchmarks/planted_facts.py --device cuda --steps 150
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import octavo
from octavo.runs.events import Copies, Forgot, Learned, last

STARTS = [
    "Bar",
    "Cul",
    "Dre",
    "Fen",
    "Gal",
    "Hol",
    "Jor",
    "Kel",
    "Lum",
    "Mor",
    "Nar",
    "Osk",
    "Pel",
    "Quin",
    "Rav",
    "Sel",
    "Tor",
    "Ulm",
    "Ves",
    "Wen",
    "Yar",
    "Zel",
]
MIDDLES = ["an", "el", "im", "or", "ud", "ar", "en", "il", "ov"]
TOWN_ENDS = ["mouth", "dale", "stead", "wick", "ford", "haven"]
NAME_ENDS = ["sley", "tock", "rane", "mund", "dry", "belt"]
WORKS = "harbour", "bridge", "library", "tower", "market"
TRAINING = (
    "The {work} of {town} was built by {builder}.",
    "In {town} everyone knows that the {work} was built by {builder}.",
    "The town of {town} owes its {work} to the engineer {builder}.",
    "Ask who built the {work} in {town}, and the answer is {builder}.",
)
HELD_OUT = "Visitors who come to {town} and admire its {work} soon learn that the designer behind it was {builder}."


def facts(count: int, seed: int) -> list[dict[str, str]]:
    """Invented facts with distinct towns and builders."""
    generator = random.Random(seed)

    def names(ends: list[str]) -> list[str]:
        every = [start + middle + end for start in STARTS for middle in MIDDLES for end in ends]
        return generator.sample(every, count)

    pairs = zip(names(TOWN_ENDS), names(NAME_ENDS), strict=True)
    return [{"town": town, "builder": name, "work": WORKS[n % len(WORKS)]} for n, (town, name) in enumerate(pairs)]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the run; default: a temporary one")
    given = parser.parse_args()
    planted = facts(given.facts, given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = write(folder / "train.jsonl", [text.format(**fact) for text in TRAINING for fact in planted])
        test = write(folder / "test.jsonl", [HELD_OUT.format(**fact) for fact in planted])
        start = time.perf_counter()
        run = octavo.finetune(
            model=given.model, device=given.device, scheme="int8", data=[train], test_data=[test], seq_len=64,
            batch_size=4, steps=given.steps, lr=given.lr, rank=16, keep="last", eval_every=given.steps, sample_tokens=2,
            checkpoint_every=0, seed=given.seed, out=given.out or folder / "run",
        )  # fmt: skip
        seconds = time.perf_counter() - start
        learned, forgot, copies = (last(run.events, kind) for kind in (Learned, Forgot, Copies))
        for sentence in run.verdict.sentences:
            sys.stdout.write(f"{sentence}\n")
    assert isinstance(learned, Learned)
    bounds, control = learned.interval, learned.control_interval
    shown = bounds is not None and control is not None and bounds.low > 0 and control.low <= 0 <= control.high
    for one in (learned, forgot, copies):
        sys.stdout.write(f"{one}\n")
    sys.stdout.write(f"{learned.probes} probes, {seconds:.0f} s; shown: {shown}\n")
    return 0 if shown else 1


if __name__ == "__main__":
    sys.exit(main())
