"""Writing files and folders so that a crash leaves the old content or the new: the one way that every writer takes.

While it is written, it is the file `.NAME.PID` or the folder `.tmp-NAME-PID` beside its target; a replaced folder is
called `.old-NAME-PID` between two renames. `sweep` removes what processes that died left behind.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.system import force_to_disk, fsync_file, fsync_folder, held_folder, is_alive, rename_over

_LEFT_FILE = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)")
_LEFT_FOLDER = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d+)")


def durable_write(path: Path, data: bytes) -> None:
    """Write `data` to `path` and force it to disk; only for a path that nobody reads yet."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        force_to_disk(file.fileno())


def atomic_write(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: written beside it, forced to disk, renamed. A link stays a link.

    Raises OSError that names the file; the old file is then as it was, and nothing is left beside it.
    """
    path = _behind_links(path)
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
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder beside `target`, to be filled; at the end it is forced to disk and renamed to `target`.

    If that or the filling fails, what stood at `target` is as it was, and nothing is left beside it. Without `replace`
    an empty folder is all that may stand there. Of a link to a folder, the folder is replaced. What processes that died
    left beside `target` is removed first: the system released their locks.
    """
    target = _behind_links(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_beside(target)
    temporary = target.parent / f".tmp-{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # where nothing is locked, of an earlier process of this number
    with named(target, instead_of=temporary):
        temporary.mkdir()
    try:
        with held_folder(temporary), named(target, instead_of=temporary):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                fsync_folder(path) if path.is_dir() else fsync_file(path)
            fsync_folder(temporary)
            if replace and target.exists():
                exchange(temporary, target, old=target.with_name(f".old-{target.name}-{os.getpid()}"))
            else:
                rename_over(temporary, target)
                fsync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(new: Path, target: Path, *, old: Path) -> None:
    """Rename the folder `new` to `target`, durably; what stood there is called `old` until the new one stands.

    A folder cannot be renamed onto a full one. If the second rename fails, the first is taken back.
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
    """Remove what writers that died left in `folder`, and return it; never what a living process writes.

    A folder that was being replaced is put back if its successor never arrived.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        left = _LEFT_FOLDER.fullmatch(path.name) if path.is_dir() and not path.is_symlink() else None
        left = left or (_LEFT_FILE.fullmatch(path.name) if path.is_file() else None)
        if left is None or (int(left["pid"]) != os.getpid() and is_alive(int(left["pid"]))):
            continue
        target = folder / left["name"]
        with suppress(OSError):
            if path.is_file():
                path.unlink()
            elif left["kind"] == "old" and not target.exists():
                rename_over(path, target)
                continue
            elif not _removed(path):
                continue
            removed.append(path)
    return removed


@contextmanager
def named(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """An error within this names `path` if it names nothing, or a file below `instead_of`, which nobody has heard of.

    Writing to an open file names nothing, nor do the errors of libraries, which have no such field.
    """
    try:
        yield
    except Exception as error:
        names = [str(name) for key in ("filename", "filename2") if (name := getattr(error, key, None)) is not None]
        unnumbered = isinstance(error, OSError) and error.errno is None  # its text would be replaced by the name
        if not unnumbered and (not names or (instead_of is not None and names[0].startswith(str(instead_of)))):
            with suppress(AttributeError):
                error.filename = str(path)  # type: ignore[attr-defined]
        raise


def _sweep_beside(target: Path) -> None:
    """Removes what dead processes were to rename to `target`, and puts back what they were replacing."""
    own = re.compile(rf"\.(?P<kind>tmp|old)-{re.escape(target.name)}-(?P<pid>\d+)(?P<lock>\.lock)?(\.pid)?")
    for left in list(target.parent.iterdir()):
        if (match := own.fullmatch(left.name)) is None:
            continue
        with suppress(OSError):
            if match["lock"]:  # what stands for the lock of a folder on systems that lock no folders
                if not left.with_name(left.name.partition(".lock")[0]).exists():
                    left.unlink()
            elif match["kind"] == "tmp":
                _removed(left)
            elif int(match["pid"]) == os.getpid() or not is_alive(int(match["pid"])):
                shutil.rmtree(left) if target.exists() else rename_over(left, target)


def _removed(folder: Path) -> bool:
    """Removes a folder unless a process holds it; whether it did."""
    with held_folder(folder) as abandoned:
        if abandoned:
            shutil.rmtree(folder)
        return abandoned


def _behind_links(path: Path) -> Path:
    """Where a link leads, itself for anything else: a link to another disk is there to stay."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
