"""Portability across operating systems: file locks, fsync, renaming, processes, memory.

Linux and macOS have `fcntl` and `resource`, Windows has `msvcrt` and kernel32. These modules are imported when they are
needed, so octavo can be imported on every system.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

WINDOWS = os.name == "nt"

# msvcrt locks also prevent reading. A byte far beyond the end is locked, so the content remains readable.
_LOCKED_BYTE = 2**30
_POLL_SECONDS = 0.1
# Windows does not rename or replace an open file, and virus scanners or indexers briefly open new files.
_REPLACE_ATTEMPTS = 10


def optional_module(name: str) -> Any | None:
    """The standard library module `name`, or None if this system does not have it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def lock_file(file: IO[Any], path: Path, *, wait: bool) -> None:
    """Locks `file`, opened for writing at `path`, for this process. BlockingIOError if another process holds the lock.

    The system releases the lock when the process ends, however it ends. On a system with neither fcntl nor msvcrt, a
    second file with the process id is used as the lock.
    """
    if fcntl := optional_module("fcntl"):
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    while True:
        try:
            _lock_now(file, path)
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError(error.errno, "another process holds the lock") from error
            time.sleep(_POLL_SECONDS)


def unlock_file(file: IO[Any], path: Path) -> None:
    """Releases the lock of `lock_file`."""
    if fcntl := optional_module("fcntl"):
        fcntl.flock(file, fcntl.LOCK_UN)
    elif msvcrt := optional_module("msvcrt"):
        file.flush()
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        _pid_path(path).unlink(missing_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file at `path`. False if the file is missing or cannot be opened."""
    fcntl = optional_module("fcntl")
    try:
        file = path.open("rb" if fcntl else "r+b")
    except OSError:
        return False
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: readers do not see each other's lock
            else:
                _lock_now(file, path)
        except OSError as error:
            return fcntl is None or isinstance(error, BlockingIOError)  # others: the file system has no locks
        unlock_file(file, path)
    return False


def _lock_now(file: IO[Any], path: Path) -> None:
    """Locks without fcntl. OSError if another process holds the lock."""
    if msvcrt := optional_module("msvcrt"):
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            file.seek(0)
        return
    pid_path = _pid_path(path)
    with suppress(OSError, ValueError):
        if not is_alive(int(pid_path.read_text(encoding="ascii"))):
            pid_path.unlink()
    with pid_path.open("x", encoding="ascii") as pid_file:
        pid_file.write(str(os.getpid()))


def _pid_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.pid")


@contextmanager
def held_folder(folder: Path) -> Iterator[bool]:
    """Locks `folder` itself. Yields whether this process got the lock.

    It fails if another process holds the lock, or on a file system that cannot lock folders (NFS). Windows cannot open
    folders, and does not rename a folder with an open file in it: there a file next to the folder is locked.
    """
    if fcntl := optional_module("fcntl"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except OSError:
                locked = False
            yield locked
        finally:
            os.close(descriptor)
        return
    lock_path = folder_lock(folder)
    with lock_path.open("a+") as file:
        try:
            lock_file(file, lock_path, wait=False)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            unlock_file(file, lock_path)
    with suppress(OSError):
        lock_path.unlink()


def folder_lock(folder: Path) -> Path:
    """The file that `held_folder` locks instead of `folder` on systems that cannot lock folders."""
    return folder.with_name(f"{folder.name}.lock")


def force_to_disk(descriptor: int) -> None:
    """Forces the content of an open file to disk. On macOS fsync only writes to the drive's cache."""
    fcntl = optional_module("fcntl") if sys.platform == "darwin" else None
    if fcntl is not None:
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # not supported by network file systems
            pass
    os.fsync(descriptor)


def fsync_file(path: Path) -> None:
    """Forces the content of `path` to disk. Windows needs a writable descriptor for that."""
    with path.open("rb" if optional_module("fcntl") else "r+b") as file:
        force_to_disk(file.fileno())


def fsync_folder(path: Path) -> None:
    """Forces the directory entries of the folder `path` to disk, which makes a rename durable.

    Windows cannot open folders; NTFS writes directory entries through its journal.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        force_to_disk(descriptor)
    finally:
        os.close(descriptor)


def rename_over(source: Path, target: Path) -> None:
    """Renames `source` to `target`. A file may replace a file, a folder may replace an empty folder."""
    if not WINDOWS:
        source.replace(target)
        return
    if source.is_dir() and target.is_dir():
        target.rmdir()
    for attempt in range(1, _REPLACE_ATTEMPTS + 1):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == _REPLACE_ATTEMPTS:
                raise
            time.sleep(_POLL_SECONDS)


def is_alive(pid: int) -> bool:
    """Whether a process with this id is running. On Windows os.kill would end it or send Ctrl-C."""
    if WINDOWS:
        synchronize, timeout = 0x00100000, 0x102
        kernel = _windows_library("kernel32")
        handle = kernel.OpenProcess(synchronize, False, pid)
        if not handle:
            return False
        running = kernel.WaitForSingleObject(ctypes.c_void_p(handle), 0) == timeout
        kernel.CloseHandle(ctypes.c_void_p(handle))
        return bool(running)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("total", ctypes.c_uint64), ("free", ctypes.c_uint64),
        ("total_page", ctypes.c_uint64), ("free_page", ctypes.c_uint64), ("total_virtual", ctypes.c_uint64),
        ("free_virtual", ctypes.c_uint64), ("free_extended", ctypes.c_uint64),
    )  # fmt: skip


class _ProcessMemory(ctypes.Structure):
    """Windows' PROCESS_MEMORY_COUNTERS."""

    _fields_ = (
        ("length", ctypes.c_uint32), ("page_faults", ctypes.c_uint32), ("peak", ctypes.c_size_t),
        ("current", ctypes.c_size_t), ("quotas", ctypes.c_size_t * 4), ("pagefile", ctypes.c_size_t),
        ("peak_pagefile", ctypes.c_size_t),
    )  # fmt: skip


def available_ram_bytes() -> int:
    """RAM available for allocation in bytes, on a system without /proc: free RAM on Windows, else total RAM."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    _windows_library("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.free)


def peak_ram_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    if resource := optional_module("resource"):
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit_bytes
    counters = _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    kernel = _windows_library("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.length)
    return int(counters.peak)


def _windows_library(name: str) -> Any:
    return getattr(ctypes, "WinDLL")(name)  # noqa: B009  # unknown to type checkers on other systems


def own_command() -> str:
    """The shell command that runs octavo like this process: `octavo` if it is on the PATH, else a path or `-m octavo`.

    The result is quoted for the shell; a command and its options can be appended.
    """
    if os.environ.get("UV_RUN_RECURSION_DEPTH"):  # uv changes the PATH of its child processes, not the shell's
        return "uv run octavo"
    argv0 = Path(sys.argv[0])
    if argv0.stem != "octavo":
        python = shutil.which("python")
        is_on_path = python is not None and Path(python).parent == Path(sys.executable).parent
        return f"{'python' if is_on_path else _quoted(_short(Path(sys.executable)))} -m octavo"
    on_path = shutil.which("octavo")
    with suppress(OSError):
        if on_path is not None and Path(on_path).samefile(argv0.with_suffix(Path(on_path).suffix)):
            return "octavo"
    return _quoted(_short(argv0))


def quoted(arguments: Sequence[object]) -> str:
    """Arguments quoted and joined for a shell of this system."""
    return " ".join(_quoted(str(argument)) for argument in arguments)


def _quoted(text: str) -> str:
    return subprocess.list2cmdline([text]) if WINDOWS else shlex.quote(text)


def _short(path: Path) -> str:
    """A path relative to the working directory if it is inside it, else the absolute path."""
    path = Path(os.path.abspath(path))  # not resolved: the python of a virtual environment is a link to outside
    with suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
