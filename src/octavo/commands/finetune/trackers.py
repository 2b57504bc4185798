"""The trackers of a run (`--track`) as observers of its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from octavo.commands.finetune.state import Run
from octavo.config import Config, RunOptions
from octavo.reporting import Report
from octavo.runs.folder import RunFolder
from octavo.store.hub_datasets import is_dataset
from octavo.tracking import Tracking

Observer = Callable[[Mapping[str, Any]], None]


@contextmanager
def tracked(config: Config, folder: RunFolder, report: Report, observer: Observer | None) -> Iterator[Tracking]:
    """Makes the trackers of a run and `observer` the observers of `report`, and ends the trackers with the block.

    UsageError if the library of a tracker is missing. `begin` starts them.
    """
    tracking = Tracking(config[RunOptions].track, folder.path, report)

    def observe(record: Mapping[str, Any]) -> None:
        if observer is not None:
            observer(record)
        tracking.observe(record)

    report.observer = observe
    finished = False
    try:
        yield tracking
        finished = True
    finally:
        tracking.close(finished=finished)


def begin(tracking: Tracking, run: Run) -> None:
    """Starts the trackers with the settings of a prepared run. Paths are sent as names, without their folders."""
    settings: dict[str, Any] = {}
    for kind in run.config.kinds:
        settings |= run.config[kind].model_dump(mode="json")
    for option in ("data", "test_data"):
        settings[option] = [path if is_dataset(path) else PurePath(path).name for path in settings[option]]
    settings["out"] = PurePath(settings["out"]).name
    if PurePath(settings["model"]).is_absolute():
        settings["model"] = PurePath(settings["model"]).name
    tracking.begin(settings, done=run.state.done)
