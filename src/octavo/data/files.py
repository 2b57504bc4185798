"""Files on disk: their bytes as UTF-8, however they were stored.

A file is read as a stream of pieces, so a compressed file is never held whole unless it is one document.
"""

from __future__ import annotations

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

from octavo.errors import DataError

COMPRESSIONS: dict[str, Callable[..., object]] = {".gz": gzip.open, ".xz": lzma.open}

CHUNK_BYTES = 2**20
SAMPLE_BYTES = 4096
# One document may be as large as a shelf of books, but a small compressed file must not fill the memory.
MAX_DOCUMENT_BYTES = 2**30
# Text is compressed to a twentieth at best, tables of repeated words to a hundredth; gzip's most is a thousandth.
MAX_RATIO = 200
SURE_BYTES = 2**26  # so much is decompressed whatever the ratio
MAX_DOCUMENTS = 5_000_000  # of all files together: each takes some 200 bytes of memory beside its text

# The longest mark first: UTF-32 little-endian begins with the mark of UTF-16 little-endian.
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
    (b"\x28\xb5\x2f\xfd", "zstd data"),
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
# Text has tabs, line ends, form feeds, escapes and bells, and tables have separators of their own.
_CONTROLS = bytes([*range(0x02, 0x07), *range(0x0E, 0x1B)])
_AS_TEXT = "Convert it to a text file in UTF-8, take it out of the data, or skip such files with --skip-bad."


@dataclass(frozen=True)
class Piece:
    """A stretch of a file between two separators."""

    line: int  # 1-based line of its first byte
    offset: int  # bytes before it in the file, after decompression
    data: bytes  # UTF-8, not yet checked


def suffix(path: Path) -> str:
    """The suffix that names the format: `.jsonl` for `a.JSONL.gz`."""
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def name_of(path: Path) -> str:
    """The path as messages and records name it: bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def sort_of(mode: int) -> str:
    """What a file that is not regular is, from its mode."""
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
    """The file's bytes, decompressed as they are read.

    Raises DataError for what is no regular file, for damage in the compressed data, and for data that swell to more
    than MAX_RATIO times their size in the file, which no text does.
    """
    source, compression = name_of(path), path.suffix.lower()
    opener = COMPRESSIONS.get(compression)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            hint = "Only regular files are read: write what it gives into one."
            raise DataError(f"cannot be read: it is a {sort_of(mode)}.", source=source, hint=hint)
        with path.open("rb") as raw:
            if opener is None:
                yield raw
            else:
                with cast(BinaryIO, opener(raw, "rb")) as stream:
                    yield cast(BinaryIO, _Bounded(stream, raw, source))
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        hint = "The file was cut short or damaged: fetch or compress it again."
        raise DataError(f"cannot be decompressed: {error}", source=source, hint=hint) from error
    except OSError as error:
        hint = "Check that it is a file and that you may read it."
        raise DataError(f"cannot be read: {error.strerror}", source=source, hint=hint) from error


class _Bounded:
    """A stream that decompresses, and stops where the data swell beyond belief: a small file must not fill the disk's
    worth of memory."""

    def __init__(self, stream: BinaryIO, raw: BinaryIO, source: str) -> None:
        self._stream, self._raw, self._source, self._given = stream, raw, source, 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; all that is left for -1."""
        parts, wanted = [], size
        while wanted:
            part = self._stream.read(CHUNK_BYTES if wanted < 0 else min(CHUNK_BYTES, wanted))
            if not part:
                break
            parts.append(part)
            wanted -= len(part) if wanted > 0 else 0
            self._given += len(part)
            if self._given > max(SURE_BYTES, MAX_RATIO * self._raw.tell()):
                message = f"the compressed data swell to more than {MAX_RATIO} times their size."
                raise DataError(
                    message, source=self._source, hint="Decompress the file yourself if it is what it should be."
                )
        return b"".join(parts)


def read_whole(stream: BinaryIO, source: str) -> bytes:
    """All that is left in `stream`. Raises DataError beyond MAX_DOCUMENT_BYTES."""
    data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        _too_large(source, 0)
    return data


def pieces(path: Path, separator: bytes | None) -> Iterator[Piece]:
    """The file cut at each `separator`, which is removed; without one, the whole file as one piece.

    `\\n` in `separator` is any line end: `\\n`, `\\r\\n` or `\\r`. Line ends inside of pieces are left as they are.
    A byte-order mark is removed and UTF-16 and UTF-32 become UTF-8. An empty file has no pieces.
    Raises DataError for a binary file and for a piece of more than MAX_DOCUMENT_BYTES.
    """
    source = name_of(path)
    with open_bytes(path) as stream:
        head = stream.read(CHUNK_BYTES)
        encoding, mark = _encoding(head, source)
        if encoding != "utf-8":
            # A character may straddle any chunk here; such files are short notes, so they are read whole.
            data = head[mark:] + read_whole(stream, source)
            stream, head, mark = io.BytesIO(_as_utf8(data, encoding, mark, source)), b"", 0
            head = stream.read(CHUNK_BYTES)
        yield from _cut(stream, head[mark:], separator, offset=mark, source=source)


def _cut(stream: BinaryIO, held: bytes, separator: bytes | None, *, offset: int, source: str) -> Iterator[Piece]:
    line = 1
    while True:
        if separator:
            begin = 0
            for start, end in _separators(held, separator):
                yield Piece(line, offset + begin, held[begin:start])
                line += line_ends(held, begin, end)
                begin = end
            held, offset = held[begin:], offset + begin
        if len(held) > MAX_DOCUMENT_BYTES:
            _too_large(source, line)
        # Reading as much again as is held keeps a file without separators linear: the held bytes double.
        more = stream.read(max(CHUNK_BYTES, len(held)))
        if not more:
            break
        held += more
    if separator and held.endswith(b"\r") and (found := [*_separators(held + b"\0", separator)]):
        start, end = found[-1]  # with the carriage return, behind which more could have come
        yield Piece(line, offset, held[:start])
        line += line_ends(held, 0, end)
        held, offset = held[end:], offset + end
    if held:
        yield Piece(line, offset, held)


_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"


def _separators(held: bytes, separator: bytes) -> Iterator[tuple[int, int]]:
    """Where each separator begins and ends. A carriage return at the very end is left: a line feed may follow."""
    normal = separator.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in normal and b"\r" in held:
        pattern = re.compile(_LINE_END.join(map(re.escape, normal.split(b"\n"))))
        whole = len(held) - held.endswith(b"\r")
        yield from (found.span() for found in pattern.finditer(held, 0, whole))
        return
    at = 0
    while (start := held.find(normal, at)) >= 0:
        at = start + len(normal)
        yield start, at


def line_ends(data: bytes, start: int = 0, end: int | None = None) -> int:
    """How many lines end in data[start:end]: with `\\n`, `\\r\\n` or `\\r`."""
    end = len(data) if end is None else end
    return data.count(b"\n", start, end) + data.count(b"\r", start, end) - data.count(b"\r\n", start, end)


def decode(piece: Piece, source: str) -> str:
    """The piece as text. Raises DataError with the line and the byte offset of what is not UTF-8 text."""
    try:
        text = piece.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = piece.line + line_ends(piece.data, 0, error.start)
        at, byte = piece.offset + error.start, piece.data[error.start]
        hint = (
            "Save the file as UTF-8, or skip such documents with --skip-bad. Text of old Windows programs: "
            "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
        )
        raise DataError(f"byte {at} (0x{byte:02x}) is not UTF-8.", source=source, line=line, hint=hint) from error
    if "\0" in text:
        nul = piece.data.index(b"\0")
        line = piece.line + line_ends(piece.data, 0, nul)
        at = piece.offset + nul
        raise DataError(f"byte {at} is NUL: this is not text.", source=source, line=line, hint=_AS_TEXT)
    _check_controls(piece.data, source, piece.line)
    return text


def _check_controls(data: bytes, source: str, line: int) -> None:
    """Letters of other scripts in UTF-16 are valid UTF-8 at times: then they hold a control character each."""
    if len(data) - len(data.translate(None, _CONTROLS)) > max(2, len(data) // 50):
        message = "it holds many control characters: this is no text in UTF-8, but may be in UTF-16 without its mark."
        hint = "Save it as UTF-8: iconv -f UTF-16LE -t UTF-8 OLD > NEW (or UTF-16BE), or skip it with --skip-bad."
        raise DataError(message, source=source, line=line, hint=hint)


def _encoding(head: bytes, source: str) -> tuple[str, int]:
    """The encoding that the first bytes of a file show, and the length of its byte-order mark."""
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
        # Western text in UTF-16 without a mark has a NUL in nearly every second place and nowhere else.
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
