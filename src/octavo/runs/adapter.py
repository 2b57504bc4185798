"""The adapter folder that `--adapter` names, everywhere an adapter is taken.

FOLDER      an adapter in PEFT's format
RUN         a run: the adapter that it keeps, or that of its newest checkpoint as long as it has none
RUN@STEP    the adapter of one of its checkpoints
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import AdapterError, CheckpointError
from octavo.runs import events
from octavo.runs.checkpoint_folder import folder_of, newest_valid, step_of, verify
from octavo.runs.folder import RunFolder
from octavo.store import peft
from octavo.store.peft import Adapter
from octavo.store.peft_config import CONFIG
from octavo.system import own_command, quoted

_AT_STEP = re.compile(r"(?P<run>.*[^.].*)@(?P<step>[0-9]{1,12})")  # the name of a folder is not "." or ".."
_STEP_ALONE = re.compile(r"@(?P<step>[0-9]{1,12})")
ADAPTER = "adapter"  # the folder in a checkpoint


@dataclass(frozen=True)
class NamedAdapter:
    """What a path names: a folder, and in a run the step of a checkpoint."""

    folder: Path
    step: int | None = None

    @classmethod
    def read(cls, path: Path) -> NamedAdapter:
        """RUN@STEP as a run and a step; a folder that exists under that name is the folder itself."""
        if os.path.exists(path):  # unlike Path.exists, False for a name that is too long
            return cls(path)
        if match := _STEP_ALONE.fullmatch(path.name):
            return cls(path.parent, int(match["step"]))  # RUN/@STEP
        if match := _AT_STEP.fullmatch(path.name):
            return cls(path.with_name(match["run"]), int(match["step"]))
        return cls(path)


def read_adapter(path: Path, *, find: Callable[[Path], Path], allow_pickle: bool = False) -> tuple[Path, Adapter]:
    """(folder, adapter) that `path` names. `find` is `adapter_folder`, with checks of the caller.

    A run that trains deletes old checkpoints, possibly between finding one and reading it: then the newest one is found
    and read, once.
    """
    folder = find(path)
    try:
        return folder, peft.read(folder, allow_pickle=allow_pickle)
    except (AdapterError, OSError):
        if os.path.exists(folder) or folder == path:
            raise
    folder = find(path)
    return folder, peft.read(folder, allow_pickle=allow_pickle)


def adapter_folder(path: Path, *, say: Callable[[str], None], warn: Callable[[str], None]) -> Path:
    """The folder in PEFT's format that `path` names; a path that names no run is returned as it is.

    `say` is told if it is that of a run's newest checkpoint, `warn` of damaged checkpoints. AdapterError if there is no
    such run or checkpoint, if the run has no adapter yet, and for a run or a checkpoint of another format version.
    """
    named = NamedAdapter.read(path)
    run = RunFolder(named.folder)
    try:
        if named.step is not None:
            return _of_step(run, named.step)
        if (run.path / CONFIG).is_file() or not run.is_run():
            _check_step(path)
            return run.path
        run.check_format()
        if (run.adapter / CONFIG).is_file():
            return run.adapter
        newest = newest_valid(run.checkpoints, warn=warn)
    except CheckpointError as error:
        raise AdapterError(error.message, hint=error.hint) from error
    if newest is None:
        raise _without_adapter(run)
    say(f"The run {run.path} has no adapter yet: that of its newest checkpoint, step {step_of(newest):,}, is used.")
    return newest / ADAPTER


def _without_adapter(run: RunFolder) -> AdapterError:
    """The error for a run that has neither an adapter nor a checkpoint: it trains now, was killed, or failed."""
    step = events.last(events.read(run.metrics), events.Step)
    done = f"its last recorded step is {step.step:,}" if step else "it has done no step"
    command = f"{own_command()} finetune --resume {quoted(['--out', run.path])}"
    return AdapterError(
        f"The run {run.path} has no adapter and no checkpoint yet: {done}.",
        hint=f"If it trains now, wait for its first checkpoint. If it has ended, `{command}` starts it from the "
        "beginning. If an error ended it, remove its cause first: the same settings fail again.",
    )


def _check_step(path: Path) -> None:
    """AdapterError for a path like RUN@ or RUN@-1: after the name of a run and @ comes no step."""
    name, at, step = path.name.rpartition("@")
    run = RunFolder(path.with_name(name) if name.strip(".") else path.parent)
    if at and not os.path.exists(path) and os.path.isdir(run.path) and run.is_run():
        steps = run.steps()
        example = f"{run.path}@{steps[-1] if steps else 100}"
        raise AdapterError(
            f"{path} names no checkpoint: {step!r} after @ is no step.",
            hint=f"Give a step, as {example}. {_checkpoints(steps)}",
        )


def _of_step(run: RunFolder, step: int) -> Path:
    """The adapter of the checkpoint of `step`."""
    if not run.path.is_dir():
        raise AdapterError(f"There is no run {run.path}.", hint="Give the folder of a run before @.")
    run.check_format()
    steps = run.steps()
    if step not in steps:
        raise AdapterError(
            f"The run {run.path} has no checkpoint of step {step:,}.",
            hint=f"{_checkpoints(steps)} `octavo finetune --keep-checkpoints` sets how many are kept.",
        )
    path = folder_of(run.checkpoints, step)
    if problems := verify(path):
        raise AdapterError(
            f"The checkpoint {path} is damaged: {problems[0]}.",
            hint=_checkpoints(steps),
        )
    return path / ADAPTER


def _checkpoints(steps: list[int]) -> str:
    return f"The run has checkpoints of the steps {_listed(steps)}." if steps else "The run has no checkpoint."


def _listed(steps: list[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps)
