"""The run folder: lock, cleanup after killed processes, settings, and restoration of deleted files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from octavo.atomic import atomic_write, sweep
from octavo.commands.finetune.state import Run
from octavo.config import Config, RunOptions, TrainingData
from octavo.errors import UsageError
from octavo.reporting import read_events
from octavo.store import checkpoint
from octavo.store.files import json_bytes, lock

METRICS, SETTINGS, LEDGER = "metrics.jsonl", "config.yaml", "ledger.json"


@dataclass
class RunFolder:
    """A run folder locked by this process.

    `fresh`: it contained no run before. `begun`: this run has started, so its files are kept after an error.
    """

    path: Path
    fresh: bool
    begun: bool = False

    @property
    def metrics(self) -> Path:
        return self.path / METRICS


@contextmanager
def run_folder(config: Config) -> Iterator[RunFolder]:
    """Locks the folder --out for one run. UsageError if it contains another run and --resume is not given.

    The settings of a new run are written first, so that `--resume --out` works after a kill at any time. If the run
    fails before it has started, the folder is restored, so that a corrected call finds no run in it.
    """
    options = config[RunOptions]
    _check(config)  # before the folder is created
    existed = options.out.exists()
    with lock(options.out):
        _check(config)  # again: another process may have trained here until it released the lock
        sweep(options.out)
        checkpoint.sweep(options.out / "checkpoints")
        folder = RunFolder(options.out, fresh=not _run_in(options.out))
        killed_before = (options.out / SETTINGS).exists()
        try:
            if folder.fresh:
                atomic_write(options.out / SETTINGS, _settings(config))
            yield folder
        except Exception:
            if folder.fresh and not folder.begun and not killed_before:
                _clear(options.out, existed=existed)
            raise


def write_settings(run: Run, folder: RunFolder) -> None:
    """Writes config.yaml and ledger.json. A resumed run calls this only after its state is loaded."""
    folder.begun = True
    for name, content in _written(run).items():
        atomic_write(run.folder / name, content)


def restore(run: Run) -> None:
    """Writes files again that were deleted or moved during training, with a warning."""
    lost = []
    if run.report.restore():
        lost.append(METRICS)
    missing = [name for name in (SETTINGS, LEDGER) if not (run.folder / name).exists()]
    if missing:
        content = _written(run)
        for name in missing:
            atomic_write(run.folder / name, content[name])
    lost += missing
    if lost:
        run.report.warn(
            f"{', '.join(lost)} of {run.folder} {'were' if len(lost) > 1 else 'was'} deleted or moved during training "
            "and written again."
        )


def _check(config: Config) -> None:
    options = config[RunOptions]
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out} is not a folder.", hint="Choose another path for the run folder.")
    files = _run_in(options.out)
    if files and not options.resume:
        raise UsageError(
            f"{options.out} already contains a run ({', '.join(files)}).",
            hint="Resume it with --resume, or choose another folder with --out.",
        )
    if options.resume and not files and not config[TrainingData].data:
        raise UsageError(
            f"{options.out} contains no run to resume.",
            hint="Name the folder of a run with --out, or start a new run: without --resume, with --data.",
        )


def _run_in(folder: Path) -> list[str]:
    """The files that make a folder a run: checkpoints, an adapter, metrics with a step. [] before the first step."""
    files = ["checkpoints"] if checkpoint.any_in(folder / "checkpoints") else []
    files += ["adapter"] if (folder / "adapter").exists() else []
    metrics = folder / METRICS
    if metrics.is_file() and any(event.get("event") == "step" for event in read_events(metrics)[0]):
        files.append(METRICS)
    return files


def _settings(config: Config) -> bytes:
    """The content of config.yaml, without the options of this call alone."""
    return config.replace(resume=False, force=False, stop_after=None).to_yaml().encode()


def _written(run: Run) -> dict[str, bytes]:
    ledgers = {"train": run.train.ledger.to_dict()}
    if run.test:
        ledgers["test"] = run.test.ledger.to_dict()
    return {SETTINGS: _settings(run.config), LEDGER: json_bytes(ledgers)}


def _clear(folder: Path, *, existed: bool) -> None:
    """Removes the files of this call as far as possible, while the lock is still held."""
    for name in (METRICS, SETTINGS, LEDGER, ".lock"):
        with suppress(OSError):
            (folder / name).unlink()
    if not existed:
        with suppress(OSError):  # it may contain other files
            folder.rmdir()
