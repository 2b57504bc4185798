"""Paired differences: as computed from the losses themselves, and only where the text is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.run_folders import TOKENS, bits, write_run

from octavo.commands.compare.paired import Paired, compare_pair, same_text, units_of
from octavo.commands.compare.read import ReadRun, read_runs
from octavo.intervals import Units, difference
from octavo.reporting import Report
from octavo.runs import events

LOSSES = list(3 + 0.4 * np.random.default_rng(0).standard_normal(20))
BETTER = list(np.array(LOSSES) - 0.1 + 0.02 * np.random.default_rng(1).standard_normal(20))


def runs(*folders: Path) -> list[ReadRun]:
    return read_runs([str(folder) for folder in folders])


def pair(*folders: Path) -> Paired:
    return compare_pair(*runs(*folders))


def units(losses: Sequence[float]) -> Units:
    nats = np.array([TOKENS * loss for loss in losses])
    return Units("documents", nats, np.full(len(losses), TOKENS), len(losses), 7)


def test_the_difference_is_that_of_the_losses_document_by_document(tmp_path: Path) -> None:
    paired = pair(write_run(tmp_path / "a", after=LOSSES), write_run(tmp_path / "b", after=BETTER))
    expected = difference(units(LOSSES), units(BETTER))
    assert paired.comparable == "loss"
    assert paired.lower_by == pytest.approx(np.mean(LOSSES) - np.mean(BETTER), abs=1e-6)
    assert expected is not None
    assert paired.interval is not None
    assert (paired.interval.low, paired.interval.high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert paired.interval.high - paired.interval.low < 0.05  # far narrower than the spread of the documents, 0.4


def test_the_order_of_the_runs_changes_the_sign(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", after=LOSSES), write_run(tmp_path / "b", after=BETTER)
    forward, back = pair(a, b), pair(b, a)
    assert forward.lower_by is not None
    assert back.lower_by == pytest.approx(-forward.lower_by)
    assert "% lower (" in forward.sentence
    assert "% higher (" in back.sentence


def test_an_interval_that_contains_zero_is_no_verdict(tmp_path: Path) -> None:
    noise = np.random.default_rng(2).standard_normal(20)
    other = [loss + 0.05 * float(one) for loss, one in zip(LOSSES, noise - noise.mean() + 0.1, strict=True)]
    paired = pair(write_run(tmp_path / "a", after=LOSSES), write_run(tmp_path / "b", after=other))
    assert "does not show which is better" in paired.sentence
    assert "Its perplexity" not in paired.sentence


def test_other_units_of_the_same_tokens_have_no_interval(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", after=LOSSES)
    b = write_run(tmp_path / "b", after=[*LOSSES, 3.0])
    paired = pair(a, b)
    assert (paired.comparable, paired.interval) == ("loss", None)
    assert "it has no interval: rows of another --seq-len" in paired.sentence


def test_another_tokenizer_leaves_bits_per_byte(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", after=[3.0] * 20)
    b = write_run(tmp_path / "b", after=[1.2] * 40, labels="other", n_bytes=10_050)
    paired = pair(a, b)
    assert (paired.comparable, paired.interval) == ("bits_per_byte", None)
    assert paired.lower_by == pytest.approx(bits([3.0] * 20, 10_000) - bits([1.2] * 40, 10_050))
    assert "cannot be compared. Bits per byte of text can" in paired.sentence


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"labels": "other", "text": "other"}, "the held-out text differs"),
        ({"labels": "other", "n_bytes": 9_000}, "other parts of the held-out text were measured"),
    ],
)
def test_other_text_cannot_be_compared(tmp_path: Path, changed: dict[str, object], reason: str) -> None:
    paired = pair(write_run(tmp_path / "a"), write_run(tmp_path / "b", **changed))  # type: ignore[arg-type]
    assert (paired.comparable, paired.lower_by, paired.interval) == ("nothing", None, None)
    assert reason in paired.sentence


def test_runs_without_recorded_losses_say_why(tmp_path: Path) -> None:
    done = write_run(tmp_path / "a")
    assert "it is not finished (stopped)" in pair(done, write_run(tmp_path / "b", steps=2)).sentence
    assert "finetune --resume" in pair(done, write_run(tmp_path / "c", losses=False)).sentence


def test_damaged_losses_are_named(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    losses = runs(a, b)[1].losses
    assert losses is not None
    with Report(console=False, metrics=b / "metrics.jsonl", append=True) as report:
        replace(losses, nats="*").write(report)
    assert "losses of B are damaged" in pair(a, b).sentence
    for damaged in (replace(losses, tokens=""), replace(losses, nats="", tokens=""), replace(losses, tokens="AAAA")):
        assert units_of(damaged) is None


def test_text_is_the_same_by_its_labels_or_by_its_documents_and_bytes() -> None:
    one = events.HeldOutLosses(0, labels="l", text="t", bytes=1000)
    assert same_text(one, replace(one, text="u", bytes=5)) == "loss"
    assert same_text(one, replace(one, labels="m", bytes=1009)) == "bits_per_byte"
    assert same_text(one, replace(one, labels="m", bytes=1020)) == "nothing"
    assert same_text(one, replace(one, labels="m", text="u")) == "nothing"
    assert same_text(one, None) == "nothing"
