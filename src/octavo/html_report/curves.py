"""The charts of a report: losses by step, learning rate, speed, gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from octavo.html_report.chart import MAX_POINTS, Points, Series, bars, dots, draw, line, marks, ring, smooth
from octavo.html_report.elements import section, text
from octavo.html_report.header import finite
from octavo.runs.events import Event, HeldOut, HeldOutLosses, Step, only
from octavo.runs.packed_numbers import unpack_counts, unpack_floats


def curves(events: Sequence[Event]) -> str:
    """The section of all charts; "" without a step."""
    steps, evaluations = only(events, Step), only(events, HeldOut)
    training = _points(steps, "loss")
    held_out = [*_before_training(events), *_points(evaluations, "loss")]
    lowest = min(held_out, key=lambda point: point[1], default=None)
    bounds = _bounds(evaluations)
    series = [
        Series("training, each step", training, "train", dots),
        Series("training, smoothed", smooth(training), "train", line),
        Series("held out", held_out, "held", marks),
        Series("", bounds[-MAX_POINTS // 2 * 2 :], "held", bars),
    ]
    if lowest and len(held_out) > 1:
        series.append(Series(f"lowest held out: step {lowest[0]:,.0f}", [lowest], "held", ring))
    chart = draw("Loss in nats per token", series, width=920, height=340)
    caption = "Bars: 95 % interval of the change from the evaluation before. Step 0 is before training."
    cards = [chart, f'<p class="caption">{text(caption)}</p>' if chart and bounds else ""]
    small = [
        draw(title, [Series(title, _points(steps, key), "train", line)], width=300, height=190)
        for key, title in (
            ("learning_rate", "Learning rate"),
            ("tokens_per_second", "Tokens per second"),
            ("grad_norm", "Gradient norm"),
        )
    ]
    if any(small):
        details = f'<div class="pair">{"".join(small)}</div>'
        cards.append(f"<details><summary>Learning rate, speed, gradient norm</summary>{details}</details>")
    return section("Training", "".join(cards))


def _before_training(events: Sequence[Event]) -> Points:
    """The held-out loss of step 0: that of the model that is trained, the last one that was measured then."""
    for losses in reversed([event for event in only(events, HeldOutLosses) if event.step == 0]):
        try:
            tokens = sum(unpack_counts(losses.tokens))
            loss = math.fsum(unpack_floats(losses.nats)) / tokens
        except (ValueError, ArithmeticError):
            continue
        return [(0.0, loss)] if math.isfinite(loss) else []
    return []


def _bounds(evaluations: Iterable[HeldOut]) -> Points:
    """Two points (step, low), (step, high) of each evaluation with an interval of the fall."""
    pairs: Points = []
    for event in evaluations:
        loss = finite(event.loss)
        if loss is None or event.fall is None:
            continue
        half = finite((event.fall.high - event.fall.low) / 2)
        if half is not None:
            pairs += [(float(event.step), loss - half), (float(event.step), loss + half)]
    return pairs


def _points(events: Iterable[Step | HeldOut], field: str) -> Points:
    """(step, value of a field) of the events in which it is finite."""
    pairs = ((float(event.step), finite(getattr(event, field))) for event in events)
    return [(x, y) for x, y in pairs if y is not None]
