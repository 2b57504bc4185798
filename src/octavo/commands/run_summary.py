"""The summary of a run folder: what was trained, how far, and what it changed. `octavo runs` and `octavo compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeGuard

from octavo.bounded_json import read_object
from octavo.config.settings import read_settings
from octavo.errors import CheckpointError, OctavoError
from octavo.failures import explained
from octavo.runs import events
from octavo.runs.events import Event, ScoreRow, Step
from octavo.runs.folder import RunFolder
from octavo.runs.loss_unit import NATS, LossUnit, unit_of
from octavo.runs.metrics_ends import read_ends
from octavo.runs.packed_numbers import unpack_counts, unpack_floats
from octavo.system import is_locked

State = Literal["finished", "running", "stopped", "failed", "unreadable", "checkpoint"]
SPEED_STEPS = 50  # the last steps, of whose speeds the median is shown


@dataclass(frozen=True)
class RunSummary:
    """A run folder in one line. None: not recorded, or not yet."""

    path: Path
    state: State
    problem: str = ""  # of a failed run its error, of an unreadable folder what is wrong, else what is missing
    settings: Mapping[str, Any] = field(default_factory=dict)  # config.yaml
    steps: int = 0
    planned_steps: int | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    difference: events.Difference | None = None
    unit: LossUnit = NATS  # in which the difference is shown
    tokens_per_second: float | None = None
    started: str | None = None  # UTC, ISO 8601
    device: str = ""

    @property
    def model(self) -> str:
        return str(self.settings.get("model", ""))

    @property
    def data(self) -> list[str]:
        data = self.settings.get("data", [])
        return [str(path) for path in data] if isinstance(data, list) else [str(data)]


def summarize(path: Path) -> RunSummary:
    """The summary of a run folder from the ends of its files. No error: the summary has the reason."""
    run = RunFolder(path)
    try:
        run.check_format()
        settings = read_settings(run.settings, fast=True) if run.settings.exists() else {}
        if not run.metrics.exists():
            state: State = "running" if is_locked(run.path / ".lock") else "unreadable"
            return RunSummary(path, state, "metrics.jsonl is missing", settings)
        ends = read_ends(run.metrics, enough=_has_step)
        problem = "" if settings else "config.yaml is missing"
        return summary_of(run, settings, ends.events, started=ends.first_time, problem=problem)
    except (OctavoError, OSError) as error:
        known = explained(error)
        return RunSummary(path, "unreadable", known.message if known else str(error))


def summary_of(
    run: RunFolder, settings: Mapping[str, Any], found: Sequence[Event], *, started: str | None, problem: str = ""
) -> RunSummary:
    """The summary of a run from its settings and events. The beginning and the end of the events are enough."""
    done = steps_done(found)
    state, failure = state_of(run, found)
    before, after = _perplexities(found)
    evaluation = events.last(found, events.Evaluation)
    hardware = events.last(found, events.Hardware)
    speeds = [step.tokens_per_second for step in events.only(found, Step) if _is_number(step.tokens_per_second)]
    return RunSummary(
        run.path,
        state,
        failure or problem,
        settings,
        done,
        planned_steps(run, settings),
        before,
        after,
        evaluation.differences[-1] if evaluation and evaluation.differences else None,
        unit_of(evaluation.rows[-1] if evaluation and evaluation.rows else None),
        median(map(float, speeds[-SPEED_STEPS:])) if speeds else None,
        started,
        hardware.name if hardware else "",
    )


def steps_done(found: Sequence[Event]) -> int:
    """The last step that is recorded; 0 before the first one."""
    numbers = [event.step for event in found if isinstance(event, Step | events.Evaluation) and event.step is not None]
    return max(numbers, default=0)


def state_of(run: RunFolder, found: Sequence[Event]) -> tuple[State, str]:
    """The state of a run, and of a failed one its error. A killed run is stopped: it cannot record what ended it."""
    lasting = [event for event in found if not isinstance(event, events.Say | events.Warn)]
    evaluation = events.last(found, events.Evaluation)
    if evaluation is not None and evaluation.step == steps_done(found):
        return "finished", ""
    if is_locked(run.path / ".lock"):
        return "running", ""
    if lasting and isinstance(failure := lasting[-1], events.Failure):
        return "failed", failure.text
    return "stopped", ""


def planned_steps(run: RunFolder, settings: Mapping[str, Any]) -> int | None:
    """The steps of the whole run: --steps, else those of --epochs over the rows in ledger.json; None if unknown."""
    steps = settings.get("steps")
    if _is_number(steps):
        return int(steps)
    epochs, batch = settings.get("epochs"), settings.get("batch_size")
    try:
        ledger = read_object(run.ledger, error=CheckpointError, strict=False).get("train")
    except CheckpointError:
        return None
    rows = ledger.get("rows") if isinstance(ledger, dict) else None
    if not (_is_number(epochs) and _is_number(batch) and _is_number(rows)) or batch < 1:
        return None
    return math.ceil(math.ceil(rows / batch) * epochs)


def perplexity_of(losses: events.HeldOutLosses) -> float | None:
    """exp(sum of losses / tokens); None if the event is damaged."""
    try:
        loss = math.fsum(unpack_floats(losses.nats)) / sum(unpack_counts(losses.tokens))
        return math.exp(loss)
    except (ValueError, ArithmeticError):
        return None


def _perplexities(found: Sequence[Event]) -> tuple[float | None, float | None]:
    """Held-out perplexity (before, after) training; after: of the last evaluation in a run that is not finished."""
    evaluation = events.last(found, events.Evaluation)
    rows: Sequence[ScoreRow] = evaluation.rows if evaluation else ()
    if rows and evaluation and evaluation.step == steps_done(found):
        return (rows[-2].perplexity if len(rows) > 1 else None), rows[-1].perplexity
    recorded = [losses for losses in events.only(found, events.HeldOutLosses) if not losses.ends_run]
    latest = events.last(found, events.HeldOut)
    return (perplexity_of(recorded[-1]) if recorded else None), (latest.perplexity if latest else None)


def _has_step(found: Sequence[Event]) -> bool:
    return bool(events.only(found, Step))


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
