"""A run folder in Python: its events, metrics and results, and its report in a notebook."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from octavo import html_report
from octavo.api.loading import load
from octavo.api.results import Copies, Difference, FinetuneResult, Forgot, Learned, NamedScore, Verdict
from octavo.bounded_json import shortened
from octavo.config import ModelOptions
from octavo.config.settings import read_settings
from octavo.errors import UsageError
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder
from octavo.runs.probe_sentences import probe_results
from octavo.runs.verdict import verdict_of

if TYPE_CHECKING:
    from octavo.api.language_model import LanguageModel

REPORT_PIXELS = 640  # height of the report in a notebook; it scrolls


class Run:
    """A run: what `octavo.finetune` returns, and `octavo.Run("runs/mine")` for the folder of an earlier one.

    A notebook shows its report. Attributes are read when the run is opened. UsageError for a folder without a run.

    out: the folder. adapter: the folder of the adapter; None if the run stopped before its last step. report:
    report.html. steps: those that are done. train_loss: the loss of the last one, in nats a token. best_step: the
    step of the adapter, if held-out text chose it. stopped_early: why --early-stop ended the run, if it did. rows,
    differences: the table of scores (octavo.api.results). verdict: what the held-out text shows, in sentences
    (octavo.runs.verdict). learned, forgot, copies: cloze probes, the general text, and verbatim copies
    (octavo.api.results). held_out: the overlap of held-out and training text. peak_memory_bytes: of the last call.
    settings: all options of the run. events: all events in order (octavo.runs.events).
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        if not isinstance(out, str | os.PathLike):
            raise UsageError(f"out: must be a path, not {shortened(repr(out))}.", hint="Name the folder of a run.")
        folder = RunFolder(Path(out))
        if not folder.is_run():
            raise UsageError(f"{folder.path} contains no run.", hint="Name the folder of `out`, such as runs/mine.")
        folder.check_format()
        self.out, self.report = folder.path, folder.report
        self.events: list[events.Event] = events.read(folder.metrics)
        steps = events.only(self.events, events.Step)
        self.steps: int = steps[-1].step if steps else 0
        self.train_loss: float | None = steps[-1].loss if steps else None
        evaluation = events.last(self.events, events.Evaluation)
        finished = evaluation is not None and evaluation.step == self.steps and folder.adapter.exists()
        self.adapter: Path | None = folder.adapter if finished else None
        self.rows = [cast(NamedScore, row.to_dict()) for row in evaluation.rows] if evaluation else []
        self.differences = [cast(Difference, asdict(one)) for one in evaluation.differences] if evaluation else []
        overlap = events.last(self.events, events.Overlap)
        self.held_out: dict[str, Any] | None = asdict(overlap) if overlap else None
        stop = events.last(self.events, events.EarlyStop)
        self.stopped_early: str | None = stop.reason if stop and stop.step == self.steps else None
        memory = events.last(self.events, events.Memory)
        self.peak_memory_bytes: int = (memory and memory.peak_bytes) or 0
        self.verdict = verdict_of(self.events if finished else [])
        probed = probe_results(self.events if finished else [])
        self.learned, self.forgot = cast(Learned | None, probed["learned"]), cast(Forgot | None, probed["forgot"])
        self.copies = cast(Copies | None, probed["copies"])
        self.settings: dict[str, Any] = _settings(folder.settings)
        kept = self.settings.get("keep", "best") == "best"
        self.best_step: int | None = _best_step(events.only(self.events, events.HeldOut)) if kept else None

    def __repr__(self) -> str:
        return f"Run({os.fspath(self.out)!r}: {html_report.summary(self.events)})"

    def _repr_html_(self) -> str:
        """The report in a frame of its own, for notebooks; without one the text of `repr`."""
        if not self.report.is_file():
            return f"<pre>{escape(repr(self))}</pre>"
        page = escape(self.report.read_text("utf-8", "replace"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: {REPORT_PIXELS}px; border: 0"></iframe>'

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A row for each step, for a table or a plot: its Step event, and held_out_loss and held_out_perplexity.

        The held-out columns are None at steps without an evaluation. A row of step 0 has the evaluation before
        training, if there was one.
        """
        held_out = {event.step: event for event in events.only(self.events, events.HeldOut)}
        steps = {event.step: event for event in events.only(self.events, events.Step)}
        rows = []
        for number in sorted(steps.keys() | held_out.keys()):
            measured = held_out.get(number)
            values = asdict(steps.get(number) or events.Step(number))
            values["held_out_loss"] = measured.loss if measured else None
            values["held_out_perplexity"] = measured.perplexity if measured else None
            rows.append(values)
        return rows

    def load(self, **options: Any) -> LanguageModel:
        """`octavo.load` of the model with the adapter of this run, in the run's scheme and dtype.

        A run that stopped gives the adapter of its newest checkpoint. `options` are those of `octavo.load`.
        """
        named = {name: self.settings[name] for name in ModelOptions.model_fields if name in self.settings}
        return load(**{**named, "adapter": self.out, **options})

    def to_dict(self) -> FinetuneResult:
        """The document of `octavo finetune --json`."""
        return {
            "out": str(self.out),
            "adapter": str(self.adapter) if self.adapter else None,
            "report": str(self.report),
            "steps": self.steps,
            "train_loss": self.train_loss,
            "best_step": self.best_step,
            "stopped_early": self.stopped_early,
            "rows": self.rows,
            "differences": self.differences,
            "verdict": cast(Verdict, self.verdict.to_dict()),
            "learned": self.learned,
            "forgot": self.forgot,
            "copies": self.copies,
            "held_out": self.held_out,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def watched(on_event: Callable[[events.Event], object], report: Report) -> Callable[[Mapping[str, Any]], None]:
    """The observer of `report` that calls `on_event` with each event; after an exception it warns, and calls no more.

    An error in what only looks on must not end hours of training. A KeyboardInterrupt is not caught.
    """
    failed = False

    def observe(record: Mapping[str, Any]) -> None:
        nonlocal failed
        event = None if failed else events.of_record(record)
        if event is None:
            return
        try:
            on_event(event)
        except Exception as error:
            failed = True
            report.warn(f"on_event raised {type(error).__name__}: {error}. It is not called again; the run goes on.")

    return observe


def _best_step(measured: list[events.HeldOut]) -> int | None:
    """The step with the lowest held-out loss after training began, the first of several."""
    losses = [(event.loss, event.step) for event in measured if event.step > 0 and event.loss is not None]
    finite = [each for each in losses if math.isfinite(each[0])]
    return min(finite)[1] if finite else None


def _settings(path: Path) -> dict[str, Any]:
    """The options of a run; {} if the file is missing or damaged."""
    try:
        return read_settings(path)
    except UsageError:
        return {}
