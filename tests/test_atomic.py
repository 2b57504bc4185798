"""Atomic replacement of files and folders under failures, and cleanup after processes that died."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo import atomic
from octavo.atomic import atomic_write, new_folder, remove_folder, sweep
from octavo.failures import explained
from octavo.system import held_folder

OPERATIONS = ("force_to_disk", "fsync_file", "fsync_folder", "rename_over")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_file(folder: Path, text: bytes) -> None:
    atomic_write(folder / "x", text)


def write_folder(folder: Path, text: bytes) -> None:
    with new_folder(folder / "x", replace=True) as new:
        (new / "deep").mkdir()
        (new / "deep" / "y").write_bytes(text)
        (new / "z").write_bytes(text)


def fail_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the operation number `number` fail. Returns the list of operations called."""
    calls: list[str] = []

    def failing(name: str) -> Callable[..., object]:
        original = getattr(atomic, name)

        def operation(*arguments: object) -> object:
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*arguments)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(atomic, name, failing(name))
    return calls


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_failure_of_any_operation_leaves_the_old_or_the_new_content(
    write: Callable[[Path, bytes], None], tmp_path: Path
) -> None:
    number, outcomes = 0, set()
    while True:
        number += 1
        (folder := tmp_path / str(number)).mkdir()
        write(folder, b"old")
        old = files(folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(number, patch)
            try:
                write(folder, b"new")
            except OSError:
                assert set(files(folder).values()) in ({b"old"}, {b"new"})
                outcomes.add(calls[number - 1])
        assert files(folder).keys() == old.keys(), calls
        if len(calls) < number:
            break
    assert outcomes >= {"force_to_disk" if write is write_file else "fsync_file", "fsync_folder", "rename_over"}
    assert set(files(folder).values()) == {b"new"}


def test_an_error_has_the_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(1, monkeypatch)
    with pytest.raises(OSError, match="output error") as caught:
        atomic_write(tmp_path / "config.yaml", b"x")
    assert caught.value.filename == str(tmp_path / "config.yaml")


@pytest.mark.parametrize("fails", ["open", "library"])
def test_an_error_in_a_new_folder_has_the_target_name(fails: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        if fails == "library":
            raise Exception("cannot be saved: No space left on device (os error 28)")  # as tokenizers
        (folder / "no" / "y").write_bytes(b"")

    with pytest.raises(Exception, match=r"cannot be saved|No such file") as caught, new_folder(tmp_path / "x") as new:
        write(new)
    assert caught.value.filename == str(tmp_path / "x")  # type: ignore[attr-defined]
    error = explained(caught.value)
    assert error is not None
    assert error.message.startswith(f"{tmp_path / 'x'} cannot be read or written")


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("exists", [True, False], ids=["", "dangling"])
def test_a_link_remains_a_link(write: Callable[[Path, bytes], None], exists: bool, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    (run := tmp_path / "run").mkdir()
    if exists:
        write(disk, b"old")
    (run / "x").symlink_to(disk / "x")
    for _ in range(2):
        write(run, b"new")
    assert (run / "x").is_symlink()
    assert set(files(disk).values()) == {b"new"}
    assert [path.name for path in disk.iterdir()] == ["x"]
    assert [path.name for path in run.iterdir()] == ["x"]


@pytest.mark.parametrize("broken", ["a file", "a circle of links"])
def test_a_folder_does_not_replace_a_file(broken: str, tmp_path: Path) -> None:
    if broken == "a file":
        (tmp_path / "x").write_bytes(b"mine")
    else:
        (tmp_path / "x").symlink_to(tmp_path / "x")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        write_folder(tmp_path, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_replace_only_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with new_folder(tmp_path / "x") as new:
        (new / "y").touch()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "x") as new:
        (new / "z").touch()
    assert files(tmp_path) == {"x/y": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def dead_process_id() -> int:
    """The id of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_sweep_removes_only_leftovers_of_dead_processes(tmp_path: Path) -> None:
    dead_pid, alive = dead_process_id(), os.getppid()
    for name in (
        f".tmp-adapter-{dead_pid}",
        f".old-adapter-{dead_pid}",
        f".old-lost-{dead_pid}",
        f".tmp-q-{alive}",
        "adapter",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (locked_folder := tmp_path / f".tmp-held-{dead_pid}").mkdir()  # locked, as by a process in another container
    for name in (
        f".config.yaml.{dead_pid}",
        f".ledger.json.{os.getpid()}",
        f".report.html.{alive}",
        ".lock",
        ".hidden",
    ):
        (tmp_path / name).touch()
    with held_folder(locked_folder):
        removed = {path.name for path in sweep(tmp_path)}
    assert removed == {
        f".tmp-adapter-{dead_pid}",
        f".old-adapter-{dead_pid}",
        f".config.yaml.{dead_pid}",
        f".ledger.json.{os.getpid()}",
    }
    remaining = {path.name for path in tmp_path.iterdir()}
    assert remaining == {
        "adapter",
        "lost",
        locked_folder.name,
        f".tmp-q-{alive}",
        f".report.html.{alive}",
        ".lock",
        ".hidden",
    }
    assert sweep(tmp_path / "nowhere") == []


def test_a_writer_removes_leftovers_for_its_target(tmp_path: Path) -> None:
    dead_pid = dead_process_id()
    for name in (f".tmp-x-{dead_pid}", f".old-x-{dead_pid}", f".tmp-x-y-{dead_pid}"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path, b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"x", f".tmp-x-y-{dead_pid}"}


def test_a_folder_whose_check_fails_is_not_published(tmp_path: Path) -> None:
    write_folder(tmp_path, b"old")

    def check(folder: Path) -> None:
        assert files(folder) == {"y": b"new"}
        raise ValueError("read back differently")

    with pytest.raises(ValueError, match="differently"), new_folder(tmp_path / "x", replace=True, check=check) as new:
        (new / "y").write_bytes(b"new")
    assert set(files(tmp_path).values()) == {b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_removed_at_once_loses_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: None)  # as a kill before the first file is gone
        remove_folder(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == [f".tmp-x-{os.getpid()}"]
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
