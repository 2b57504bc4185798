"""Helpers of all readers and writers of files: JSON, hashes, format versions, a lock. atomic.py writes the files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from octavo.atomic import atomic_write as atomic_write
from octavo.atomic import durable_write as durable_write
from octavo.atomic import named
from octavo.atomic import new_file as new_file
from octavo.atomic import new_folder as new_folder
from octavo.bounded_json import shown
from octavo.errors import CheckpointError, OctavoError
from octavo.failures import explained
from octavo.system import fsync_file as fsync_file
from octavo.system import fsync_folder as fsync_folder
from octavo.system import lock_file, unlock_file


def write_json_atomically(path: Path, data: Any) -> None:
    """Replaces the file at `path` by `data` as JSON, atomically as `atomic_write` does."""
    atomic_write(path, json_bytes(data))


def json_bytes(data: Any) -> bytes:
    """`data` as indented UTF-8 JSON with a line end. Tuples become lists; dict keys must be strings."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")  # lone surrogates of file names that are not UTF-8, as \\udcff


def sha256_of(path: Path) -> str:
    """The SHA-256 of the file at `path` in hexadecimal, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_format(version: object, supported: int, *, where: Path, error: type[OctavoError], hint: str) -> None:
    """Raises `error` with both versions if the format `version` in the file or folder `where` is not read."""
    if type(version) is not int or version != supported:
        text = "no format version" if version is None else f"the format version {shown(version)}"
        raise error(f"{where} has {text}; this octavo reads version {supported}.", hint=hint)


@contextmanager
def lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks `folder` for this process; the folder is made if necessary. The system releases the lock with the process.

    Raises CheckpointError with the process that holds the lock, unless `wait` is set. The holder may remove the file
    .lock, or the folder.
    """
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except OSError as error:
            known = explained(error)
            raise CheckpointError(
                f"{path}: cannot be opened: {error.strerror}",
                hint=(known and known.hint) or "Choose an --out that you can write to.",
            ) from error
        with file:
            _hold(file, path, wait=wait)
            try:
                # The previous holder may have removed the file, and another process made it again: lock the new one.
                if not _is(file, path):
                    continue
                with named(path):
                    file.truncate(0)
                    file.write(f"{os.getpid()}\n")
                    file.flush()
                yield
                return
            finally:
                unlock_file(file, path)


def _hold(file: IO[str], path: Path, *, wait: bool) -> None:
    try:
        lock_file(file, path, wait=wait)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read(20).strip()
        raise CheckpointError(
            f"{path.parent}: another process (pid {holder or 'unknown'}) is training here.",
            hint="Wait for it to end, stop it, or choose another --out.",
        ) from error


def _is(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
