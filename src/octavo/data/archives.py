"""Archives of data files: zip and tar, also compressed, also within each other.

A member is written to a file of a private folder under a name that octavo chooses, so that no name in an archive is a
path on disk. All members count against one bound, in number and in bytes, with those of archives within the archive.
"""

from __future__ import annotations

import io
import lzma
import posixpath
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, cast

from octavo.data.files import (
    CHUNK_BYTES,
    COMPRESSIONS,
    MAX_DOCUMENT_BYTES,
    MAX_RATIO,
    SURE_BYTES,
    name_of,
    open_bytes,
    read_whole,
    suffix,
)
from octavo.data.finding import is_hidden
from octavo.errors import DataError

ARCHIVES = (".zip", ".tar")
MAX_MEMBERS = 100_000
MAX_DEPTH = 3  # archives within archives
MAX_TOTAL_BYTES = 2**36
_ENCRYPTED = 1  # bit 0 of the flags of a zip member
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
_UNSUPPORTED = (RuntimeError, NotImplementedError)  # of zip members: passwords and compressions of other programs
_AGAIN = "The archive was cut short or damaged: fetch or pack it again."


@dataclass
class Budget:
    """What may still be read of an archive and of those within it."""

    n_bytes: int
    n_members: int


@dataclass(frozen=True)
class Member:
    """A file of an archive, as a file on disk that exists until the next member is asked for."""

    name: str  # `books.zip/plays/hamlet.docx`, for messages and the ledger
    path: Path | None  # None: `error` says why it cannot be read
    error: DataError | None = None


@dataclass(frozen=True)
class _Entry:
    """A member as the archive describes it."""

    name: str
    key: zipfile.ZipInfo | tarfile.TarInfo
    kind: str = ""  # of what is no regular file, such as a link; counted as not read
    error: str = ""


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return suffix(path) in ARCHIVES


def budget_of(path: Path) -> Budget:
    """The bounds for an archive that the user named: as many bytes as compressed text can have, see MAX_RATIO."""
    return Budget(min(MAX_TOTAL_BYTES, max(SURE_BYTES, MAX_RATIO * path.stat().st_size)), MAX_MEMBERS)


def members(
    path: Path, source: str, suffixes: tuple[str, ...], not_read: Counter[str], budget: Budget
) -> Iterator[Member]:
    """The files of an archive with one of the `suffixes`, in the archive's order. Others are counted in `not_read`.

    `source` names the archive in messages. A member that is encrypted, or whose name leads out of the archive, comes as
    an error. DataError for a damaged archive and beyond the budget.
    """
    with TemporaryDirectory(prefix="octavo-") as folder, _opened(path, source) as archive:
        for entry in _entries(archive, source):
            budget.n_members -= 1
            if budget.n_members < 0:
                message = f"holds more than {MAX_MEMBERS:,} files."
                raise DataError(message, source=source, hint="Unpack it, and name the files to read.")
            name = f"{source}/{_shown(entry.name)}"
            if entry.error:
                hint = "Pack the file again, or skip such files with --skip-bad."
                yield Member(name, None, DataError(entry.error, source=name, hint=hint))
                continue
            kind = entry.kind or _why_not(entry.name, suffixes)
            if kind:
                not_read[kind] += 1
                continue
            compression = Path(entry.name).suffix.lower()
            ending = suffix(Path(entry.name)) + (compression if compression in COMPRESSIONS else "")
            target = Path(folder, f"member{ending}")
            _write(archive, entry, target, name, budget)
            yield Member(name, target)
            target.unlink()


@contextmanager
def _opened(path: Path, source: str) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    try:
        with open_bytes(path) as raw:
            if suffix(path) == ".zip":
                is_compressed = path.suffix.lower() in COMPRESSIONS  # such a stream cannot seek to its end
                with zipfile.ZipFile(io.BytesIO(read_whole(raw, source)) if is_compressed else raw) as archive:
                    yield archive
            else:
                with tarfile.open(fileobj=raw, mode="r|") as tar:
                    yield tar
    except DataError as error:
        raise renamed(error, path, source) from error
    except (*_DAMAGED, *_UNSUPPORTED) as error:
        raise DataError(f"not a valid archive: {error}", source=source, hint=_AGAIN) from error


def renamed(error: DataError, path: Path, source: str) -> DataError:
    """An error about the file on disk at `path` as one about `source`."""
    old = name_of(path)
    if old == source or not error.source.startswith(old):
        return error
    new = source + error.source.removeprefix(old)
    message = error.message.removeprefix(f"{error.source}:{error.line}: ").removeprefix(f"{error.source}: ")
    return DataError(message.replace(old, source), source=new, line=error.line, hint=error.hint.replace(old, source))


def _entries(archive: zipfile.ZipFile | tarfile.TarFile, source: str) -> Iterator[_Entry]:
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            if info.filename and info.is_dir():  # Python 3.11 fails without a name
                continue
            is_encrypted = info.flag_bits & _ENCRYPTED
            is_link = info.external_attr >> 28 == 0o12
            error = "is encrypted." if is_encrypted else _outside(info.filename)
            yield _Entry(info.filename, info, "link" if is_link else "", error)
        return
    for member in archive:
        if member.isdir():
            continue
        kind = "" if member.isreg() else "link" if member.issym() or member.islnk() else "special file"
        yield _Entry(member.name, member, kind, _outside(member.name))


def _outside(name: str) -> str:
    """The error of a name that leads out of the archive; "" for other names."""
    if not name:
        return "has no name."
    parts = name.replace("\\", "/").split("/")
    is_outside = ".." in parts or name.startswith(("/", "\\")) or parts[0].endswith(":")
    return "its name leads out of the archive." if is_outside else ""


def _shown(name: str) -> str:
    """A member's name for messages: printable, and of bounded length."""
    shown = "".join(character if character.isprintable() else "?" for character in name)
    return shown if len(shown) <= 200 else f"..{shown[-200:]}"


def _why_not(name: str, suffixes: tuple[str, ...]) -> str:
    """The kind under which a member is counted as not read; "" for one to read."""
    parts = name.split("/")
    if any(is_hidden(part) and part != "." for part in parts) or parts[0] == "__MACOSX":
        return "hidden file"
    ending = suffix(Path(posixpath.basename(name)))
    if ending in suffixes:
        return ""
    is_shown = 1 < len(ending) <= 12 and ending.isascii() and ending.isprintable()
    return ending if is_shown else "file without a suffix"


def _write(archive: zipfile.ZipFile | tarfile.TarFile, entry: _Entry, target: Path, name: str, budget: Budget) -> None:
    """Writes a member to `target`, never more than the budget."""
    n_bytes = 0
    with _stream(archive, entry) as stream, target.open("wb") as file:
        while data := stream.read(CHUNK_BYTES):
            n_bytes += len(data)
            budget.n_bytes -= len(data)
            if budget.n_bytes < 0 or n_bytes > MAX_DOCUMENT_BYTES:
                message = f"the archive's files swell to more than {MAX_RATIO} times its size."
                if n_bytes > MAX_DOCUMENT_BYTES:
                    message = f"is larger than {MAX_DOCUMENT_BYTES:,} bytes."
                raise DataError(message, source=name, hint="If the archive is correct, unpack it yourself.")
            file.write(data)


@contextmanager
def _stream(archive: zipfile.ZipFile | tarfile.TarFile, entry: _Entry) -> Iterator[BinaryIO]:
    if isinstance(archive, zipfile.ZipFile):
        with archive.open(cast(zipfile.ZipInfo, entry.key)) as stream:
            yield cast(BinaryIO, stream)
        return
    extracted = archive.extractfile(cast(tarfile.TarInfo, entry.key))
    assert extracted is not None, "a regular file has content"
    with extracted:
        yield cast(BinaryIO, extracted)
