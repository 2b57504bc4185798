"""The verdict on a run: what its held-out text shows, as data and in sentences.

Every decision is one of an interval at 95 %, never of a constant:

- better or worse: the interval of the paired difference before - after excludes 0;
- overfits: the interval of the rise above the lowest held-out loss excludes 0, widened for the choice of the lowest one
  among k earlier evaluations, that before training included (Bonferroni: each tail is 0.025 / k);
- still falling: the interval of the fall at the last evaluation excludes 0, and one more pass at that rate would change
  the loss by more than the uncertainty of the gain.

Every size is in bits per byte (loss_unit.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from statistics import NormalDist
from typing import Any, Literal

from octavo.runs.events import (
    Difference,
    EarlyStop,
    Evaluation,
    Event,
    FileDifference,
    HeldOut,
    QuantizationCost,
    ScoreRow,
    last,
    only,
)
from octavo.runs.interval import Interval, half_width, plus_minus
from octavo.runs.loss_unit import NATS, LossUnit, unit_of
from octavo.runs.probe_sentences import probe_sentences

MAX_FILES = 5  # that the verdict names
LEAST_PASSES = 0.25  # between two evaluations, from which on a fall is told as one of a whole pass
Change = Literal["better", "worse", "unclear", "not measured"]
Trend = Literal["falling", "flat", "overfits", "rising", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What the held-out text shows. `gain` is in bits per byte, positive if the tuned model is better."""

    change: Change = "not measured"
    gain: float | None = None
    plus_minus: float | None = None  # half the width of the 95 % interval of `gain`
    trend: Trend = "not measured"
    percent_a_pass: float | None = None  # of the held-out loss, while it falls
    best_step: int | None = None  # of the lowest held-out loss, if the run overfits
    files: tuple[FileDifference, ...] = ()  # that changed most
    sentences: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {**asdict(self), "files": [asdict(one) for one in self.files], "sentences": list(self.sentences)}


def verdict_of(events: Sequence[Event]) -> Verdict:
    """The verdict on a run, or on one table of `octavo evaluate`. Without a comparison it has no sentences."""
    evaluation = last(events, Evaluation)
    difference = evaluation.differences[-1] if evaluation and evaluation.differences else None
    rows = evaluation.rows if evaluation else ()
    before, after = (_row(rows, difference, side) for side in ("before", "after"))
    if evaluation is None or difference is None or before is None or after is None or difference.lower_by is None:
        return Verdict(sentences=tuple(probe_sentences(events)))
    unit = unit_of(before)
    gain = difference.lower_by * unit.factor
    if unit is NATS or not math.isfinite(gain):
        return Verdict(sentences=tuple(probe_sentences(events)))
    half = half_width(difference.interval)
    change: Change = "not measured"
    if half is not None:
        is_unclear = not gain or abs(difference.lower_by) <= half
        change = "unclear" if is_unclear else "better" if gain > 0 else "worse"
    plus_minus = None if half is None else half * unit.factor
    trend, percent, best, about_trend = _trend(only(events, HeldOut), half or 0.0, unit)
    files = tuple(sorted((one for one in evaluation.files if _is_finite(one.lower_by)), key=_size)[:MAX_FILES])
    sentences = [_change_sentence(change, gain, plus_minus, difference, (before, after))]
    sentences += [about_trend] if about_trend else []
    if (stop := last(events, EarlyStop)) and stop.step == evaluation.step:
        sentences.append(f"Stopped early after step {stop.step:,}: {stop.reason}.")
    if (cost := last(events, QuantizationCost)) and (sentence := _cost_sentence(cost.difference, rows)):
        sentences.append(sentence)
    sentences += probe_sentences(events)
    if len(evaluation.files) > 1:
        folder = _folder([one.source for one in evaluation.files])
        sentences += [_file_sentence(one, one.source.removeprefix(folder), unit) for one in files]
    if cost is None and evaluation.step is not None and before.scheme != "none":
        sentences.append(
            f"What {before.scheme} costs against full precision was not measured: octavo evaluate YOUR_TEXTS "
            f"--compare none,{before.scheme} measures it."
        )
    return Verdict(change, gain, plus_minus, trend, percent, best, files, tuple(sentences))


def _row(rows: Sequence[ScoreRow], difference: Difference | None, side: str) -> ScoreRow | None:
    """The row of the table that a difference names."""
    if difference is None:
        return None
    named = getattr(difference, side), getattr(difference, f"{side}_scheme")
    return next((row for row in rows if (row.name, row.scheme) == named), None)


def _middle(bounds: Interval) -> float:
    return (bounds.high + bounds.low) / 2


def _change_sentence(
    change: Change, gain: float, half: float | None, difference: Difference, rows: tuple[ScoreRow, ScoreRow]
) -> str:
    before, after = rows
    perplexities = f"perplexity {_number(before.perplexity)} -> {_number(after.perplexity)}"
    if half is None:
        word = "lower" if gain > 0 else "higher"
        reason = (
            "the held-out text is too short for an interval. Give more of it with --test-data or --test-fraction"
            if after.interval is None
            else "the losses before training are not saved, so there is no interval"
        )
        return f"Nothing can be told: bits per byte are {abs(gain):.4g} {word} ({perplexities}), but {reason}."
    bounds = difference.interval
    on = f" on {bounds.units:,} {bounds.over}" if bounds else ""
    if change == "unclear":
        times = half / abs(gain) if gain else math.inf  # the square root of how much more text shows it
        more = f" A change of this size shows on about {times**2:.2g} times as much text." if 1.02 < times < 10 else ""
        size = f"{plus_minus(gain, half)} bits per byte{on} ({perplexities})"
        return f"No difference can be told: the gain is {size}.{more}"
    return f"{change.capitalize()} by {plus_minus(abs(gain), half)} bits per byte ({perplexities}){on}."


def _trend(curve: Sequence[HeldOut], uncertainty: float, unit: LossUnit) -> tuple[Trend, float | None, int | None, str]:
    """(trend, percent a pass, best step, sentence) of the held-out losses during training.

    `uncertainty` is half the interval of the gain, in nats a token.
    """
    newest = curve[-1] if curve else None
    if newest is None or newest.loss is None or newest.fall is None or newest.rise is None:
        return "not measured", None, None, ""
    if half_width(newest.rise) is None or half_width(newest.fall) is None:
        return "not measured", None, None, ""
    if higher := clear_rise(newest, len(curve), unit):
        if not newest.lowest_step:
            sentence = f"The held-out loss at step {newest.step:,} is higher than before training, by {higher}: "
            return "rising", None, None, f"{sentence}a lower --lr may help."
        best = next((one for one in curve if one.step == newest.lowest_step), None)
        part = f": --epochs {_epochs(best.passes)}" if best and best.passes else ""
        sentence = f"Overfits since step {newest.lowest_step:,}: the held-out loss is higher by {higher} at step "
        return "overfits", None, newest.lowest_step, f"{sentence}{newest.step:,}. Fewer epochs are enough{part}."
    fall = _middle(newest.fall)
    passes = (newest.passes or 0.0) - (newest.passes_before or 0.0)
    if newest.fall.low > 0 and passes > 0 and fall / passes > uncertainty:
        if passes < LEAST_PASSES:
            return "falling", None, None, "The held-out loss still fell at the end: a longer run may be better."
        percent, epochs = 100 * fall / passes / (newest.loss + fall), math.ceil(2 * (newest.passes or 0.0))
        return (
            "falling",
            percent,
            None,
            (
                f"Still falling by {percent:.2g} % a pass over the training text, as in the last {passes:.2g} passes: "
                f"--epochs {epochs}, without --steps, may be better."
            ),
        )
    return (
        "flat",
        None,
        None,
        ("The held-out loss no longer falls by more than this text can show; more of it would show smaller falls."),
    )


def clear_rise(event: HeldOut, earlier: int, unit: LossUnit) -> str:
    """How far the loss is above the lowest one of `earlier` evaluations, with its interval; "" if that is not clear.

    `unit` is that of the text: "0.030 ± 0.010 bits per byte".
    """
    half = half_width(event.rise)
    if event.rise is None or half is None:
        return ""
    rise, half = _middle(event.rise), half * _widened(earlier)
    return f"{plus_minus(unit.of(rise), unit.of(half))} {unit.name}" if rise > half else ""


def _epochs(passes: float) -> str:
    """A number of passes as an option: two digits, and no exponent."""
    return f"{passes:.2g}" if passes < 10 else f"{passes:.0f}"


def _widened(earlier: int) -> float:
    """How many times as wide an interval is whose lowest point was chosen among so many earlier evaluations."""
    normal = NormalDist()
    return normal.inv_cdf(1 - 0.025 / max(1, earlier)) / normal.inv_cdf(0.975)


def _cost_sentence(cost: Difference, rows: Sequence[ScoreRow]) -> str:
    """What the quantization cost."""
    before, half = _row(rows, cost, "before"), half_width(cost.interval)
    unit = unit_of(before)
    if unit is NATS or cost.lower_by is None or half is None:
        return ""
    change, half = -unit.of(cost.lower_by), unit.of(half)
    if abs(change) <= half:
        return f"What {cost.after_scheme} costs cannot be told: {plus_minus(change, half)} bits per byte."
    word = "costs" if change > 0 else "gains"
    return f"{cost.after_scheme} {word} {plus_minus(abs(change), half)} bits per byte against full precision."


def _folder(sources: Sequence[str]) -> str:
    """The common folder of files, with a trailing separator, which sentences leave out."""
    folders = [source.rpartition("/")[0].split("/") for source in sources]
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))]
    return "/".join(shared) + "/" if any(folders[0]) and shared else ""


def _file_sentence(one: FileDifference, name: str, unit: LossUnit) -> str:
    assert one.lower_by is not None
    half = half_width(one.interval)
    if half is None:
        size = f"{unit.of(one.lower_by):+.3f} bits per byte, without an interval"
        return f"{name}: gain {size} (too few documents or rows)."
    unclear = " (not clear)" if abs(one.lower_by) <= half else ""
    return f"{name}: gain {plus_minus(unit.of(one.lower_by), unit.of(half))} bits per byte{unclear}."


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _size(one: FileDifference) -> float:
    """Sorts files: what changed most for sure first, those without an interval last."""
    assert one.lower_by is not None
    half = half_width(one.interval)
    return math.inf if half is None else half - abs(one.lower_by)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
