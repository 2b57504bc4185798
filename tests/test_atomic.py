"""Every file and folder is replaced as a whole, whatever fails and whenever; what dead writers left is swept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo import atomic
from octavo.atomic import atomic_write, new_folder, sweep
from octavo.failures import explained
from octavo.system import held_folder

OPERATIONS = ("force_to_disk", "fsync_file", "fsync_folder", "rename_over")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_file(folder: Path, text: bytes) -> None:
    atomic_write(folder / "x", text)


def write_folder(folder: Path, text: bytes) -> None:
    with new_folder(folder / "x", replace=True) as made:
        (made / "deep").mkdir()
        (made / "deep" / "y").write_bytes(text)
        (made / "z").write_bytes(text)


def fail_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has the operation number `number` of the writers fail; the operations that were seen."""
    seen: list[str] = []

    def failing(name: str) -> Callable[..., object]:
        real = getattr(atomic, name)

        def operation(*arguments: object) -> object:
            seen.append(name)
            if len(seen) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(atomic, name, failing(name))
    return seen


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_whichever_operation_fails_there_is_the_old_or_the_new_and_nothing_else(
    write: Callable[[Path, bytes], None], tmp_path: Path
) -> None:
    number, outcomes = 0, set()
    while True:
        number += 1
        (folder := tmp_path / str(number)).mkdir()
        write(folder, b"old")
        before = files(folder)
        with pytest.MonkeyPatch.context() as patch:
            seen = fail_at(number, patch)
            try:
                write(folder, b"new")
            except OSError:
                assert set(files(folder).values()) in ({b"old"}, {b"new"})
                outcomes.add(seen[number - 1])
        assert files(folder).keys() == before.keys(), seen
        if len(seen) < number:
            break
    assert outcomes >= {"force_to_disk" if write is write_file else "fsync_file", "fsync_folder", "rename_over"}
    assert set(files(folder).values()) == {b"new"}


def test_an_error_names_the_file_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(1, monkeypatch)
    with pytest.raises(OSError, match="output error") as caught:
        atomic_write(tmp_path / "config.yaml", b"x")
    assert caught.value.filename == str(tmp_path / "config.yaml")


@pytest.mark.parametrize("fails", ["open", "library"])
def test_an_error_within_a_new_folder_names_its_place(fails: str, tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        if fails == "library":
            raise Exception("cannot be saved: No space left on device (os error 28)")  # as tokenizers
        (folder / "no" / "y").write_bytes(b"")

    with pytest.raises(Exception, match=r"cannot be saved|No such file") as caught, new_folder(tmp_path / "x") as made:
        write(made)
    assert caught.value.filename == str(tmp_path / "x")  # type: ignore[attr-defined]
    found = explained(caught.value)
    assert found is not None
    assert found.message.startswith(f"{tmp_path / 'x'} cannot be read or written")


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("exists", [True, False], ids=["", "dangling"])
def test_a_link_to_another_place_stays_a_link(
    write: Callable[[Path, bytes], None], exists: bool, tmp_path: Path
) -> None:
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
def test_what_is_no_folder_is_not_replaced_by_one(broken: str, tmp_path: Path) -> None:
    if broken == "a file":
        (tmp_path / "x").write_bytes(b"mine")
    else:
        (tmp_path / "x").symlink_to(tmp_path / "x")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        write_folder(tmp_path, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_replace_only_an_empty_folder_gives_way(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with new_folder(tmp_path / "x") as made:
        (made / "y").touch()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "x") as made:
        (made / "z").touch()
    assert files(tmp_path) == {"x/y": b""}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def dead() -> int:
    """The number of a process that is no more."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    gone, alive = dead(), os.getppid()
    for name in (f".tmp-adapter-{gone}", f".old-adapter-{gone}", f".old-lost-{gone}", f".tmp-q-{alive}", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    (held := tmp_path / f".tmp-held-{gone}").mkdir()  # by a process of another container, as its lock says
    for name in (f".config.yaml.{gone}", f".ledger.json.{os.getpid()}", f".report.html.{alive}", ".lock", ".hidden"):
        (tmp_path / name).touch()
    with held_folder(held):
        removed = {path.name for path in sweep(tmp_path)}
    assert removed == {
        f".tmp-adapter-{gone}",
        f".old-adapter-{gone}",
        f".config.yaml.{gone}",
        f".ledger.json.{os.getpid()}",
    }
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"adapter", "lost", held.name, f".tmp-q-{alive}", f".report.html.{alive}", ".lock", ".hidden"}
    assert sweep(tmp_path / "nowhere") == []


def test_a_writer_clears_up_after_dead_ones_at_its_own_place(tmp_path: Path) -> None:
    gone = dead()
    for name in (f".tmp-x-{gone}", f".old-x-{gone}", f".tmp-x-y-{gone}"):
        (tmp_path / name).mkdir()
    write_folder(tmp_path, b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"x", f".tmp-x-y-{gone}"}
