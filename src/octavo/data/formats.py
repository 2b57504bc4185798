"""File formats: one reader each, from a path to entries. A new format is a reader and its line in READERS.

A reader gives a string for plain text and a mapping of named fields otherwise. It gives a DataError in the
place of a record that it cannot read and goes on behind it; it raises one when the rest of the file is lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from octavo.bounded_json import shortened
from octavo.data.entries import Entry
from octavo.data.files import (
    MAX_RATIO,
    SAMPLE_BYTES,
    SURE_BYTES,
    decode,
    name_of,
    open_bytes,
    pieces,
    read_whole,
    suffix,
)
from octavo.data.json_records import read_json, read_jsonl
from octavo.data.markup import read_html, refuse_markup
from octavo.data.tables import read_csv, read_tsv
from octavo.errors import DataError, UsageError

__all__ = ["READERS", "Entry", "entries"]

Reader = Callable[[Path, str | None], Iterator[Entry]]
MAX_GROUP_BYTES = 2**30


def entries(path: Path, split_on: str | None = None) -> Iterator[Entry]:
    """The entries of one file.

    A file with a suffix that is not in READERS is read as plain text, unless suffix or beginning say that it is markup:
    then it is read as HTML, or DataError says what to do. `split_on` cuts plain text into documents: "lines", or a
    separator; other formats have their own records.
    """
    ending = suffix(path)
    if ending in READERS:
        return READERS[ending](path, split_on)
    refuse_markup(path, ending)
    return read_html(path, split_on) if _begins_as_html(path) else read_text(path, split_on)


def _begins_as_html(path: Path) -> bool:
    with open_bytes(path) as stream:
        head = stream.read(SAMPLE_BYTES)
    return re.match(rb"(\xef\xbb\xbf)?\s*(<!doctype html|<html[\s>])", head, re.IGNORECASE) is not None


def read_text(path: Path, split_on: str | None) -> Iterator[Entry]:
    """Plain text; `\\r\\n` and `\\r` become `\\n`. Blank stretches between separators are left out.

    The line breaks around a separator belong to the separator, not to the documents.
    """
    by_line = split_on == "lines"
    separator = b"\n" if by_line else split_on.encode() if split_on else None
    source = name_of(path)
    for piece in pieces(path, separator):
        try:
            text = decode(piece, source).replace("\r\n", "\n").replace("\r", "\n")
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


def read_parquet(path: Path, split_on: str | None) -> Iterator[Entry]:
    """A parquet table, row by row; an entry's line is the number of its row. Needs pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "Install it: pip install 'octavo[parquet]'"
        raise UsageError(f"{name_of(path)}: parquet files need pyarrow, which is not installed.", hint=hint) from error
    source = name_of(path)
    number, given = 0, 0
    with open_bytes(path) as stream:
        # A compressed stream cannot jump to the table's footer, which is at the end.
        data = stream if suffix(path) == path.suffix.lower() else pyarrow.BufferReader(read_whole(stream, source))
        try:
            table = parquet.ParquetFile(data)
            _check_names(table.schema_arrow.names, source)
            _check_groups(table.metadata, source)
            most = max(SURE_BYTES, MAX_RATIO * path.stat().st_size)
            for batch in table.iter_batches(batch_size=256):
                given += batch.nbytes
                if given > most:  # one long word, written once for all rows
                    message = f"the table swells to more than {MAX_RATIO} times the file's size."
                    raise DataError(message, source=source, line=number, hint="Write the rows that are meant anew.")
                for record in _records(batch, source, number):
                    number += 1
                    yield Entry(number, record, 0)
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            hint = "The file was cut short or damaged: fetch it again."
            raise DataError(f"not valid parquet: {error}", source=source, line=number, hint=hint) from error


def _records(batch: Any, source: str, before: int) -> list[dict[str, object] | DataError]:
    """The rows of a batch as Python's objects; `before` is the number of rows in front of it.

    A cell may hold what Python cannot: bytes that are no UTF-8 in a string, a date behind the year 9999, a time zone
    that this machine lacks. Then a DataError with the column is in the place of the row.
    """
    try:
        return list(batch.to_pylist())
    except MemoryError:
        raise
    except Exception:  # pyarrow, datetime and the library of time zones each raise their own
        return [_record(batch.slice(n, 1), source, before + n + 1) for n in range(batch.num_rows)]


def _record(row: Any, source: str, number: int) -> dict[str, object] | DataError:
    record = {}
    for name in row.schema.names:
        try:
            record[name] = row.column(name).to_pylist()[0]
        except MemoryError:
            raise
        except Exception as error:
            reason = shortened(f"{type(error).__name__}: {error}")
            message = f"column {shortened(name)!r} holds what cannot be read ({reason})."
            hint = "Take out the column or the row, or skip such rows with --skip-bad."
            return DataError(message, source=source, line=number, hint=hint)
    return record


def _check_names(names: Sequence[str], source: str) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        message = f"the table has two columns of the name {shortened(twice)!r}."
        raise DataError(message, source=source, hint="Rename one of them.")


def _check_groups(metadata: object, source: str) -> None:
    """A row group is decoded in one piece: what is said of its size is looked at before that."""
    for number in range(metadata.num_row_groups):  # type: ignore[attr-defined]
        size = metadata.row_group(number).total_byte_size  # type: ignore[attr-defined]
        if size > MAX_GROUP_BYTES or size < 0:
            message = f"row group {number + 1} holds {size:,} bytes, more than {MAX_GROUP_BYTES:,}."
            raise DataError(message, source=source, hint="Write the table with smaller row groups.")


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
}
