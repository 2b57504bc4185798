"""commands/scores.py: what the perplexity table says about intervals and differences."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from octavo.commands.scores import ScoreTable, loss_difference, score_row, show_scores
from octavo.intervals import Units, difference, units_of
from octavo.metrics import Score
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.runs.verdict import Verdict

INT8 = scheme_named("int8")
N_BYTES = 1000
FACTOR = 2000 / N_BYTES / math.log(2)  # bits per byte of a nat per token, of 20 documents of 100 tokens


def units(losses: npt.NDArray[np.float64], *, one_document: bool = False) -> Units:
    """The units of documents of 100 tokens with these mean losses, each in a row of its own."""
    numbers = np.arange(len(losses))
    return units_of(100 * losses, np.full(len(losses), 100), numbers * (not one_document), numbers)


def printed(
    before: Units | None, after: Units, capsys: pytest.CaptureFixture[str], verdict: Verdict | None = None
) -> str:
    """What is printed for a base with the losses `before` (None: they were not saved) and a tuned model."""
    base = before or after
    rows = [
        score_row(name, INT8, None, Score(float(one.nats.sum()), int(one.tokens.sum()), N_BYTES, one))
        for name, one in (("quantized base", base), ("tuned", after))
    ]
    with Report(results=True) as report:
        show_scores(ScoreTable(rows, [loss_difference(rows[0], rows[1], before, after)], after), report, verdict)
    return " ".join(capsys.readouterr().out.split())


LOSSES = 3 + 0.4 * np.random.default_rng(0).standard_normal(20)


def test_the_losses_have_intervals_and_the_difference_is_paired(capsys: pytest.CaptureFixture[str]) -> None:
    gain = 0.2 + 0.01 * np.random.default_rng(1).standard_normal(20)
    text = printed(units(LOSSES), units(LOSSES - gain), capsys)
    assert "Scores; intervals over 20 documents" in text
    assert text.count(" to ") == 3
    assert f"The loss of tuned is {FACTOR * gain.mean():.3f} bits" in text
    low = difference(units(LOSSES), units(LOSSES - gain))
    assert low is not None
    assert f"bits per byte lower than that of quantized base (95% interval {FACTOR * low.low:.3f} to" in text
    assert "nats" not in text
    assert text.endswith("over the same 20 documents).")


def test_a_loss_that_rose_is_said_to_be_higher(capsys: pytest.CaptureFixture[str]) -> None:
    gain = 0.2 + 0.01 * np.random.default_rng(1).standard_normal(20)
    text = printed(units(LOSSES - gain), units(LOSSES), capsys)
    assert f"is {FACTOR * gain.mean():.3f} bits per byte higher than that of quantized base (95% interval 0." in text


def test_a_difference_that_the_verdict_says_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(units(LOSSES), units(LOSSES - 0.2), capsys, Verdict("better", 0.58))
    assert "bits per byte" in text
    assert "The loss of" not in text
    assert "The loss of tuned is" in printed(units(LOSSES), units(LOSSES - 0.2), capsys, Verdict())


def test_a_difference_that_the_text_does_not_show_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    noise = 0.1 * np.random.default_rng(1).standard_normal(20)
    text = printed(units(LOSSES), units(LOSSES - noise + noise.mean() - 0.01), capsys)
    assert text.endswith("The interval contains 0: this text does not show which is better.")


@pytest.mark.parametrize("rows", [10, 20])
def test_one_long_document_has_intervals_over_its_rows(rows: int, capsys: pytest.CaptureFixture[str]) -> None:
    losses = np.resize(LOSSES, rows)
    text = printed(units(losses, one_document=True), units(losses - 0.1, one_document=True), capsys)
    assert f"intervals over {rows} rows in order" in text
    assert f"over the same {rows} rows in order)" in text


def test_a_short_text_has_no_interval_and_the_output_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    few = LOSSES[:4]
    text = printed(units(few, one_document=True), units(few - 0.25, one_document=True), capsys)
    reason = "There is no 95% interval: it needs 10 documents or rows, and the text has 1 document in 4 rows."
    assert text.endswith(
        f"{reason} The loss of tuned is {FACTOR / 5 * 0.25:.3f} bits per byte lower than that of quantized base."
    )


@pytest.mark.parametrize("after", [LOSSES, LOSSES - 0.0001, LOSSES + 0.0001])
def test_losses_that_are_equal_to_three_decimals_have_no_difference(
    after: npt.NDArray[np.float64], capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(units(LOSSES), units(after), capsys)
    digits = "" if after is LOSSES else " to three decimals"
    start = f"There is no difference between the losses of tuned and quantized base{digits} (95% interval "
    assert start in text
    assert "lower" not in text
    assert "higher" not in text
    assert text.endswith("over the same 20 documents).")
    few = printed(units(LOSSES[:4]), units(after[:4]), capsys)
    assert few.endswith(f"between the losses of tuned and quantized base{digits}.")


def test_rows_of_two_schemes_are_named_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = units(LOSSES), units(LOSSES + 0.2)
    rows = [
        score_row("quantized base", scheme_named(scheme), None, Score(float(one.nats.sum()), 2000, 1000, one))
        for scheme, one in (("int8", before), ("nf4", after))
    ]
    with Report(results=True) as report:
        show_scores(ScoreTable(rows, [loss_difference(rows[0], rows[1], before, after)], after), report)
    text = " ".join(capsys.readouterr().out.split())
    before_name, after_name = "quantized base (int8)", "quantized base (nf4)"
    assert (
        f"The loss of {after_name} is {FACTOR * 0.2:.3f} bits per byte higher than that of {before_name} (95%" in text
    )


def test_without_the_losses_before_training_the_difference_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(None, units(LOSSES), capsys)
    assert text.count(" to ") == 2
    assert text.endswith("it has no interval: the losses before training are not in the checkpoint.")
