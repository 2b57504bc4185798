"""The events of a run as named numbers and texts of a step, the same for every tracker."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from octavo.runs import events
from octavo.runs.verdict import verdict_of

TRAIN = ("loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "tokens_per_second")
HELD_OUT = ("loss", "perplexity", "passes")
SCORES = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Point:
    """What one event says. `time` is in seconds since 1970."""

    step: int
    numbers: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    time: float = 0.0

    @property
    def keys(self) -> set[tuple[str, int]]:
        """(name, step) of each value."""
        return {(name, self.step) for name in (*self.numbers, *self.texts)}

    def without(self, sent: set[tuple[str, int]]) -> Point | None:
        """The point without the values in `sent`; None if nothing is left."""
        numbers = {name: value for name, value in self.numbers.items() if (name, self.step) not in sent}
        texts = {name: value for name, value in self.texts.items() if (name, self.step) not in sent}
        return replace(self, numbers=numbers, texts=texts) if numbers or texts else None


class Points:
    """Makes points of events. Samples are numbered by their prompts, in the order of their first occurrence."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._about: dict[str, str] = {}

    def of(self, some: Sequence[events.Event], time: object = None) -> Iterator[Point]:
        """The points of `some` events; one that has no number or text gives none. `time` is in ISO 8601."""
        for event in some:
            step = getattr(event, "step", None)
            point = Point(
                0 if step is None else step, _finite(_numbers(event)), dict(self._texts(event)), _seconds(time)
            )
            if point.numbers or point.texts:
                yield point

    def verdict(self, recorded: Sequence[events.Event], evaluation: events.Evaluation) -> Iterator[Point]:
        """The verdict on a finished run, from all its events."""
        verdict = verdict_of(recorded)
        if verdict.sentences:
            numbers = {} if verdict.gain is None else {"verdict/gain_bits_per_byte": verdict.gain}
            yield Point(evaluation.step or 0, numbers, {"verdict": "\n".join(verdict.sentences)}, _seconds(None))

    def _texts(self, event: events.Event) -> Iterator[tuple[str, str]]:
        if isinstance(event, events.Sample):
            number = self._prompts.setdefault(event.prompt, len(self._prompts) + 1)
            yield f"sample/{number}", f"{event.prompt}{event.text}"
        elif isinstance(event, events.Hardware | events.Versions):
            yield event.kind, ", ".join(f"{name} {value}" for name, value in asdict(event).items() if value)
        elif isinstance(event, events.Failure):
            yield "failure", event.text


def _numbers(event: events.Event) -> dict[str, Any]:
    if isinstance(event, events.Step):
        return {f"train/{name}": getattr(event, name) for name in TRAIN}
    if isinstance(event, events.HeldOut):
        return {f"held_out/{name}": getattr(event, name) for name in HELD_OUT}
    if isinstance(event, events.Memory):
        return {"memory/peak_bytes": event.peak_bytes}
    if isinstance(event, events.Evaluation):
        values = {f"evaluation/{row.name}/{name}": getattr(row, name) for row in event.rows for name in SCORES}
        for one in event.differences:
            values["evaluation/lower_by"] = one.lower_by
            if one.interval:
                values |= {f"evaluation/lower_by_{end}": getattr(one.interval, end) for end in ("low", "high")}
        return values
    return {}


def _finite(values: dict[str, Any]) -> dict[str, float]:
    """The numbers; what is missing, NaN or infinite is left out, which trackers show in different ways or refuse."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _seconds(time: object) -> float:
    return (datetime.fromisoformat(time) if isinstance(time, str) else datetime.now(UTC)).timestamp()
