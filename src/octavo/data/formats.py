"""File formats: one reader each, from a path to RawRecords. To add a format, write a reader and list it in READERS.

A reader yields a string for plain text and a mapping for named fields. For a record that it cannot read it yields a
DataError and continues with the next record. It raises DataError if the rest of the file cannot be read.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.bounded_json import shortened
from octavo.data.extract.docx import read_docx
from octavo.data.extract.epub import read_epub
from octavo.data.extract.front_matter import MAX_FRONT_MATTER_BYTES, front_matter
from octavo.data.extract.odt import read_odt
from octavo.data.extract.pdf_worker import PdfWorker, read_pdf
from octavo.data.extract.rst import read_rst
from octavo.data.files import (
    CHUNK_BYTES,
    MAX_RATIO,
    SAMPLE_BYTES,
    SURE_BYTES,
    decode,
    line_ends,
    name_of,
    open_bytes,
    read_whole,
    sections,
    suffix,
)
from octavo.data.json_records import parse, read_json, read_jsonl
from octavo.data.markup import read_html, refuse_markup
from octavo.data.raw_records import RawRecord
from octavo.data.tables import read_csv, read_tsv
from octavo.errors import DataError, UsageError

Reader = Callable[[Path, str | None], Iterator[RawRecord]]
MAX_GROUP_BYTES = 2**30
_JSON_LINES = 20  # lines that are parsed; of the other lines only the first and last character are checked


def raw_records(path: Path, split_on: str | None = None, *, pdf: PdfWorker | None = None) -> Iterator[RawRecord]:
    """All records of one file.

    A file whose suffix is not in READERS is read as plain text, unless its suffix or first bytes show markup. HTML is
    then read as HTML, and other markup raises DataError with a next step. `split_on` splits plain text into documents:
    "lines", or a separator. Files of other formats consist of records. `pdf` reads PDF files; by default a process
    for this file alone.
    """
    ending = suffix(path)
    if ending == ".pdf" and pdf is not None:
        return iter([pdf.read(path)])
    if ending in READERS:
        return READERS[ending](path, split_on)
    refuse_markup(path, ending)
    root = _root(path)
    if root.startswith((b"<!doctype html", b"<html")):
        return read_html(path, split_on)
    if root == b"<?xml":
        refuse_markup(path, ".xml")
    return read_text(path, split_on)


def _root(path: Path) -> bytes:
    """The first tag after comments in lower case if it is HTML's, else the first 5 bytes of the file."""
    with open_bytes(path) as stream:
        head = stream.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    at = 0
    while head.startswith((b"<?", b"<!--"), at):
        mark = b"-->" if head.startswith(b"<!--", at) else b"?>"
        at = head.find(mark, at) + len(mark)
        if at < len(mark):
            return head[:5]
        at += len(head[at : at + SAMPLE_BYTES]) - len(head[at : at + SAMPLE_BYTES].lstrip())
    tag = head[at : at + 15].lower()
    return tag if tag.startswith((b"<!doctype html", b"<html")) else head[:5]


def read_markdown(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """Markdown as plain text, without the front matter: settings in YAML or TOML before the text."""
    with open_bytes(path) as stream:
        n_bytes = front_matter(stream.read(MAX_FRONT_MATTER_BYTES))
    records = read_text(path, split_on, start=n_bytes)
    if not n_bytes:
        yield from records
        return
    first = next(records, RawRecord(1, "", 0))
    yield replace(first, removed={"front matter": 1})
    yield from records


def read_text(path: Path, split_on: str | None, *, start: int = 0) -> Iterator[RawRecord]:
    """Plain text; `\\r\\n` and `\\r` become `\\n`. Blank sections between separators are left out.

    Line breaks next to a separator belong to the separator, not to the documents. The first `start` bytes of the file
    are left out. Raises DataError for a file of JSON records.
    """
    _refuse_json(path)
    by_line = split_on == "lines"
    separator = b"\n" if by_line else split_on.encode() if split_on else None
    source = name_of(path)
    for section in sections(path, separator):
        if section.offset < start:
            cut = start - section.offset
            number = section.line + line_ends(section.data, 0, cut)
            section = replace(section, offset=start, line=number, data=section.data[cut:])
        try:
            text = decode(section, source).replace("\r\n", "\n").replace("\r", "\n")
        except DataError as error:
            yield RawRecord(error.line, error, len(section.data))
            continue
        line = section.line
        if separator:
            text_start = text.lstrip("\n")
            line += len(text) - len(text_start)
            text = text_start.rstrip("\n")
        if text.strip():
            yield RawRecord(line, text, len(section.data))


def _refuse_json(path: Path) -> None:
    """DataError for JSON records under another suffix: their braces and field names would be trained on."""
    with open_bytes(path) as stream:
        head = stream.read(SAMPLE_BYTES)
    begin = re.match(rb"(?:\xef\xbb\xbf)?\s*(\{|\[\s*\{)|\xff\xfe|\xfe\xff", head)
    if begin is None:
        return
    if _each_line_is_an_object(path):
        what, ending = "each line is a JSON object: this is JSON Lines.", ".jsonl"
    elif path.stat().st_size <= SURE_BYTES and any(_is_records(section.data) for section in sections(path, None)):
        what, ending = "the file is one JSON value.", ".json"
    else:
        return
    hint = (
        f"Name the file {ending}, so that its fields are read. To train on the JSON itself, put each text into the "
        'field `text` of a .jsonl file: jq -cR "{text: .}" OLD > NEW.'
    )
    raise DataError(what, source=name_of(path), hint=hint)


def _each_line_is_an_object(path: Path) -> bool:
    n_lines = 0
    for section in sections(path, b"\n"):
        line = section.data.strip()
        if not line:
            continue
        n_lines += 1
        if not (line.startswith(b"{") and line.endswith(b"}")) or (n_lines <= _JSON_LINES and not _is_records(line)):
            return False
    return n_lines > 0


def _is_records(data: bytes) -> bool:
    """Whether the bytes are a JSON object with fields, or a list of such objects."""
    try:
        value = parse(data.decode("utf-8"), "")
    except (DataError, UnicodeDecodeError):
        return False
    records = value if isinstance(value, list) else [value]
    return bool(value) and all(isinstance(record, dict) and record for record in records)


def read_parquet(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """A parquet table, row by row. The line of a record is its row number. Needs pyarrow.

    All objects of a parquet column share one set of fields. Fields that an object lacks are null, and are removed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        hint = "Install it: pip install 'octavo[parquet]'"
        raise UsageError(f"{name_of(path)}: parquet files need pyarrow, which is not installed.", hint=hint) from error
    source = name_of(path)
    number, n_bytes = 0, 0
    with open_bytes(path) as stream:
        # A compressed stream cannot seek to the footer of the table, which is at the end.
        data = stream if suffix(path) == path.suffix.lower() else pyarrow.BufferReader(read_whole(stream, source))
        try:
            table = parquet.ParquetFile(data)
            _check_names(table.schema_arrow.names, source)
            _check_groups(table.metadata, source)
            most = max(SURE_BYTES, MAX_RATIO * path.stat().st_size)
            for batch in table.iter_batches(batch_size=256):
                n_bytes += batch.nbytes
                if n_bytes > most:  # one long string, stored once for all rows
                    message = f"the table swells to more than {MAX_RATIO} times the file's size."
                    raise DataError(message, source=source, line=number, hint="Write a new table of the rows you need.")
                for record in _records(batch, source, number):
                    number += 1
                    yield RawRecord(number, record, 0)
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            hint = "The file was cut short or damaged: fetch it again."
            raise DataError(f"not valid parquet: {error}", source=source, line=number, hint=hint) from error


def _records(batch: Any, source: str, before: int) -> list[dict[str, object] | DataError]:
    """The rows of a batch as Python objects. `before` is the number of rows before the batch.

    A cell may hold a value that Python has no type for: a string that is not UTF-8, a date after the year 9999, a time
    zone that this machine does not have. Then a DataError that names the column takes the row's place.
    """
    try:
        return [{name: _without_nulls(value) for name, value in row.items()} for row in batch.to_pylist()]
    except MemoryError:
        raise
    except Exception:  # pyarrow, datetime and the time zone library each raise classes of their own
        return [_record(batch.slice(n, 1), source, before + n + 1) for n in range(batch.num_rows)]


def _record(row: Any, source: str, number: int) -> dict[str, object] | DataError:
    record = {}
    for name in row.schema.names:
        try:
            record[name] = _without_nulls(row.column(name).to_pylist()[0])
        except MemoryError:
            raise
        except Exception as error:
            reason = shortened(f"{type(error).__name__}: {error}")
            message = f"column {shortened(name)!r} holds what cannot be read ({reason})."
            hint = "Remove the column or the row, or skip such rows with --skip-bad."
            return DataError(message, source=source, line=number, hint=hint)
    return record


def _without_nulls(value: Any) -> Any:
    """`value` without null fields of objects, at every depth. Null items of lists carry meaning and are kept."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_names(names: Sequence[str], source: str) -> None:
    duplicate = next((name for name, count in Counter(names).items() if count > 1), None)
    if duplicate is not None:
        message = f"the table has two columns of the name {shortened(duplicate)!r}."
        raise DataError(message, source=source, hint="Rename one of them.")


def _check_groups(metadata: object, source: str) -> None:
    """A row group is decoded at once, so the size in its metadata is checked before."""
    for number in range(metadata.num_row_groups):  # type: ignore[attr-defined]
        size = metadata.row_group(number).total_byte_size  # type: ignore[attr-defined]
        if size > MAX_GROUP_BYTES or size < 0:
            message = f"row group {number + 1} holds {size:,} bytes, more than {MAX_GROUP_BYTES:,}."
            raise DataError(message, source=source, hint="Write the table with smaller row groups.")


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".md": read_markdown,
    ".rst": read_rst,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".jsonlines": read_jsonl,
    ".jl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".tab": read_tsv,
    ".parquet": read_parquet,
    ".docx": read_docx,
    ".odt": read_odt,
    ".pdf": read_pdf,
    ".epub": read_epub,
    ".html": read_html,
    ".htm": read_html,
    ".xhtml": read_html,
}
