"""Atomic writes of files and folders: after a crash there is either the old content or the new. All writers use this.

New content is written to the file `.NAME.PID` or the folder `.tmp-NAME-PID` next to its target and then renamed. A
replaced folder is called `.old-NAME-PID` between two renames. `sweep` removes leftovers of processes that died.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.system import force_to_disk, fsync_file, fsync_folder, held_folder, is_alive, rename_over

_LEFT_FILE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)")
_LEFT_FOLDER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d+)")


def durable_write(path: Path, data: bytes) -> None:
    """Writes `data` to `path` and forces it to disk. Not atomic: only for a path that no other process reads yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        force_to_disk(file.fileno())


def atomic_write(path: Path, data: bytes) -> None:
    """Replaces the content of `path` by `data`: writes a temporary file, forces it to disk, renames it.

    If `path` is a link, its target is replaced. Raises OSError with the file name; the old file is then unchanged and
    the temporary file is removed.
    """
    path = _resolve_link(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with named(path, instead_of=temporary):
        try:
            durable_write(temporary, data)
            rename_over(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


@contextmanager
def new_folder(target: Path, *, replace: bool = False, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yields an empty temporary folder for the caller to fill; then forces it to disk and renames it to `target`.

    `check` gets the temporary folder before the renaming, for example to read it back; it may raise.
    If anything fails, `target` is unchanged and the temporary folder is removed. Without `replace`, `target` must be
    missing or an empty folder. If `target` is a link, the folder it points to is replaced. Leftovers of processes that
    died are removed first: the system has released their locks.
    """
    target = _resolve_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_target(target)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by an earlier process with this id, if folders cannot be locked
    with named(target, instead_of=temporary):
        temporary.mkdir()
    try:
        with held_folder(temporary), named(target, instead_of=temporary):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                fsync_folder(path) if path.is_dir() else fsync_file(path)
            fsync_folder(temporary)
            if check:
                check(temporary)
            if replace and target.exists():
                exchange(temporary, target, old=target.with_name(f".old-{target.name}-{os.getpid()}"))
            else:
                rename_over(temporary, target)
                fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yields the path of a temporary file for the caller to write; then forces it to disk and renames it to `target`.

    If anything fails, `target` is unchanged and the temporary file is removed, as are those of processes that died.
    """
    target = _resolve_link(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if leftover.suffix[1:].isdecimal() and not is_alive(int(leftover.suffix[1:])):
            leftover.unlink(missing_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with named(target, instead_of=temporary):
        try:
            yield temporary
            fsync_file(temporary)
            rename_over(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder that readers find by its name: a kill leaves it whole, or under a temporary name."""
    condemned = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    rename_over(folder, condemned)
    shutil.rmtree(condemned)


def exchange(new: Path, target: Path, *, old: Path) -> None:
    """Replaces the folder `target` by the folder `new`, durably. `target` is called `old` in between.

    Two renames are needed, because a folder cannot be renamed over a non-empty one. If the second fails, the first is
    undone.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(20, os.strerror(20), str(target))
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        rename_over(target, old)
    try:
        rename_over(new, target)
    except OSError:
        if old.exists():
            rename_over(old, target)
        raise
    try:
        fsync_folder(target.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> list[Path]:
    """Removes and returns the leftovers in `folder` of writers that died, never the files of a running process.

    A folder that was being replaced is restored if its replacement is missing.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        leftover = _LEFT_FOLDER.fullmatch(path.name) if path.is_dir() and not path.is_symlink() else None
        leftover = leftover or (_LEFT_FILE.fullmatch(path.name) if path.is_file() else None)
        if leftover is None or (int(leftover["pid"]) != os.getpid() and is_alive(int(leftover["pid"]))):
            continue
        target = folder / leftover["name"]
        with suppress(OSError):
            if path.is_file():
                path.unlink()
            elif leftover["kind"] == "old" and not target.exists():
                rename_over(path, target)
                continue
            elif not _remove_if_unlocked(path):
                continue
            removed.append(path)
    return removed


@contextmanager
def named(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Context that sets `path` as the file name of an error without one, or with one inside `instead_of`.

    Errors from writing to an open file and from libraries have no file name, and the user does not know the temporary
    path `instead_of`.
    """
    try:
        yield
    except Exception as error:
        names = [str(name) for key in ("filename", "filename2") if (name := getattr(error, key, None)) is not None]
        unnumbered = isinstance(error, OSError) and error.errno is None  # setting the name would replace its text
        if not unnumbered and (not names or (instead_of is not None and names[0].startswith(str(instead_of)))):
            with suppress(AttributeError):
                error.filename = str(path)  # type: ignore[attr-defined]
        raise


def _sweep_target(target: Path) -> None:
    """Removes temporary folders of dead processes for `target`, and restores the folder that they were replacing."""
    pattern = re.compile(rf"\.(?P<kind>tmp|old)-{re.escape(target.name)}-(?P<pid>\d+)(?P<lock>\.lock)?(\.pid)?")
    for leftover in list(target.parent.iterdir()):
        if (match := pattern.fullmatch(leftover.name)) is None:
            continue
        with suppress(OSError):
            if match["lock"]:  # the lock file of a folder, on systems that cannot lock folders
                if not leftover.with_name(leftover.name.partition(".lock")[0]).exists():
                    leftover.unlink()
            elif match["kind"] == "tmp":
                _remove_if_unlocked(leftover)
            elif int(match["pid"]) == os.getpid() or not is_alive(int(match["pid"])):
                shutil.rmtree(leftover) if target.exists() else rename_over(leftover, target)


def _remove_if_unlocked(folder: Path) -> bool:
    """Removes a folder unless a process has locked it. Returns whether it was removed."""
    with held_folder(folder) as abandoned:
        if abandoned:
            shutil.rmtree(folder)
        return abandoned


def _resolve_link(path: Path) -> Path:
    """The target of a link, or `path` itself. A link, for example to another disk, must not be replaced."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
