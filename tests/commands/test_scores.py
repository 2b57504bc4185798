"""commands/scores.py: what the perplexity table says about intervals and differences."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from octavo.commands.scores import ScoreTable, loss_difference, score_row, show_scores
from octavo.intervals import Units, units_of
from octavo.metrics import Score
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report

INT8 = scheme_named("int8")


def units(losses: npt.NDArray[np.float64], *, one_document: bool = False) -> Units:
    """The units of documents of 100 tokens with these mean losses, each in a row of its own."""
    numbers = np.arange(len(losses))
    return units_of(100 * losses, np.full(len(losses), 100), numbers * (not one_document), numbers)


def printed(before: Units | None, after: Units, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed for a base with the losses `before` (None: they were not saved) and a tuned model."""
    base = before or after
    rows = [
        score_row(name, INT8, None, Score(float(one.nats.sum()), int(one.tokens.sum()), 1000, one))
        for name, one in (("quantized base", base), ("tuned", after))
    ]
    with Report(results=True) as report:
        show_scores(ScoreTable(rows, [loss_difference(rows[0], rows[1], before, after)], after), report)
    return " ".join(capsys.readouterr().out.split())


LOSSES = 3 + 0.4 * np.random.default_rng(0).standard_normal(20)


def test_the_losses_have_intervals_and_the_difference_is_paired(capsys: pytest.CaptureFixture[str]) -> None:
    gain = 0.2 + 0.01 * np.random.default_rng(1).standard_normal(20)
    text = printed(units(LOSSES), units(LOSSES - gain), capsys)
    assert "Loss in nats per token; intervals over 20 documents" in text
    assert text.count(" to ") == 3
    assert "The loss of tuned is 0.2" in text
    assert "nats per token lower than that of quantized base (95% interval 0.19" in text
    assert text.endswith("over the same 20 documents).")


def test_a_loss_that_rose_is_said_to_be_higher(capsys: pytest.CaptureFixture[str]) -> None:
    gain = 0.2 + 0.01 * np.random.default_rng(1).standard_normal(20)
    text = printed(units(LOSSES - gain), units(LOSSES), capsys)
    assert "nats per token higher than that of quantized base (95% interval 0.19" in text


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
    assert text.endswith(f"{reason} The loss of tuned is 0.250 nats per token lower than that of quantized base.")


@pytest.mark.parametrize("after", [LOSSES, LOSSES - 0.0004, LOSSES + 0.0004])
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
    assert (
        "The loss of quantized base (nf4) is 0.200 nats per token higher than that of quantized base (int8) (95%"
        in text
    )


def test_without_the_losses_before_training_the_difference_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(None, units(LOSSES), capsys)
    assert text.count(" to ") == 2
    assert text.endswith("it has no interval: the losses before training are not in the checkpoint.")
