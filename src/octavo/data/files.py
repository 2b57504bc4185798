"""Bytes of files on disk as UTF-8, from any supported compression and encoding.

A file is read as a stream of `FileSection`s, such as the lines of a JSON Lines file. A compressed file is in memory as
a whole only if it is one document.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from octavo.data.zstd import ZstdError, open_zstd
from octavo.errors import DataError

COMPRESSIONS: dict[str, Callable[..., object]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": open_zstd,
}
_SHORT = {".tgz": ".gz", ".txz": ".xz", ".tbz2": ".bz2", ".tzst": ".zst"}  # of compressed tar archives

CHUNK_BYTES = 2**20
SAMPLE_BYTES = 4096
# One document may be very large, but a small compressed file must not exhaust the memory.
MAX_DOCUMENT_BYTES = 2**30
# Text is compressed to 1/20 at best, tables of repeated words to 1/100. The limit of gzip is 1/1000.
MAX_RATIO = 200
SURE_BYTES = 2**26  # decompressed bytes below which the ratio is not checked
MAX_DOCUMENTS = 5_000_000  # of all files: a document takes some 200 bytes of memory in addition to its text

# The longest byte-order mark first: the mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = (
    (b"%PDF-", "a PDF"),
    (b"PK\x03\x04", "a zip archive or an office document"),
    (b"\x1f\x8b", "gzip data whose name does not end in .gz"),
    (b"\xfd7zXZ\x00", "xz data whose name does not end in .xz"),
    (b"\x28\xb5\x2f\xfd", "zstd data whose name does not end in .zst"),
    (b"PAR1", "parquet data whose name does not end in .parquet"),
    (b"{\\rtf", "RTF"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document of the old kind"),
    (b"%!PS", "PostScript"),
    (b"SQLite format 3", "a database"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"\x89PNG", "an image"),
    (b"GIF89a", "an image"),
    (b"\xff\xd8\xff", "an image"),
)
# Text contains tabs, line ends, form feeds, escapes and bells, and tables contain separator characters (0x1c to 0x1f).
_CONTROLS = bytes([*range(0x02, 0x07), *range(0x0E, 0x1B)])
_AS_TEXT = "Convert it to a text file in UTF-8, take it out of the data, or skip such files with --skip-bad."


@dataclass(frozen=True)
class FileSection:
    """The bytes of a file between two separators."""

    line: int  # 1-based line of the first byte
    offset: int  # bytes before the section in the file, after decompression
    data: bytes  # UTF-8, not yet validated


def suffix(path: Path) -> str:
    """The suffix that names the format: `.jsonl` for `a.JSONL.gz`."""
    if path.suffix.lower() in _SHORT:
        return ".tar"
    uncompressed = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return uncompressed.suffix.lower()


def name_of(path: Path) -> str:
    """The path as messages and records show it. Bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def sort_of(mode: int) -> str:
    """The kind of a file that is not regular, from its mode."""
    sorts = (
        (stat.S_ISDIR, "folder"),
        (stat.S_ISFIFO, "pipe (FIFO)"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "character device"),
        (stat.S_ISBLK, "block device"),
    )
    return next((name for test, name in sorts if test(mode)), "special file")


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of the file, decompressed while they are read.

    Raises DataError for a file that is not regular, for damaged compressed data, and for data that expand to more than
    MAX_RATIO times their compressed size, as no text does.
    """
    source, compression = name_of(path), path.suffix.lower()
    opener = COMPRESSIONS.get(_SHORT.get(compression, compression))
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            hint = "Only regular files are read: write its output into a regular file."
            raise DataError(f"cannot be read: it is a {sort_of(mode)}.", source=source, hint=hint)
        with path.open("rb") as raw:
            if opener is None:
                yield raw
            else:
                with cast(BinaryIO, opener(raw, "rb")) as stream:
                    yield cast(BinaryIO, _Bounded(stream, raw, source))
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ZstdError) as error:
        hint = "The file was cut short or damaged: fetch or compress it again."
        raise DataError(f"cannot be decompressed: {error}", source=source, hint=hint) from error
    except OSError as error:
        hint = "Check that it is a file and that you may read it."
        raise DataError(f"cannot be read: {error.strerror or error}", source=source, hint=hint) from error


class _Bounded:
    """A decompressing stream with a bound on the compression ratio, so that a small file cannot exhaust the memory."""

    def __init__(self, stream: BinaryIO, raw: BinaryIO, source: str) -> None:
        self._stream, self._raw, self._source, self._n_read = stream, raw, source, 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; all remaining bytes for -1."""
        parts, remaining = [], size
        while remaining:
            part = self._stream.read(CHUNK_BYTES if remaining < 0 else min(CHUNK_BYTES, remaining))
            if not part:
                break
            parts.append(part)
            remaining -= len(part) if remaining > 0 else 0
            self._n_read += len(part)
            if self._n_read > max(SURE_BYTES, MAX_RATIO * self._raw.tell()):
                message = f"the compressed data swell to more than {MAX_RATIO} times their size."
                hint = "If the file is correct, decompress it yourself."
                raise DataError(message, source=self._source, hint=hint)
        return b"".join(parts)


def read_whole(stream: BinaryIO, source: str) -> bytes:
    """All remaining bytes of `stream`. Raises DataError beyond MAX_DOCUMENT_BYTES."""
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        _too_large(source, 0)
    return data


def sections(path: Path, separator: bytes | None) -> Iterator[FileSection]:
    """The file split at each `separator`, which is removed. Without a separator the whole file is one section.

    `\\n` in `separator` matches any line end: `\\n`, `\\r\\n` or `\\r`. Line ends within sections are kept as they are.
    A byte-order mark is removed; UTF-16 and UTF-32 are converted to UTF-8. An empty file has no sections.
    Raises DataError for a binary file and for a section of more than MAX_DOCUMENT_BYTES.
    """
    source = name_of(path)
    with open_bytes(path) as stream:
        head = stream.read(CHUNK_BYTES)
        encoding, mark = _encoding(head, source)
        if encoding != "utf-8":
            # A chunk may end within a character. Such files are mostly small, so they are read whole.
            data = head[mark:] + read_whole(stream, source)
            stream, head, mark = io.BytesIO(_as_utf8(data, encoding, mark, source)), b"", 0
            head = stream.read(CHUNK_BYTES)
        yield from _cut(stream, head[mark:], separator, offset=mark, source=source)


def _cut(
    stream: BinaryIO, buffer: bytes, separator: bytes | None, *, offset: int, source: str
) -> Iterator[FileSection]:
    line = 1
    while True:
        if separator:
            begin = 0
            for start, end in _separators(buffer, separator):
                yield FileSection(line, offset + begin, buffer[begin:start])
                line += line_ends(buffer, begin, end)
                begin = end
            buffer, offset = buffer[begin:], offset + begin
        if len(buffer) > MAX_DOCUMENT_BYTES:
            _too_large(source, line)
        # Reading at least as much as the buffer holds doubles it, so a file without separators takes linear time.
        more = stream.read(max(CHUNK_BYTES, len(buffer)))
        if not more:
            break
        buffer += more
    # `_separators` leaves a carriage return at the end of the buffer, after which a line feed could follow.
    if separator and buffer.endswith(b"\r") and (spans := [*_separators(buffer + b"\0", separator)]):
        start, end = spans[-1]
        yield FileSection(line, offset, buffer[:start])
        line += line_ends(buffer, 0, end)
        buffer, offset = buffer[end:], offset + end
    if buffer:
        yield FileSection(line, offset, buffer)


_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"


def _separators(buffer: bytes, separator: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each separator. A carriage return at the very end is not one yet: a line feed may follow."""
    normal = separator.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in normal and b"\r" in buffer:
        pattern = re.compile(_LINE_END.join(map(re.escape, normal.split(b"\n"))))
        stop = len(buffer) - buffer.endswith(b"\r")
        yield from (match.span() for match in pattern.finditer(buffer, 0, stop))
        return
    at = 0
    while (start := buffer.find(normal, at)) >= 0:
        at = start + len(normal)
        yield start, at


def line_ends(data: bytes, start: int = 0, end: int | None = None) -> int:
    """The number of line ends in data[start:end]: `\\n`, `\\r\\n` or `\\r`."""
    end = len(data) if end is None else end
    return data.count(b"\n", start, end) + data.count(b"\r", start, end) - data.count(b"\r\n", start, end)


def decode(section: FileSection, source: str) -> str:
    """The section as text. Raises DataError with line and byte offset of the first byte that is not UTF-8 text."""
    try:
        text = section.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = section.line + line_ends(section.data, 0, error.start)
        at, byte = section.offset + error.start, section.data[error.start]
        hint = (
            "Save the file as UTF-8, or skip such documents with --skip-bad. Text of old Windows programs: "
            "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
        )
        raise DataError(f"byte {at} (0x{byte:02x}) is not UTF-8.", source=source, line=line, hint=hint) from error
    if "\0" in text:
        nul = section.data.index(b"\0")
        line = section.line + line_ends(section.data, 0, nul)
        at = section.offset + nul
        raise DataError(f"byte {at} is NUL: this is not text.", source=source, line=line, hint=_AS_TEXT)
    _check_controls(section.data, source, section.line)
    return text


def _check_controls(data: bytes, source: str, line: int) -> None:
    """DataError for many control characters. UTF-16 text of other scripts can be valid UTF-8, but is full of them."""
    if len(data) - len(data.translate(None, _CONTROLS)) > max(2, len(data) // 50):
        message = "it holds many control characters: this is no text in UTF-8, but may be in UTF-16 without its mark."
        hint = "Save it as UTF-8: iconv -f UTF-16LE -t UTF-8 OLD > NEW (or UTF-16BE), or skip it with --skip-bad."
        raise DataError(message, source=source, line=line, hint=hint)


def _encoding(head: bytes, source: str) -> tuple[str, int]:
    """(encoding, length of the byte-order mark), from the first bytes of a file."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    for magic, what in _BINARY:
        if head.startswith(magic):
            raise DataError(f"is {what}, not text.", source=source, hint=_AS_TEXT)
    sample = head[:SAMPLE_BYTES]
    if b"\0" not in sample:
        return "utf-8", 0
    for encoding, low, high in (
        ("utf-16-le", sample[::2], sample[1::2]),
        ("utf-16-be", sample[1::2], sample[::2]),
    ):
        # Western text in UTF-16 without a mark has a NUL in nearly every second byte and nowhere else.
        if len(low) == len(high) and 0 not in low and high.count(0) > 0.3 * len(high):
            text = sample.decode(encoding, errors="ignore")
            if all(character.isprintable() or character.isspace() for character in text):
                return encoding, 0
    hint = f"{_AS_TEXT} Text in UTF-16: iconv -f UTF-16LE -t UTF-8 OLD > NEW."
    raise DataError("is binary: it holds NUL bytes.", source=source, hint=hint)


def _as_utf8(data: bytes, encoding: str, mark: int, source: str) -> bytes:
    try:
        return data.decode(encoding).encode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, errors="replace").count("\n") + 1
        message = f"byte {mark + error.start} is not {encoding.upper()}."
        raise DataError(message, source=source, line=line, hint="Save the file as UTF-8.") from error


def _too_large(source: str, line: int) -> NoReturn:
    message = f"one document or line of more than {MAX_DOCUMENT_BYTES:,} bytes."
    raise DataError(message, source=source, line=line, hint="Split it, for example with --split-on lines.")
