"""A process that dies during a save, and a full disk: no checkpoint whose save returned is lost."""

from __future__ import annotations

import errno
import functools
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from octavo import atomic
from octavo.errors import CheckpointError
from octavo.runs import checkpoint, checkpoint_folder
from octavo.store import files


def save(folder: Path, step: int, *, keep: int = 2) -> Path:
    tensors = {"probe": {"count": torch.tensor(step)}, "optimizer": {"count": torch.tensor(step)}}

    def fill(adapter: Path) -> None:
        (adapter / "deep").mkdir()
        (adapter / "deep" / "step.txt").write_text(str(step))

    contents = checkpoint.Contents(tensors, {"step": step}, {"adapter": fill})
    return checkpoint.save(folder, step, contents, keep=keep)


def newest(folder: Path) -> checkpoint.Checkpoint:
    """The newest checkpoint, loaded without a warning and with all files from one save."""
    found = checkpoint.newest(folder, warn=pytest.fail)
    assert found is not None
    assert found.state == {"step": found.step}
    assert {int(group["count"]) for group in found.tensors.values()} == {found.step}
    assert (found.path / "adapter" / "deep" / "step.txt").read_text() == str(found.step)
    return found


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".tmp", ".old", ".latest"))]


def forked(child: Callable[[], None]) -> int:
    """Run `child` in a fork of this process: a fresh interpreter would import torch for seconds each time."""
    with warnings.catch_warnings():
        # Python 3.12 warns about forking with threads; the child runs no thread of torch.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    return pid


def save_until_killed(folder: Path, channel: int) -> None:
    found = checkpoint.newest(folder, warn=lambda _: None)
    step = found.step if found else 0
    while True:
        # Every step is saved twice, as a resumed run saves an existing step again.
        for _ in range(2):
            save(folder, step + 1)
            os.write(channel, (step + 1).to_bytes(4, "little"))
        step += 1


def test_kill_9_never_costs_an_acknowledged_checkpoint(tmp_path: Path) -> None:
    dice, save_seconds = random.Random(0), 0.02
    for _ in range(15):
        receive, send = os.pipe()
        pid = forked(functools.partial(save_until_killed, tmp_path, send))
        os.close(send)
        with os.fdopen(receive, "rb", buffering=0) as pipe:
            acknowledged = [pipe.read(4)]
            started = time.monotonic()
            acknowledged += [pipe.read(4) for _ in range(dice.randint(1, 2))]
            save_seconds = min(save_seconds, time.monotonic() - started)
            # Anywhere in the next save, whatever the speed of this machine.
            time.sleep(dice.uniform(0, 1.5 * save_seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            acknowledged += [pipe.readall()[-4:]]
        last = max(int.from_bytes(step, "little") for step in acknowledged)
        # What counts is before any clearing up, and the same again after it.
        assert newest(tmp_path).step >= last
        atomic.sweep(tmp_path)
        assert newest(tmp_path).step >= last
        assert leftovers(tmp_path) == []


def save_until_call(folder: Path, step: int, *, keep: int, calls: int) -> None:
    """Saves, but dies as by kill -9 just before the file operation number `calls`."""
    seen = 0

    def count(event: str, _: object) -> None:
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == calls:
                os._exit(9)

    sys.addaudithook(count)
    save(folder, step, keep=keep)


@pytest.mark.parametrize(("step", "keep"), [(2, 2), (3, 1)], ids=["replaced", "new, deleting the others"])
def test_death_before_any_file_operation_of_a_save_loses_nothing(step: int, keep: int, tmp_path: Path) -> None:
    save(tmp_path / "before", 1)
    save(tmp_path / "before", 2)
    for calls in range(1, 500):
        folder = tmp_path / str(calls)
        shutil.copytree(tmp_path / "before", folder)
        child = forked(functools.partial(save_until_call, folder, step, keep=keep, calls=calls))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert newest(folder).step >= 2
        atomic.sweep(folder)
        assert newest(folder).step >= 2
        assert leftovers(folder) == []
        if status == 0:
            break
    assert status == 0
    assert calls > 20, "the operations were not seen"
    assert newest(folder).step == step


def no_room(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PLACES = [
    (checkpoint, "durable_write"),
    (checkpoint, "save_file"),
    (checkpoint_folder, "durable_write"),
    (atomic, "durable_write"),
    (atomic, "fsync_file"),
    (atomic, "fsync_folder"),
    (atomic, "rename_over"),
]


@pytest.mark.parametrize(("module", "place"), PLACES, ids=lambda value: getattr(value, "__name__", value))
def test_a_full_disk_is_a_clear_error_and_keeps_earlier_checkpoints(
    module: ModuleType, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = {path: files.sha256_of(path) for path in tmp_path.rglob("step-*/**/*") if path.is_file()}
    monkeypatch.setattr(module, place, no_room)
    with pytest.raises(CheckpointError, match="the disk is full"):
        save(tmp_path, 3)
    assert {path: files.sha256_of(path) for path in before} == before
    assert leftovers(tmp_path) == []


def test_a_size_limit_reached_within_a_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    big = {"adapter": {"w": torch.zeros(20_000)}}  # 80 kB, and too small for torch to start threads

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        with pytest.raises(CheckpointError, match="cannot be written"):
            checkpoint.save(tmp_path, 2, checkpoint.Contents(big, {}))

    assert os.waitpid(forked(child), 0)[1] == 0
    assert newest(tmp_path).step == 1
    assert leftovers(tmp_path) == []
