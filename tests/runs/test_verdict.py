"""runs/verdict.py: verdicts on constructed curves of held-out losses, with the intervals of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from octavo.commands.finetune.unit_losses import next_of_curve, start_of_curve
from octavo.commands.scores import file_differences, loss_difference, score_row
from octavo.intervals import DOCUMENTS, Units
from octavo.metrics import Score
from octavo.ops.quantize import scheme_named
from octavo.runs.events import (
    Difference,
    Evaluation,
    Event,
    FileDifference,
    HeldOut,
    Interval,
    QuantizationCost,
    ScoreRow,
)
from octavo.runs.verdict import Verdict, verdict_of

DOCUMENTS_OF_TEXT, TOKENS, N_BYTES = 60, 100, 24_000
INT8, NONE = scheme_named("int8"), scheme_named("none")


def units(losses: npt.NDArray[np.float64]) -> Units:
    """Documents with these losses a token."""
    return Units(DOCUMENTS, TOKENS * losses, np.full(len(losses), TOKENS), len(losses), len(losses))


def scored(one: Units) -> Score:
    return Score(float(one.nats.sum()), int(one.tokens.sum()), N_BYTES, one)


def run(
    curve: Sequence[float], *, noise: float = 0.02, spread: float = 0.0, seed: int = 0, passes: float = 1.0
) -> list[Event]:
    """The events of a run whose held-out loss is curve[0] before training, and then curve[i] after i evaluations.

    `noise` is the deviation of a document's loss from evaluation to evaluation, `spread` that of its gain. The adapter
    of the lowest loss is kept.
    """
    generator = np.random.default_rng(seed)
    documents = 0.4 * generator.standard_normal(DOCUMENTS_OF_TEXT)
    texts = [units(mean + documents + noise * generator.standard_normal(DOCUMENTS_OF_TEXT)) for mean in curve]
    texts[0] = units(texts[0].nats / TOKENS + spread * generator.standard_normal(DOCUMENTS_OF_TEXT))
    events: list[Event] = []
    losses, steps = start_of_curve(texts[0]), len(curve) - 1
    for number, one in enumerate(texts[1:], 1):
        result = scored(one)
        event = HeldOut(10 * number, result.loss, result.perplexity, passes=passes * number / steps)
        event, losses = next_of_curve(event, losses, one)
        events.append(event)
    best = min(texts[1:], key=lambda one: float(one.nats.sum()))
    rows = tuple(
        score_row(name, INT8, None, scored(one)) for name, one in (("quantized base", texts[0]), ("tuned", best))
    )
    return [*events, Evaluation(10 * steps, rows, (loss_difference(rows[0], rows[1], texts[0], best),))]


def test_a_curve_that_falls_is_better_and_more_passes_are_recommended() -> None:
    verdict = verdict_of(run([3.0, 2.8, 2.6, 2.4], passes=3))
    assert (verdict.change, verdict.trend) == ("better", "falling")
    assert verdict.percent_a_pass == pytest.approx(100 * 0.2 / 2.6, rel=0.1)
    assert verdict.gain == pytest.approx(0.6 * 60 * TOKENS / N_BYTES / np.log(2), rel=0.05)
    first, second, cost = verdict.sentences
    assert cost.startswith("What int8 costs against full precision was not measured")
    assert first.startswith("Better by 0.2")
    assert "bits per byte (perplexity " in first
    assert second.startswith("Still falling by 7.")
    assert ": --epochs 6, without --steps, may be better." in second


def test_a_curve_that_has_become_flat_is_better_and_no_longer_falls() -> None:
    verdict = verdict_of(run([3.0, 2.6, 2.5, 2.5, 2.5]))
    assert (verdict.change, verdict.trend, verdict.percent_a_pass) == ("better", "flat", None)
    assert "no longer falls" in verdict.sentences[1]


def test_a_curve_that_turns_up_overfits_since_its_lowest_step() -> None:
    verdict = verdict_of(run([3.0, 2.7, 2.5, 2.6, 2.8], passes=4))
    assert (verdict.change, verdict.trend, verdict.best_step) == ("better", "overfits", 20)
    assert verdict.sentences[1].startswith("Overfits since step 20: the held-out loss is higher by 0.1")
    assert " bits per byte at step 40" in verdict.sentences[1]
    assert verdict.sentences[1].endswith("at step 40. Fewer epochs are enough: --epochs 2.")


def test_a_curve_that_only_rises_is_worse() -> None:
    verdict = verdict_of(run([3.0, 3.2, 3.5]))
    assert (verdict.change, verdict.trend, verdict.best_step) == ("worse", "rising", None)
    assert verdict.sentences[0].startswith("Worse by 0.0")
    assert "higher than before training" in verdict.sentences[1]


def test_differences_within_the_noise_cannot_be_told() -> None:
    verdict = verdict_of(run([3.0, 3.0, 2.99], noise=0.3))
    assert (verdict.change, verdict.trend) == ("unclear", "flat")
    assert verdict.sentences[0].startswith("No difference can be told: the gain is ")


def test_the_same_curve_shows_more_with_less_noise() -> None:
    """No constant decides, but the interval."""
    curve = [3.0, 2.99, 2.98, 2.985]
    assert verdict_of(run(curve, noise=0.3)).trend == "flat"
    assert verdict_of(run(curve, noise=0.001)).trend == "overfits"
    assert verdict_of(run(curve, noise=0.001)).change == "better"


def test_a_fall_that_is_small_against_the_uncertainty_of_the_gain_is_flat() -> None:
    curve = [3.0, 2.5, 2.499]
    assert verdict_of(run(curve, noise=0.001)).trend == "falling"
    verdict = verdict_of(run(curve, noise=0.001, spread=0.3))
    assert (verdict.change, verdict.trend) == ("better", "flat")


def test_curves_of_noise_are_rarely_said_to_overfit_or_fall() -> None:
    """The lowest of 8 noisy losses is chosen, which an interval of two fixed evaluations would not allow for."""
    trends = [verdict_of(run([3.0, *[2.5] * 8], noise=0.2, seed=seed)).trend for seed in range(300)]
    assert trends.count("overfits") <= 15  # 2.5 % is 7.5; not widened: 32
    assert trends.count("falling") <= 15


@pytest.mark.parametrize("cost", [0.05, 0.0])
def test_what_the_scheme_costs_is_said(cost: float) -> None:
    generator = np.random.default_rng(1)
    full = units(3 + 0.4 * generator.standard_normal(60))
    quantized = units(full.nats / TOKENS + cost + 0.01 * generator.standard_normal(60))
    tuned = units(quantized.nats / TOKENS - 0.2 + 0.01 * generator.standard_normal(60))
    named = (("base", NONE, full), ("quantized base", INT8, quantized), ("tuned", INT8, tuned))
    rows = tuple(score_row(name, scheme, None, scored(one)) for name, scheme, one in named)
    verdict = verdict_of([
        QuantizationCost(loss_difference(rows[0], rows[1], full, quantized)),
        Evaluation(1, rows, (loss_difference(rows[1], rows[2], quantized, tuned),)),
    ])  # fmt: skip
    assert verdict.change == "better"
    expected = "int8 costs 0.0178" if cost else "What int8 costs cannot be told: "
    assert verdict.sentences[1].startswith(expected)


def test_files_that_changed_most_for_sure_are_first() -> None:
    generator = np.random.default_rng(2)
    gains = {"small.txt": 0.05, "large.txt": 0.5, "noisy.txt": 0.0, "short.txt": 0.4}
    spread = {"noisy.txt": 2.0}
    before, after = {}, {}
    for name, gain in gains.items():
        losses = 3 + 0.3 * generator.standard_normal(4 if name == "short.txt" else 30)
        before[name] = units(losses)
        after[name] = units(losses - gain + spread.get(name, 0.02) * generator.standard_normal(len(losses)))
    *_, evaluation = run([3.0, 2.5])
    assert isinstance(evaluation, Evaluation)
    sides = ({f"/home/me/{name}": one for name, one in side.items()} for side in (before, after))
    evaluation = replace(evaluation, files=tuple(file_differences(*sides)))
    verdict = verdict_of([evaluation])
    assert [one.source.removeprefix("/home/me/") for one in verdict.files] == [
        "large.txt",
        "small.txt",
        "noisy.txt",
        "short.txt",
    ]
    sentences = verdict.sentences[1:]
    assert sentences[0].startswith("large.txt: gain 0.18")
    assert "not clear" in sentences[2]
    assert "without an interval" in sentences[3]


def test_a_text_that_is_too_short_has_a_gain_without_an_interval() -> None:
    rows = tuple(
        score_row(name, INT8, None, scored(units(np.full(4, loss)))) for name, loss in (("a", 3.0), ("b", 2.0))
    )
    verdict = verdict_of([Evaluation(1, rows, (loss_difference(rows[0], rows[1], None, None),))])
    assert (verdict.change, verdict.plus_minus, verdict.trend) == ("not measured", None, "not measured")
    assert verdict.sentences[0].startswith("Nothing can be told: bits per byte are 0.0")
    assert "too short for an interval" in verdict.sentences[0]


@pytest.mark.parametrize("events", [[], [HeldOut(3, 2.5, 12.0)], [Evaluation(3)]])
def test_without_a_comparison_there_is_no_verdict(events: list[Event]) -> None:
    assert verdict_of(events) == Verdict()


@pytest.mark.parametrize("bounds", [(math.nan, math.nan), (-math.inf, math.inf), (-1.0, math.inf)])
@pytest.mark.parametrize("lower_by", [0.1, 0.0, 1e-200, math.nan, math.inf])
def test_values_that_are_not_finite_decide_nothing(bounds: tuple[float, float], lower_by: float) -> None:
    interval = Interval(*bounds, 20, "documents")
    rows = (ScoreRow("b", "n", None, 7.0, 1.0, 10, loss=2.0), ScoreRow("t", "n", "a", 7.0, 1.0, 10, loss=2.0))
    files = tuple(FileDifference(name, 9, lower_by, interval) for name in "ab")
    curve = HeldOut(10, 2.0, 7.0, 1.0, 0.5, interval, interval, 5)
    verdict = verdict_of([curve, Evaluation(10, rows, (Difference("b", "n", "t", "n", lower_by, interval),), files)])
    assert verdict.change == "not measured"
    assert verdict.trend in ("flat", "not measured")
    assert not any("nan" in sentence for sentence in verdict.sentences)


def test_a_tiny_gain_within_its_interval_is_unclear() -> None:
    rows = (ScoreRow("b", "n", None, 7.0, 1.0, 10, loss=2.0), ScoreRow("t", "n", "a", 7.0, 1.0, 10, loss=2.0))
    difference = Difference("b", "n", "t", "n", 1e-200, Interval(-1.0, 1.0, 20, "documents"))
    assert verdict_of([Evaluation(3, rows, (difference,))]).change == "unclear"
