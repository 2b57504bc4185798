"""The run folder of a configuration: held by one call, with its settings and its ledger."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from octavo.atomic import atomic_write
from octavo.commands.finetune.state import Run
from octavo.commands.push import readme_of
from octavo.config import Config, RunOptions, TrainingData
from octavo.errors import StoppedError
from octavo.failures import cut, explained
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder, held
from octavo.store.files import sha256_of
from octavo.store.hub_datasets import cached_file


@contextmanager
def run_folder(config: Config) -> Iterator[RunFolder]:
    """Locks the folder --out for one run, as `runs.folder.held`."""
    options = config[RunOptions]
    folder = RunFolder(options.out)
    startable = bool(config[TrainingData].data)
    with held(folder, settings=_settings(config), resume=options.resume, startable=startable):
        yield folder


@contextmanager
def failure_recorded(report: Report) -> Iterator[None]:
    """Records the error that ends the block; a signal is none. `octavo runs` shows such a run as failed."""
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        known = explained(error)
        text = known.message if known else f"{type(error).__name__}: {error}"
        with suppress(OSError):  # of a full disk: the error itself is what the user must see
            events.Failure(cut(text)).write(report)
        raise


def write_settings(run: Run) -> None:
    """Writes config.yaml and ledger.json. A resumed run calls this only after its state is loaded."""
    run.folder.write(settings=_settings(run.config), ledger=_ledgers(run))


def rewrite_lost_files(run: Run) -> None:
    """Writes files again that were deleted or moved during training, with a warning."""
    lost = [run.folder.metrics.name] if run.report.restore() else []
    lost += run.folder.restore(settings=_settings(run.config), ledger=_ledgers(run))
    if lost:
        run.report.warn(
            f"{', '.join(lost)} of {run.folder.path} {'were' if len(lost) > 1 else 'was'} deleted or moved during "
            "training and written again."
        )


def _settings(config: Config) -> str:
    """The content of config.yaml, without the options of this call alone."""
    return config.replace(resume=False, force=False, stop_after=None).to_yaml()


def _ledgers(run: Run) -> dict[str, Any]:
    """The content of ledger.json."""
    ledgers: dict[str, Any] = {"train": run.train.ledger.to_dict()}
    if run.test:
        ledgers["test"] = run.test.ledger.to_dict()
    for ledger in ledgers.values():
        for file in ledger["files"]:
            path = cached_file(file["source"], ledger["revisions"])
            file["sha256"] = _sha256(str(path) if path else file["source"])
    return ledgers


def _sha256(source: str) -> str | None:
    """The SHA-256 of a file of the data; None for one within an archive, and for one that is gone."""
    try:
        found = os.stat(source)
    except (OSError, ValueError):
        return None
    return _hashed(source, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _hashed(source: str, size: int, modified: int) -> str | None:
    try:
        return sha256_of(Path(source))
    except OSError:
        return None


def write_readme(run: Run) -> None:
    """Writes the model card of the adapter of a finished run again, with its results and data."""
    readme = readme_of(run.folder.path, run.folder.adapter)
    atomic_write(run.folder.adapter / "README.md", readme.encode("utf-8", "replace"))
