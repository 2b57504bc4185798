"""Finds the files that the user's paths name, and counts by kind the files in folders that are not read."""

from __future__ import annotations

import difflib
import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from octavo.data.files import COMPRESSIONS, sort_of, suffix
from octavo.errors import UsageError

LINK_AWAY = "link that leads out of the folder"


@dataclass
class FoundFiles:
    """The files to read, in order, and the number of files left out in folders, by kind."""

    files: list[Path] = field(default_factory=list)
    not_read: Counter[str] = field(default_factory=Counter)


def find_files(paths: Sequence[str], suffixes: Sequence[str]) -> FoundFiles:
    """The files named by `paths`, each once and in the order given, with counts of what was left out.

    A named file is read whatever its suffix. A glob gives its matches in sorted order. A folder gives every regular
    file below it whose suffix is in `suffixes`, sorted. Everything else in a folder is counted: other suffixes, hidden
    files and folders, linked folders, broken links and links to outside the folder, devices and pipes, and second names
    of a file that is already read. Raises UsageError for a path that matches nothing.
    """
    result = FoundFiles()
    seen: set[tuple[int, int]] = set()  # (device, inode)
    for given in paths:
        name = os.path.expanduser(given)
        matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        broken = [match for match in matches if not os.path.exists(match)]
        if len(matches) == len(broken):
            _nothing_there(name)
        matches = [match for match in matches if match not in broken]
        not_read: Counter[str] = Counter({"broken link": len(broken)} if broken else {})
        # `**` matches a folder and everything below it.
        files = list(dict.fromkeys(file for match in matches for file in _below(Path(match), suffixes, not_read)))
        result.not_read += not_read
        if not files:
            _nothing_to_read(given, suffixes, not_read)
        unique: set[Path] = set()
        for file in sorted(files, key=Path.is_symlink):  # a file before the links to it, so that its own name is used
            status = file.stat()
            if (identity := (status.st_dev, status.st_ino)) not in seen or not status.st_ino:
                seen.add(identity)
                unique.add(file)
            elif file not in result.files:
                result.not_read["second name of a file that is read"] += 1
        result.files += [file for file in files if file in unique]
    return result


def _below(path: Path, suffixes: Sequence[str], not_read: Counter[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    files: list[Path] = []
    root = os.path.realpath(path)
    for folder, folders, names in os.walk(path, onerror=_unreadable_folder):
        not_read["hidden folder"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        not_read["linked folder"] += len(linked)
        for name in names:
            file = Path(folder, name)
            kind = _why_not(file, root, suffixes)
            if kind:
                not_read[kind] += 1
            else:
                files.append(file)
    not_read += Counter()  # removes the kinds with a count of 0
    return sorted(files)


def is_hidden(name: str) -> bool:
    """Whether a file name is that of a hidden file, or of the lock that Word keeps while a document is open."""
    return name.startswith((".", "~$"))


def _why_not(file: Path, root: str, suffixes: Sequence[str]) -> str:
    """The kind under which a file of a folder is counted as left out; "" for a file to read."""
    if is_hidden(file.name):
        return "hidden file"
    try:
        mode = file.stat().st_mode
    except OSError:
        return "broken link" if file.is_symlink() else "file that cannot be reached"
    if not stat.S_ISREG(mode):
        return sort_of(mode)
    if suffix(file) not in suffixes:
        return _shown_suffix(file)
    if file.is_symlink() and os.path.commonpath([root, os.path.realpath(file)]) != root:
        return LINK_AWAY
    return ""


def _shown_suffix(file: Path) -> str:
    """`.docx`, `.tar.gz`. A long ending is part of the name, not a suffix."""
    compression = file.suffix.lower() if file.suffix.lower() in COMPRESSIONS else ""
    ending = suffix(file) + compression
    return ending if 1 < len(ending) <= 12 and ending.isascii() and ending.isprintable() else "file without a suffix"


def counted(not_read: Mapping[str, int]) -> str:
    """`2 .docx, 1 linked folder`: the most frequent kinds first, beyond 12 kinds the rest as one number."""
    kinds = sorted(not_read.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {_plural(kind) if count > 1 and kind[0] != '.' else kind}" for kind, count in kinds[:12]]
    if len(kinds) > 12:
        parts.append(f"{sum(count for _, count in kinds[12:]):,} of other kinds")
    return ", ".join(parts)


def _plural(kind: str) -> str:
    noun, rest = re.fullmatch(r"(.*?)((?: of | that | without ).*)?", kind).groups("")  # type: ignore[union-attr]
    return f"{noun}s{rest.replace('leads', 'lead')}"


def _unreadable_folder(error: OSError) -> NoReturn:
    raise UsageError(f"{error.filename}: {error.strerror}.", hint="Check the folder's permissions.") from error


def _nothing_to_read(given: str, suffixes: Sequence[str], not_read: Counter[str]) -> NoReturn:
    hint = f"In a folder it reads {', '.join(suffixes)}."
    if not_read:
        hint += f" Here are: {counted(not_read)}."
    if not_read[LINK_AWAY] or not_read["linked folder"]:
        hint += " Links are read where they are named, as with FOLDER/*."
    raise UsageError(f"{given}: no file here that octavo reads.", hint=hint)


def _nothing_there(name: str) -> NoReturn:
    if os.path.islink(name):
        raise UsageError(f"{name}: a link that leads nowhere.", hint="Name the file itself.")
    if glob.has_magic(name):
        raise UsageError(f"{name}: matches no file.", hint="`**` matches folders at any depth.")
    missing = Path(name)
    while not missing.parent.exists():
        missing = missing.parent
    neighbours = os.listdir(missing.parent) if missing.parent.is_dir() else []
    nearest = difflib.get_close_matches(missing.name, sorted(neighbours), n=1)
    hint = f"Did you mean {missing.parent / nearest[0]}?" if nearest else "Check the path."
    raise UsageError(f"{missing}: no such file or folder.", hint=hint)
