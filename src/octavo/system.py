"""What operating systems do differently: file locks, forcing data to disk, renaming, processes, memory.

Linux and macOS have `fcntl` and `resource`, Windows has `msvcrt` and its own calls. A module that one system lacks is
looked up when it is needed, so that importing octavo works everywhere.
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

# msvcrt locks bytes against reading, too: one far behind the end keeps the content of the file readable.
_LOCKED_BYTE = 2**30
_POLL_SECONDS = 0.1
# A virus scanner or an indexer opens new files for a moment; Windows does not rename or replace an open file.
_REPLACE_ATTEMPTS = 10


def optional_module(name: str) -> Any | None:
    """The module of the standard library called `name`, or None where this system has none."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def lock_file(file: IO[Any], path: Path, *, wait: bool) -> None:
    """Lock `file`, opened for writing at `path`, for this process. BlockingIOError if another one holds it.

    The system releases the lock when the process ends, in whatever way. Where a system has neither fcntl nor msvcrt, a
    second file that names the process stands for the lock.
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
    """Release what `lock_file` locked."""
    if fcntl := optional_module("fcntl"):
        fcntl.flock(file, fcntl.LOCK_UN)
    elif msvcrt := optional_module("msvcrt"):
        file.flush()
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        _holder(path).unlink(missing_ok=True)


def _lock_now(file: IO[Any], path: Path) -> None:
    """Lock without fcntl; OSError if another process holds the lock."""
    if msvcrt := optional_module("msvcrt"):
        os.lseek(file.fileno(), _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            file.seek(0)
        return
    holder = _holder(path)
    with suppress(OSError, ValueError):
        if not is_alive(int(holder.read_text(encoding="ascii"))):
            holder.unlink()
    with holder.open("x", encoding="ascii") as own:
        own.write(str(os.getpid()))


def _holder(path: Path) -> Path:
    return path.with_name(f"{path.name}.pid")


@contextmanager
def held_folder(folder: Path) -> Iterator[bool]:
    """Lock `folder` itself. Yields whether this process holds it: not if another one does, and not on a file system
    that locks no folders (NFS).

    Windows opens no folders and renames none that holds an open file: a file beside the folder is locked there.
    """
    if fcntl := optional_module("fcntl"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError:
                held = False
            yield held
        finally:
            os.close(descriptor)
        return
    beside = folder_lock(folder)
    with beside.open("a+") as file:
        try:
            lock_file(file, beside, wait=False)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            unlock_file(file, beside)
    with suppress(OSError):
        beside.unlink()


def folder_lock(folder: Path) -> Path:
    """The file that `held_folder` locks in place of `folder` where folders cannot be locked."""
    return folder.with_name(f"{folder.name}.lock")


def force_to_disk(descriptor: int) -> None:
    """Have the content of an open file on the disk itself. macOS's fsync stops at the drive's cache."""
    fcntl = optional_module("fcntl") if sys.platform == "darwin" else None
    if fcntl is not None:
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # file systems of the network have no such call
            pass
    os.fsync(descriptor)


def fsync_file(path: Path) -> None:
    """Force the content of `path` to disk. Windows does that only through a descriptor that may write."""
    with path.open("rb" if optional_module("fcntl") else "r+b") as file:
        force_to_disk(file.fileno())


def fsync_folder(path: Path) -> None:
    """Force the names in the folder `path` to disk: a rename is not durable before this.

    Windows opens no folders; NTFS writes names through its journal.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        force_to_disk(descriptor)
    finally:
        os.close(descriptor)


def rename_over(source: Path, target: Path) -> None:
    """Rename `source` to `target`: a file over a file, a folder over nothing or over an empty folder."""
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
    """Whether a process of this number runs. On Windows os.kill would end it or send it Ctrl-C."""
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
    """RAM that a new allocation can have, in bytes, on a system without /proc: free RAM on Windows, else all RAM."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    _windows_library("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.free)


def peak_ram_bytes() -> int:
    """The most resident memory that this process has had, in bytes."""
    if resource := optional_module("resource"):
        unit = 1 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
    counters = _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    kernel = _windows_library("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.length)
    return int(counters.peak)


def _windows_library(name: str) -> Any:
    return getattr(ctypes, "WinDLL")(name)  # noqa: B009  # type checkers of other systems do not have the name


def own_command() -> str:
    """How a shell calls octavo as this process was called: `octavo` where that is on the PATH, else a path or a module.

    What it gives is quoted for the shell and can be followed by a command and its flags.
    """
    if os.environ.get("UV_RUN_RECURSION_DEPTH"):  # uv changes the PATH for what it runs, and not for the shell
        return "uv run octavo"
    called = Path(sys.argv[0])
    if called.stem != "octavo":
        python = shutil.which("python")
        same = python is not None and Path(python).parent == Path(sys.executable).parent
        return f"{'python' if same else _quoted(_short(Path(sys.executable)))} -m octavo"
    found = shutil.which("octavo")
    with suppress(OSError):
        if found is not None and Path(found).samefile(called.with_suffix(Path(found).suffix)):
            return "octavo"
    return _quoted(_short(called))


def quoted(arguments: Sequence[object]) -> str:
    """Arguments as one line for a shell of this system."""
    return " ".join(_quoted(str(argument)) for argument in arguments)


def _quoted(text: str) -> str:
    return subprocess.list2cmdline([text]) if WINDOWS else shlex.quote(text)


def _short(path: Path) -> str:
    """A path from the working folder if it is below that, else in whole."""
    path = Path(os.path.abspath(path))  # not resolved: an environment's python is a link out of it
    with suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
