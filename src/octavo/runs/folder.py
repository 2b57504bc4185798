"""The folder of a run: the names of its files, its lock, and the files that are not checkpoints.

run.json         the format version of the folder; written first
config.yaml      the settings, with which the run is resumed
ledger.json      the account of all tokens
metrics.jsonl    the events (runs/events.py)
checkpoints/     runs/checkpoint_folder.py
adapter/         the adapter that is kept, in PEFT's format
report.html      html_report
.lock            held by the process that trains here
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo._version import __version__
from octavo.atomic import atomic_write, sweep
from octavo.bounded_json import read_object
from octavo.errors import CheckpointError, UsageError
from octavo.runs import events
from octavo.runs.checkpoint_folder import candidates, finished, step_of
from octavo.store.files import check_format, json_bytes, lock

FORMAT = 1  # of all files of the folder that have no version of their own; increase it when one of them changes


@dataclass(frozen=True)
class RunFolder:
    """The folder at `path`, which need not exist."""

    path: Path

    @property
    def about(self) -> Path:
        return self.path / "run.json"

    @property
    def settings(self) -> Path:
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def search(self) -> Path:
        """The trials of `octavo tune`, which has a folder of its own."""
        return self.path / "trials.jsonl"

    @property
    def dry_run(self) -> Path:
        """Where the dry run writes its checkpoint."""
        return self.path / ".dry_run"

    def contents(self) -> list[str]:
        """The names of the files that make the folder a run: checkpoints, an adapter, metrics with a step.

        [] before the first step, and for a folder that is no run.
        """
        has_checkpoints = candidates(self.checkpoints) or (self.checkpoints.exists() and not self.checkpoints.is_dir())
        parts = [self.checkpoints] if has_checkpoints else []
        parts += [self.adapter] if self.adapter.exists() else []
        parts += [self.metrics] if events.only(events.read(self.metrics), events.Step) else []
        return [path.name for path in parts]

    def is_run(self) -> bool:
        """Whether the folder has parts of a run, also before its first step."""
        return self.about.exists() or self.adapter.exists() or bool(candidates(self.checkpoints))

    def steps(self) -> list[int]:
        """The steps with a checkpoint, in order. The checkpoints are not verified."""
        return sorted(step_of(path) for path in finished(self.checkpoints))

    def check_format(self) -> None:
        """CheckpointError if the folder was written in another format version. A folder without run.json is not."""
        if self.about.exists():
            found = read_object(self.about, error=CheckpointError).get("format")
            hint = "Use the octavo that wrote it, or choose another --out."
            check_format(found, FORMAT, where=self.path, error=CheckpointError, hint=hint)

    def write(self, *, settings: str, ledger: Mapping[str, Any]) -> None:
        """Writes config.yaml and ledger.json."""
        for path, content in self._files(settings, ledger).items():
            atomic_write(path, content)

    def restore(self, *, settings: str, ledger: Mapping[str, Any]) -> list[str]:
        """Writes the files of `write` that are missing. Returns their names."""
        missing = {path: content for path, content in self._files(settings, ledger).items() if not path.exists()}
        for path, content in missing.items():
            atomic_write(path, content)
        return [path.name for path in missing]

    def begin(self, settings: str) -> None:
        """Writes the files of a new run, so that `--resume --out` works after a kill at any time."""
        atomic_write(self.about, self._about())
        atomic_write(self.settings, settings.encode())

    def clear(self) -> None:
        """Removes the files of a run without a step, as far as possible."""
        for path in (self.metrics, self.settings, self.about, self.ledger, self.path / ".lock"):
            with suppress(OSError):
                path.unlink()

    def _files(self, settings: str, ledger: Mapping[str, Any]) -> dict[Path, bytes]:
        return {
            self.about: self._about(),
            self.settings: settings.encode(),
            self.ledger: json_bytes(dict(ledger)),
        }

    @staticmethod
    def _about() -> bytes:
        return json_bytes({"format": FORMAT, "octavo": __version__})


@contextmanager
def held(folder: RunFolder, *, settings: str, resume: bool, startable: bool) -> Iterator[None]:
    """Locks the folder for one run and removes the leftovers of killed processes.

    `settings` are those of a new run, which are written first. If a new run fails before its ledger is written, the
    folder is as before, so that a corrected call finds no run in it. UsageError if the folder contains another run and
    `resume` is not set, or no run to resume and no data to start one (`startable`).
    """
    check_usable(folder, resume=resume, startable=startable)  # before the folder is created
    existed = folder.path.exists()
    with lock(folder.path):
        check_usable(folder, resume=resume, startable=startable)  # another process may have trained here until now
        sweep(folder.path)
        sweep(folder.checkpoints)
        fresh = not folder.contents()
        new = fresh and not folder.settings.exists()
        try:
            if fresh:
                folder.begin(settings)
            yield
        except Exception:
            if new and not folder.ledger.exists() and not folder.contents():
                folder.clear()
                if not existed:
                    with suppress(OSError):  # it may contain other files
                        folder.path.rmdir()
            raise


def check_usable(folder: RunFolder, *, resume: bool, startable: bool) -> None:
    """UsageError unless a run can begin in the folder, or with `resume` go on (`held`). Changes nothing."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is not a folder.", hint="Choose another path for the run folder.")
    if folder.search.exists():
        raise UsageError(f"{path} contains a search of `octavo tune`.", hint="Choose another folder with --out.")
    contents = folder.contents()
    if contents and not resume:
        raise UsageError(
            f"{path} already contains a run ({', '.join(contents)}).",
            hint="Resume it with --resume, or choose another folder with --out.",
        )
    if resume and not contents and not startable:
        raise UsageError(
            f"{path} contains no run to resume.",
            hint="Name the folder of a run with --out, or start a new run: without --resume, with --data.",
        )
    folder.check_format()
