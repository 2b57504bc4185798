"""Sends the events of a run to experiment trackers: tensorboard, wandb, mlflow, trackio (`--track`).

points.py    events as named numbers and texts of a step
writers.py   one class a tracker; its library is imported when it is started
sender.py    a thread a tracker, so that a slow or failing network does not stop training
state.py     trackers.json of the run folder: the run's id in each tracker, and what it did not get

A point is sent once. A resumed run records the steps after its checkpoint again: a tracker that has a point of that
step and name keeps it, and TensorBoard drops what it has after the checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octavo.errors import UsageError
from octavo.failures import explained
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder
from octavo.tracking.points import Point, Points
from octavo.tracking.sender import Sender, without_secrets
from octavo.tracking.state import TrackerState, read_states, write_states
from octavo.tracking.writers import TRACKERS as TRACKERS
from octavo.tracking.writers import Start, Tracker, quiet

CLOSE_SECONDS = 60.0  # that the end of a run waits for a tracker


def check_trackers(names: Sequence[str]) -> None:
    """UsageError if the library of a tracker is not installed. Imports nothing."""
    for name in names:
        if find_spec(TRACKERS[name].module) is None:
            raise UsageError(
                f"--track {name} needs the package {TRACKERS[name].module}, which is not installed.",
                hint=f"pip install 'octavo[{name}]', or leave out --track {name}.",
            )


class Tracking:
    """The trackers of one call of a run. `observe` gets each event; `begin` starts the trackers, `close` ends them.

    Made before a resumed run drops the events after its checkpoint: they were sent.
    """

    def __init__(self, names: Sequence[str], folder: Path, report: Report) -> None:
        check_trackers(names)
        self._names, self._folder, self._report = list(dict.fromkeys(names)), folder, report
        self._points, self._senders = Points(), dict[str, Sender]()
        self._states: dict[str, TrackerState] = read_states(folder) if names else {}
        self._recorded: set[tuple[str, int]] = set()  # that earlier calls recorded
        self._saving = threading.Lock()
        self._sent: dict[str, set[tuple[str, int]]] = {}
        if names:
            for point in self._points.of(events.read(RunFolder(folder).metrics)):
                self._recorded |= point.keys

    def begin(self, settings: Mapping[str, Any], *, done: int) -> None:
        """Starts the trackers after a run of `done` steps is prepared, and sends the recorded points they lack.

        UsageError if one cannot start: nothing was trained.
        """
        if not self._names:
            return
        self._points = Points()
        kept = self._points.of(events.read(RunFolder(self._folder).metrics))
        for name in self._names:
            kind, state = TRACKERS[name], self._states.get(name)
            self._sent[name] = state.sent(self._recorded) if state else set()
            if kind.rewinds:  # it drops what it has after `done`
                self._sent[name] = {(tag, step) for tag, step in self._sent[name] if step <= done}
            tracker = self._started(kind, Start(self._folder, dict(settings), state.id if state else None, done))
            self._states[name] = TrackerState(tracker.id, state.unsent_step if state else None)
            self._senders[name] = Sender(name, tracker, on_change=self._save)
        self._save()
        for point in kept:
            self._put(point)
        self._report.say(f"Tracked by {', '.join(self._where())}.")

    def observe(self, record: Mapping[str, Any]) -> None:
        """Sends the event of one recorded line, if it has a point."""
        if not self._senders:
            return
        event = events.of_record(record)
        if event is not None:
            for point in self._points.of([event], time=record.get("time")):
                self._put(point)
        if isinstance(event, events.Evaluation):
            for point in self._points.verdict(events.read(RunFolder(self._folder).metrics), event):
                self._put(point)
        for sender in self._senders.values():
            if problem := sender.new_problem():
                self._report.warn(f"{sender.name} gets no data ({problem}). The run goes on, and tries again.")

    def close(self, *, finished: bool) -> None:
        """Waits until all points are sent, at most CLOSE_SECONDS; warns of those that are not."""
        if not self._senders:
            return
        waiting = [sender for sender in self._senders.values() if sender.waiting]
        if waiting:
            self._report.say(f"Sending the last points to {', '.join(sender.name for sender in waiting)}.")
        for sender in self._senders.values():
            sender.stop(finished=finished)
        for sender in self._senders.values():
            if left := sender.join(CLOSE_SECONDS):
                points = f"{left:,} point{'s' * (left != 1)} of step {sender.unsent_step} and later"
                self._report.warn(
                    f"{sender.name} did not get {points}{f' ({sender.problem})' if sender.problem else ''}. They are "
                    f"in {RunFolder(self._folder).metrics}; a call with --resume sends them."
                )
            elif sender.problem and sender.failed_to_close:
                self._report.warn(f"{sender.name} got all points, but its run could not be ended ({sender.problem}).")
        self._save()
        self._senders.clear()

    def _started(self, kind: type[Tracker], start: Start) -> Tracker:
        try:
            with quiet():
                return kind(start)
        except Exception as error:  # of any class: the libraries have their own
            known = explained(error)
            reason = known.message if known else f"{type(error).__name__}: {error}"
            raise UsageError(
                f"--track {kind.name} could not start: {without_secrets(reason)}",
                hint=f"{kind.hint} Nothing was trained. Call again, without {kind.name} in --track if it is not to be "
                "used.",
            ) from error

    def _put(self, point: Point) -> None:
        for name, sender in self._senders.items():
            if rest := point.without(self._sent[name]):
                self._sent[name] |= rest.keys
                sender.put(rest)

    def _where(self) -> list[str]:
        return [f"{sender.name} ({where})" if (where := sender.where) else sender.name for sender in
                self._senders.values()]  # fmt: skip

    def _save(self) -> None:
        with self._saving:  # the senders' threads call it too
            for name, sender in list(self._senders.items()):
                self._states[name] = TrackerState(self._states[name].id, sender.unsent_step)
            write_states(self._folder, self._states)
