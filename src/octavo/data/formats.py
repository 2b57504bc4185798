"""File formats: one reader each, from a path to entries. A new format is a reader and its line in READERS.

A reader gives a string for plain text and a mapping of named fields otherwise. It gives a DataError in the
place of a record that it cannot read and goes on behind it; it raises one when the rest of the file is lost.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from octavo.data.files import MAX_DOCUMENT_BYTES, Piece, decode, open_bytes, pieces, read_whole, suffix
from octavo.errors import DataError, UsageError


@dataclass(frozen=True)
class Entry:
    """One document of a file, before anybody asked what its fields mean."""

    line: int  # 1-based line where it starts, or its number where a format has no lines
    value: str | Mapping[str, object] | DataError
    n_bytes: int  # its size in the file, after decompression; 0 where the format does not tell


Reader = Callable[[Path, str | None], Iterator[Entry]]


def entries(path: Path, split_on: str | None = None) -> Iterator[Entry]:
    """The entries of one file. A file with a suffix that is not in READERS is read as plain text.

    `split_on` cuts plain text into documents: "lines", or a separator; other formats have their own records.
    """
    return READERS.get(suffix(path), read_text)(path, split_on)


def read_text(path: Path, split_on: str | None) -> Iterator[Entry]:
    """Plain text; `\\r\\n` and `\\r` become `\\n`. Blank stretches between separators are left out.

    The line breaks around a separator belong to the separator, not to the documents.
    """
    by_line = split_on == "lines"
    separator = b"\n" if by_line else split_on.encode() if split_on else None
    for piece in pieces(path, separator):
        try:
            text = decode(piece, str(path)).replace("\r\n", "\n").replace("\r", "\n")
        except DataError as error:
            yield Entry(error.line, error, len(piece.data))
            continue
        line = piece.line
        if separator:
            start = text.lstrip("\n")
            line += len(text) - len(start)
            text = start.rstrip("\n")
        if text.strip():
            yield Entry(line, text, len(piece.data))


def read_jsonl(path: Path, split_on: str | None) -> Iterator[Entry]:
    """One JSON object a line. Only `\\n` ends a line: U+2028 and its like may stand inside a string."""
    for piece in pieces(path, b"\n"):
        if piece.data.strip():
            yield Entry(piece.line, _json_line(piece, str(path)), len(piece.data))


def read_json(path: Path, split_on: str | None) -> Iterator[Entry]:
    """One JSON list of objects, or a single object; an entry's line is its number in the list."""
    source = str(path)
    for piece in pieces(path, None):
        value = _parse_json(decode(piece, source), source)
        for number, record in enumerate(value if isinstance(value, list) else [value], start=1):
            yield Entry(number, _fields(record, source, number), 0)


def read_csv(path: Path, split_on: str | None) -> Iterator[Entry]:
    """Comma-separated values with a header; a quoted field may hold line breaks."""
    source = str(path)
    line = 0

    def text(piece: Piece) -> str:
        nonlocal line
        line = piece.line
        return decode(piece, source) + "\n"

    # The module's own limit of 128 KiB a field is less than an essay, and can only be set for the process.
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    # `map` goes on behind a line that raised, as a generator would not; so does csv.reader behind a bad row.
    rows = csv.reader(map(text, pieces(path, b"\n")), strict=True)
    header: list[str] = []
    while True:
        start = line + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "Quote fields that hold commas, quotes or line breaks, and double the quotes inside."
            yield Entry(start, DataError(f"not valid CSV: {error}.", source=source, line=start, hint=hint), 0)
        except DataError as error:
            if not error.line:
                raise
            yield Entry(error.line, error, 0)
        else:
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
            else:
                yield Entry(start, _row(header, row, source, start), 0)


def read_parquet(path: Path, split_on: str | None) -> Iterator[Entry]:
    """A parquet table, row by row; an entry's line is the number of its row. Needs pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "Install it: pip install 'octavo[parquet]'"
        raise UsageError(f"{path}: parquet files need pyarrow, which is not installed.", hint=hint) from error
    source = str(path)
    number = 0
    with open_bytes(path) as stream:
        # A compressed stream cannot jump to the table's footer, which is at the end.
        data = stream if suffix(path) == path.suffix.lower() else pyarrow.BufferReader(read_whole(stream, source))
        try:
            for batch in parquet.ParquetFile(data).iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield Entry(number, record, 0)
        except (pyarrow.ArrowException, OSError) as error:
            hint = "The file was cut short or damaged: fetch it again."
            raise DataError(f"not valid parquet: {error}", source=source, line=number, hint=hint) from error


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def _json_line(piece: Piece, source: str) -> Mapping[str, object] | DataError:
    try:
        value = _parse_json(decode(piece, source), source, piece.line)
    except DataError as error:
        return error
    return _fields(value, source, piece.line)


def _parse_json(text: str, source: str, line: int = 0) -> object:
    """`line` is the line of a JSON Lines record; 0 for a whole file, whose errors know their own line."""
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and not line:
            _lines_of_json(source, error)
        message = f"not valid JSON: {error.msg}, at character {error.colno}."
        hint = "Correct the record, or skip such records with --skip-bad."
        raise DataError(message, source=source, line=line or error.lineno, hint=hint) from error
    except (RecursionError, ValueError) as error:
        # Deeper nesting, or longer numbers, than Python takes.
        raise DataError(f"JSON that cannot be read: {error}.", source=source, line=line) from error
    return value


def _lines_of_json(source: str, error: json.JSONDecodeError) -> NoReturn:
    message = "more than one JSON value in a .json file."
    hint = "If it holds one record a line, name it .jsonl."
    raise DataError(message, source=source, line=error.lineno, hint=hint) from error


def _fields(value: object, source: str, line: int) -> Mapping[str, object] | DataError:
    if isinstance(value, dict):
        return value
    hint = 'A record looks like {"text": "..."}.'
    return DataError(f"the record is a {type(value).__name__}, not an object.", source=source, line=line, hint=hint)


def _row(header: list[str], row: list[str], source: str, line: int) -> Mapping[str, object] | DataError:
    if len(row) == len(header):
        return dict(zip(header, row, strict=True))
    message = f"{len(row)} fields, but the header names {len(header)}: {', '.join(header)}."
    return DataError(message, source=source, line=line, hint="Quote fields that hold commas or line breaks.")
