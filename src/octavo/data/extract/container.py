"""Zip containers of office documents and e-books: their members as bytes, with bounds on what they expand to."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from octavo.data.files import (
    CHUNK_BYTES,
    COMPRESSIONS,
    MAX_DOCUMENT_BYTES,
    MAX_RATIO,
    SURE_BYTES,
    name_of,
    open_bytes,
    read_whole,
)
from octavo.errors import DataError

MAX_MEMBERS = 100_000
ENCRYPTED_FLAG = 1  # bit 0 of a member's flags
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError, RuntimeError)


class Container:
    """The members of an open zip file. All bytes that are read count against one bound for the file."""

    def __init__(self, archive: zipfile.ZipFile, source: str, size: int) -> None:
        self.source = source
        self._archive = archive
        self._most = min(MAX_DOCUMENT_BYTES, max(SURE_BYTES, MAX_RATIO * size))
        self._read = 0
        self._members = {info.filename: info for info in archive.infolist()}

    @property
    def names(self) -> list[str]:
        """The members' names, as the file has them: never used as paths."""
        return list(self._members)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a member. DataError if it is missing, encrypted, damaged or swells beyond the bound."""
        if name not in self._members:
            raise DataError(f"its part {name!r} is missing.", source=self.source, hint="Save the document again.")
        info = self._members[name]
        if info.flag_bits & ENCRYPTED_FLAG:
            raise encrypted(self.source)
        try:
            with self._archive.open(info) as stream:
                while data := stream.read(CHUNK_BYTES):
                    self._read += len(data)
                    if self._read > self._most:
                        raise DataError(
                            f"its parts swell to more than {self._most:,} bytes, {MAX_RATIO} times the file's size.",
                            source=self.source,
                            hint="If the file is correct, save its text as a plain text file.",
                        )
                    yield data
        except DataError:
            raise
        except _DAMAGED as error:
            raise damaged(self.source, error) from error

    def read(self, name: str) -> bytes:
        """All bytes of a member."""
        return b"".join(self.chunks(name))


@contextmanager
def open_container(path: Path, what: str) -> Iterator[Container]:
    """The zip file at `path`, which may be compressed again. DataError if it is none; `what` names the format."""
    source = name_of(path)
    with open_bytes(path) as raw:
        head = raw.read(8)
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        message = f"is no {what}: it is encrypted with a password, or an office document of the old kind."
        raise DataError(message, source=source, hint="Open it in an office program and save it again, unencrypted.")
    with open_bytes(path) as raw:
        compressed = path.suffix.lower() in COMPRESSIONS
        stream: BinaryIO = io.BytesIO(read_whole(raw, source)) if compressed else raw
        try:
            archive = zipfile.ZipFile(stream)
        except _DAMAGED as error:
            raise damaged(source, error, what) from error
        with archive:
            if len(archive.infolist()) > MAX_MEMBERS:
                message = f"holds {len(archive.infolist()):,} parts, more than {MAX_MEMBERS:,}."
                raise DataError(message, source=source, hint="Take it out of the data.")
            yield Container(archive, source, path.stat().st_size)


def encrypted(source: str) -> DataError:
    """The error of an encrypted file."""
    return DataError("is encrypted.", source=source, hint="Save it without a password, or take it out of the data.")


def damaged(source: str, error: Exception, what: str = "zip file") -> DataError:
    """The error of a file whose container cannot be read."""
    hint = "The file was cut short or damaged: fetch or save it again."
    return DataError(f"not a valid {what}: {error}", source=source, hint=hint)
