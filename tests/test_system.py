"""Locks, renaming and memory on Windows: fcntl and resource are hidden, stubs replace the Windows calls."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo import hardware, system
from octavo.errors import CheckpointError
from octavo.hardware import memory
from octavo.store import files

POSIX_ONLY = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline")
POSIX_CALLS = (
    "fork",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "sync",
    "statvfs",
    "sysconf",
    "getuid",
    "geteuid",
)


def _ofd_lock(descriptor: int, kind: int) -> None:
    """Locks the byte at the file position for this descriptor, as msvcrt does."""
    import struct

    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    fcntl.fcntl(descriptor, 37, struct.pack("hhqqi4x", kind, os.SEEK_SET, position, 1, 0))  # F_OFD_SETLK


def _msvcrt() -> SimpleNamespace:
    def locking(descriptor: int, mode: int, count: int) -> None:
        assert count == 1
        _ofd_lock(descriptor, fcntl.F_UNLCK if mode == 0 else fcntl.F_WRLCK)

    return SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0)


@pytest.fixture(params=["msvcrt", "neither"])
def hide_posix(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the modules and functions that only POSIX has; with or without a stub of msvcrt."""
    for name in POSIX_ONLY:
        monkeypatch.setitem(sys.modules, name, None)
    for name in POSIX_CALLS:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "msvcrt", _msvcrt() if request.param == "msvcrt" else None)


def test_a_second_lock_fails_and_names_the_holder_without_fcntl(hide_posix: None, tmp_path: Path) -> None:
    for _ in range(2):
        with files.lock(tmp_path):
            for _ in range(2):
                with pytest.raises(CheckpointError, match=f"pid {os.getpid()}"), files.lock(tmp_path):
                    pass
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_waiting_for_a_lock_without_fcntl(hide_posix: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with files.lock(tmp_path) as _, pytest.MonkeyPatch.context() as patch:
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                raise KeyboardInterrupt

        patch.setattr(time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt), files.lock(tmp_path, wait=True):
            pass
    assert len(waits) == 3
    with files.lock(tmp_path, wait=True):
        pass


def test_a_pid_lock_of_a_dead_process_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in ("fcntl", "msvcrt"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / ".lock.pid").write_text(str(dead.pid))
    with files.lock(tmp_path):
        assert (tmp_path / ".lock.pid").read_text() == str(os.getpid())


def test_writing_files_and_folders_without_fcntl(hide_posix: None, tmp_path: Path) -> None:
    files.write_json_atomically(tmp_path / "a.json", {"a": 1})
    files.write_json_atomically(tmp_path / "a.json", {"a": 2})
    files.fsync_file(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    with files.new_folder(tmp_path / "out") as first:
        (first / "weights").write_bytes(b"1")
        with files.new_folder(tmp_path / "out2"):
            assert first.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "out", "out2"]


def test_sweep_keeps_locked_folders_without_fcntl(hide_posix: None, tmp_path: Path) -> None:
    (leftover := tmp_path / ".tmp-out-1").mkdir()
    (tmp_path / ".tmp-out-2.lock").touch()
    (locked_folder := tmp_path / ".tmp-out-3").mkdir()
    with system.held_folder(locked_folder) as locked:
        assert locked
        with files.new_folder(tmp_path / "out"):
            assert locked_folder.is_dir()
            assert not leftover.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-out-3", "out"]


def test_windows_rename_replaces_an_empty_folder_and_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "WINDOWS", True)
    errors = [PermissionError(13, "in use"), PermissionError(13, "in use")]
    original_replace = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if errors:
            raise errors.pop()
        assert not target.is_dir()
        return original_replace(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    (tmp_path / "out").mkdir()
    system.rename_over(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out" / "file").exists()
    errors += [PermissionError(13, "in use")] * 99
    with pytest.raises(PermissionError):
        system.rename_over(tmp_path / "out", tmp_path / "again")


class FakeKernel32:
    """A stub of kernel32: process 7 is running, process 8 has ended but can still be opened."""

    GetCurrentProcess: Any

    def __init__(self) -> None:
        self.open: list[int] = []
        self.GetCurrentProcess = lambda: -1

    def OpenProcess(self, access: int, inherit: bool, pid: int) -> int:  # noqa: N802
        if pid not in (7, 8):
            return 0
        self.open.append(pid)
        return pid

    def WaitForSingleObject(self, handle: Any, milliseconds: int) -> int:  # noqa: N802
        return 0x102 if handle.value == 7 else 0

    def CloseHandle(self, handle: Any) -> None:  # noqa: N802
        self.open.remove(handle.value)

    def GlobalMemoryStatusEx(self, status: Any) -> int:  # noqa: N802
        assert status._obj.length == 64
        status._obj.free = 5 << 30
        return 1

    def K32GetProcessMemoryInfo(self, process: Any, counters: Any, length: int) -> int:  # noqa: N802
        assert length == 72
        counters._obj.peak = 3 << 30
        return 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel32:
    fake_kernel = FakeKernel32()
    monkeypatch.setattr(ctypes, "WinDLL", lambda name: {"kernel32": fake_kernel}[name], raising=False)
    return fake_kernel


def test_is_alive_on_windows_does_not_end_the_process(kernel: FakeKernel32, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "WINDOWS", True)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill ends a process on Windows"))
    assert [system.is_alive(pid) for pid in (7, 8, 9)] == [True, False, False]
    assert kernel.open == []


def test_memory_without_proc_and_resource(
    hide_posix: None, kernel: FakeKernel32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware.free_ram_bytes(tmp_path) == 5 << 30
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "status")
    assert hardware.peak_memory_bytes() == 3 << 30


def test_is_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert system.is_alive(process.pid)
    process.communicate(b"\n")
    assert not system.is_alive(process.pid)
    assert not system.is_alive(2**40)


HIDE = f"""
import json, os, psutil, runpy, signal, sys  # import psutil first: it selects modules by sys.platform
for name in {POSIX_ONLY!r}:
    sys.modules[name] = None
for name in {POSIX_CALLS!r} + ("fchmod", "chown", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGQUIT", "SIGPIPE", "SIGALRM", "pthread_sigmask"):
    if hasattr(signal, name):
        delattr(signal, name)
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["octavo", *arguments, "--json"]
    try:
        runpy.run_module("octavo", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.mark.exhaustive
def test_finetune_and_resume_with_windows_modules_only(tiny_llama: Path, plays: Path, tmp_path: Path) -> None:
    """In a separate process, in which no library has imported the hidden modules yet."""
    run = ("finetune", "--out", tmp_path / "run")
    small = ("--seq-len", 32, "--batch-size", 2, "--rank", 2, "--sample-tokens", 2, "--steps", 3, "--stop-after", 2)
    commands: list[tuple[object, ...]] = [
        (*run, "--model", tiny_llama, "--data", plays / "train", *small),
        (*run, "--resume"),
        ("quantize", "--model", tiny_llama, "--out", tmp_path / "small"),
        ("generate", "the", "--model", tmp_path / "small", "--max-new-tokens", 2),
    ]
    arguments_json = json.dumps([[str(argument) for argument in arguments] for arguments in commands])
    done = subprocess.run([sys.executable, "-c", HIDE, arguments_json], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, resumed, _, generated = map(json.loads, done.stdout.splitlines())
    assert (first["steps"], resumed["steps"]) == (2, 3)
    assert generated["token_ids"]
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(
    ("argv0", "path", "environ", "command"),
    [
        ("env/bin/octavo", "env/bin", {}, "octavo"),
        ("env/bin/octavo", "other", {}, "env/bin/octavo"),
        ("env/bin/octavo", "other", {"UV_RUN_RECURSION_DEPTH": "1"}, "uv run octavo"),
        ("a folder/octavo", "env/bin", {}, "'a folder/octavo'"),
        ("src/octavo/__main__.py", "env/bin", {}, "python -m octavo"),
        ("src/octavo/__main__.py", "other", {}, "env/bin/python -m octavo"),
    ],
)
def test_own_command(
    argv0: str, path: str, environ: dict[str, str], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("env/bin/octavo", "env/bin/python", "a folder/octavo", "other/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / path))
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / argv0)])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    assert system.own_command() == command
