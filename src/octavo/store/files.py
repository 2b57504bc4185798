"""Writing files so that a crash leaves the old content or the new, and holding a folder for one process."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError
from octavo.system import force_to_disk, held_folder, lock_file, rename_over, unlock_file
from octavo.system import fsync_file as fsync_file
from octavo.system import fsync_folder as fsync_folder


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: written beside it, forced to disk, renamed.

    Raises OSError; the old file is then as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        durable_write(temporary, data)
        rename_over(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_json_atomically(path: Path, data: Any) -> None:
    """Replace the file at `path` by `data` as JSON, as `atomic_write` does."""
    atomic_write(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """`data` as indented UTF-8 JSON with a line end. Tuples become lists; keys of dicts must be strings."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def durable_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` and force it to disk; only for a path that nobody reads yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        force_to_disk(file.fileno())


def sha256_of(path: Path) -> str:
    """The SHA-256 of the file at `path`, in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, to be filled and renamed to it; removed at the end if it was not.

    What processes that died left beside `target` is removed first: the system let go of their locks.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".tmp-{glob.escape(target.name)}-*"):
        if not left.is_dir():  # what stands for a lock on systems that lock no folders
            if not left.with_name(left.name.removesuffix(".pid").removesuffix(".lock")).exists():
                with suppress(OSError):
                    left.unlink()
            continue
        with suppress(OSError), held_folder(left) as abandoned:
            if abandoned:
                shutil.rmtree(left)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # where nothing is locked, of an earlier process of this number
    temporary.mkdir()
    try:
        with held_folder(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it however the process ends.

    Raises CheckpointError naming the process that holds it already, unless told to wait for it.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}", hint="Choose an --out that you can write to."
        ) from error
    with file:
        try:
            lock_file(file, path, wait=wait)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(20).strip()
            raise CheckpointError(
                f"{folder}: another process (pid {holder or 'unknown'}) is training here.",
                hint="Wait for it to end, stop it, or choose another --out.",
            ) from error
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield
        finally:
            # The file stays: removing it would let a waiting process lock a name that is gone.
            unlock_file(file, path)
