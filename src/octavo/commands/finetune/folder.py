"""The run folder: who may begin in it, what dead processes left, its settings, and what is restored if deleted."""

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
    """A run folder that this process holds. `fresh`: it held no run. `begun`: what is in it now is worth keeping."""

    path: Path
    fresh: bool
    begun: bool = False

    @property
    def metrics(self) -> Path:
        return self.path / METRICS


@contextmanager
def run_folder(config: Config) -> Iterator[RunFolder]:
    """Holds the folder --out for one run. UsageError if it holds another one and --resume is not given.

    The settings of a new run are written first, so that `--resume --out` is enough after a kill at any moment. If the
    run fails before it has begun, the folder is as it was: the same call, with the fault mended, must not meet a run.
    """
    options = config[RunOptions]
    _check(config)  # before anything is made
    existed = options.out.exists()
    with lock(options.out):
        _check(config)  # again: another process may have trained here until it let go of the lock
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
    """config.yaml and ledger.json; of a run that goes on, only once it is sure that it does."""
    folder.begun = True
    for name, content in _written(run).items():
        atomic_write(run.folder / name, content)


def restore(run: Run) -> None:
    """Writes anew what somebody deleted or moved away while the model was trained, and warns of it."""
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
            f"{', '.join(lost)} of {run.folder} {'were' if len(lost) > 1 else 'was'} deleted or moved while the model "
            "was trained, and written anew."
        )


def _check(config: Config) -> None:
    options = config[RunOptions]
    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out {options.out} is not a folder.", hint="Choose another path for the run's folder.")
    held = _run_in(options.out)
    if held and not options.resume:
        raise UsageError(
            f"{options.out} already holds a run ({', '.join(held)}).",
            hint="Go on with it with --resume, or choose another folder with --out.",
        )
    if options.resume and not held and not config[TrainingData].data:
        raise UsageError(
            f"{options.out} holds no run to go on with.",
            hint="Give the folder of a run with --out, or begin one: without --resume, with --data.",
        )


def _run_in(folder: Path) -> list[str]:
    """What makes a folder a run's: a checkpoint, an adapter, a recorded step. Before its first step it is none."""
    held = ["checkpoints"] if checkpoint.any_in(folder / "checkpoints") else []
    held += ["adapter"] if (folder / "adapter").exists() else []
    metrics = folder / METRICS
    if metrics.is_file() and any(event.get("event") == "step" for event in read_events(metrics)[0]):
        held.append(METRICS)
    return held


def _settings(config: Config) -> bytes:
    """config.yaml, without what holds for this call alone."""
    return config.replace(resume=False, force=False, stop_after=None).to_yaml().encode()


def _written(run: Run) -> dict[str, bytes]:
    ledgers = {"train": run.train.ledger.to_dict()}
    if run.test:
        ledgers["test"] = run.test.ledger.to_dict()
    return {SETTINGS: _settings(run.config), LEDGER: json_bytes(ledgers)}


def _clear(folder: Path, *, existed: bool) -> None:
    """Removes what this call made, as far as that is possible; the lock is still held."""
    for name in (METRICS, SETTINGS, LEDGER, ".lock"):
        with suppress(OSError):
            (folder / name).unlink()
    if not existed:
        with suppress(OSError):  # something else may have been put there
            folder.rmdir()
