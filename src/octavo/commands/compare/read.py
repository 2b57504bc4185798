"""The runs that `octavo compare` gets: their settings, events and results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from octavo.bounded_json import read_object
from octavo.commands.run_summary import RunSummary, summary_of
from octavo.config.settings import read_settings
from octavo.errors import CheckpointError, UsageError
from octavo.html_report.chart import Points, smooth
from octavo.html_report.comparison import Curve
from octavo.reporting import read_events
from octavo.runs import events
from octavo.runs.adapter import NamedAdapter, adapter_folder
from octavo.runs.events import Event, HeldOutLosses, ScoreRow
from octavo.runs.folder import RunFolder

LEAST, MOST = 2, 8  # runs: more curves in a plot cannot be told apart


@dataclass(frozen=True)
class ReadRun:
    """A run with all of its events. `letter` stands for it in tables and plots."""

    letter: str
    name: str
    summary: RunSummary
    settings: Mapping[str, Any]
    events: Sequence[Event]
    training_tokens: int | None

    @property
    def losses(self) -> HeldOutLosses | None:
        """The held-out losses of the tuned model."""
        return next((one for one in reversed(events.only(self.events, HeldOutLosses)) if one.ends_run), None)

    @property
    def measured(self) -> HeldOutLosses | None:
        """Those losses, or in a run that is not finished those before training, which are of the same text."""
        return self.losses or events.last(self.events, HeldOutLosses)

    @property
    def rows(self) -> Sequence[ScoreRow]:
        """The perplexity table; () before the end of the run."""
        evaluation = events.last(self.events, events.Evaluation)
        return evaluation.rows if evaluation and self.summary.state == "finished" else ()

    @property
    def training(self) -> Points:
        """(step, training loss), of the steps with a finite loss."""
        return _finite((step.step, step.loss) for step in events.only(self.events, events.Step))

    @property
    def held_out(self) -> Points:
        """(step, held-out loss in nats per token), with that before training at step 0."""
        before = [one for one in events.only(self.events, HeldOutLosses) if not one.ends_run]
        first = (
            [(0, math.log(perplexity))] if before and (perplexity := self.summary.perplexity_before or 0) > 0 else []
        )
        return _finite([*first, *((one.step, one.loss) for one in events.only(self.events, events.HeldOut))])

    @property
    def train_loss(self) -> float | None:
        """The training loss at the end, smoothed as in the report."""
        return smooth(self.training)[-1][1] if self.training else None

    @property
    def training_seconds(self) -> float | None:
        """The time of all training steps together, without evaluations and checkpoints."""
        steps = events.only(self.events, events.Step)
        times = [one.tokens / one.tokens_per_second for one in steps if one.tokens and one.tokens_per_second]
        seconds = math.fsum(times)
        return seconds if 0 < seconds < math.inf else None

    @property
    def peak_memory_bytes(self) -> int | None:
        return max((one.peak_bytes or 0 for one in events.only(self.events, events.Memory)), default=None)

    def curve(self, scale: float = 1.0) -> Curve:
        """The loss curves; the held-out losses times `scale`, and no training losses if it is not 1."""
        held_out = [(step, scale * loss) for step, loss in self.held_out]
        return Curve(self.letter, self.training if scale == 1 else [], held_out)


def read_runs(folders: Sequence[str]) -> list[ReadRun]:
    """The runs in the order of `folders`; of RUN@STEP the run up to the checkpoint of this step.

    UsageError if they are too few or too many, or one is no run; AdapterError if a run has no such checkpoint.
    """
    if not LEAST <= len(folders) <= MOST:
        raise UsageError(
            f"octavo compare needs {LEAST} to {MOST} runs, not {len(folders)}.",
            hint="Name run folders: octavo compare runs/a runs/b. `octavo runs` lists them.",
        )
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise UsageError(f"{paths[number]} is given twice.", hint="Name different run folders.")
    names = short_names(resolved)
    return [_read(path, letter, name) for path, letter, name in zip(paths, ascii_uppercase, names, strict=False)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The name of each folder, with as many folders above it as are needed to tell all apart."""
    most = max(len(path.parts) for path in paths)
    for count in range(1, most):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(path: Path, letter: str, name: str) -> ReadRun:
    named = NamedAdapter.read(path)
    run, step = RunFolder(named.folder), named.step
    if step is not None:
        adapter_folder(path, say=_no_message, warn=_no_message)  # its errors, as for --adapter
    if not run.path.is_dir():
        raise UsageError(f"There is no folder {path}.", hint="`octavo runs` lists the run folders.")
    if not run.metrics.is_file():
        raise UsageError(
            f"{path} is no run with a step: it has no {run.metrics.name}.", hint="`octavo runs` lists the run folders."
        )
    run.check_format()
    settings = read_settings(run.settings) if run.settings.exists() else {}
    records, _ = read_events(run.metrics)
    if step is not None:
        records = [record for record in records if not events.is_recorded_again(record, step)]
    found = [event for record in records if (event := events.of_record(record)) is not None]
    times = [time for record in records if isinstance(time := record.get("time"), str)]
    summary = summary_of(run, settings, found, started=times[0] if times else None)
    if step is not None:
        summary = replace(summary, path=path, state="checkpoint", problem="")
    return ReadRun(letter, name, summary, settings, found, _training_tokens(run) if step is None else None)


def _no_message(_: str) -> None:
    """A checkpoint that is named by its step is found without a message."""


def _training_tokens(run: RunFolder) -> int | None:
    try:
        ledger = read_object(run.ledger, error=CheckpointError, strict=False).get("train")
    except CheckpointError:
        return None
    tokens = ledger.get("trained") if isinstance(ledger, dict) else None
    return tokens if type(tokens) is int else None


def _finite(pairs: Any) -> Points:
    return [(float(step), loss) for step, loss in pairs if loss is not None and math.isfinite(loss)]
