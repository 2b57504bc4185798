"""JSON and JSON Lines: records, and the tables that pandas and others write as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from octavo import bounded_json
from octavo.bounded_json import JsonError, shortened
from octavo.data.fields import kind
from octavo.data.files import MAX_DOCUMENT_BYTES, FileSection, decode, name_of, sections, suffix
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

# Bounds the memory of one JSON text: an empty object takes 3 bytes of text and 72 bytes of memory.
MAX_VALUES = 10_000_000
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# Keys under which one object holds all records: "data" in Alpaca and pandas, "rows" in the Hugging Face viewer.
_LISTS = ("data", "rows", "records", "examples", "train", "instances", "items")
# Keys that show that an object is itself a record.
_OF_RECORDS = {
    *("text", "content", "prompt", "completion", "messages", "conversations", "conversation", "instruction", "output"),
    *("question", "answer", "input"),
}
# Keys that may occur next to the list of records without being part of them, as may numbers, booleans and null.
_METADATA = {
    *("schema", "features", "columns", "column_names", "index", "index_names", "version", "license", "licence"),
    *("name", "title", "description", "author", "authors", "date", "created", "created_at", "updated", "updated_at"),
    *("source", "url", "homepage", "citation", "language", "lang", "info", "meta", "metadata", "dataset", "id"),
    *("dataset_name", "dataset_info", "config", "split", "type", "format", "status", "next", "previous", "model"),
}


def read_jsonl(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """One JSON object, or one string, per line. U+2028 and similar characters may be inside a string.

    A file of one list, one table, or one object over several lines, is read by `read_json`.
    """
    if _is_one_value(path):
        yield from read_json(path, split_on)
        return
    for section in sections(path, b"\n"):
        if section.data.strip():
            yield RawRecord(section.line, _json_line(section, name_of(path)), len(section.data))


def _is_one_value(path: Path) -> bool:
    """Whether the whole file is one list, one table, or one object over several lines."""
    lines = list(islice((section for section in sections(path, b"\n") if section.data.strip()), 2))
    first, second = (lines[0].data.strip() if lines else b""), (lines[1].data.strip() if len(lines) > 1 else b"")
    if first in (b"{", b"["):
        return True
    if not first.startswith((b"[", b"{")) or first.startswith(b"[["):
        return False
    if second:  # a complete value followed by more lines is JSON Lines
        opens = first.endswith((b",", b"{", b"[", b":"))
        return opens and (first.startswith(b"[") or not second.startswith(b"{"))
    source = name_of(path)
    try:
        value = parse(decode(lines[0], source), source)
        return isinstance(value, list) or (isinstance(value, dict) and table_rows(value) is not None)
    except DataError as error:
        return isinstance(error.__cause__, _TableError)


def read_json(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """A list of objects or strings, a table, or a single object. The line of a record is its number in the list.

    A table is {"data": [..]} or similar, or the output of pandas' to_json with the orient columns, index, split or
    records. Next to the list of records an object may hold metadata: numbers, and the keys in _METADATA. Any other key
    raises DataError.
    """
    source = name_of(path)
    for section in sections(path, None):
        value = parse(decode(section, source), source, of_lines=suffix(path) != ".json")
        rows = table_rows(value, source) if isinstance(value, dict) else value
        for number, record in enumerate(rows if isinstance(rows, list) else [value], start=1):
            yield RawRecord(number, _fields(record, source, number), 0)


class _TableError(ValueError):
    """The cause of a DataError about a table as a whole."""


def table_rows(value: Mapping[str, object], source: str = "") -> list[object] | None:
    """The rows of a table in one object; None for an object that is itself a record.

    A row that cannot be read is a DataError. Raises DataError for a table with unknown keys next to its rows.
    """
    columns = value.get("columns")
    for name in _LISTS:
        rows = value.get(name)
        if not isinstance(rows, list) or not rows:
            continue
        if isinstance(columns, list) and any(isinstance(row, list) for row in rows):
            _check_other_keys(value, name, source)
            return _cells_named(columns, rows, source)
        is_list = any(isinstance(row, dict) for row in rows) or all(isinstance(row, str) for row in rows)
        if is_list and not _OF_RECORDS & value.keys() and not _is_columns(value):
            _check_other_keys(value, name, source)
            return [_unwrapped(row, source, number) for number, row in enumerate(rows, start=1)]
    values = list(value.values())
    if values and all(isinstance(column, dict) and column for column in values):
        return _by_labels(value)
    if _is_columns(value):
        return [dict(zip(value, row, strict=True)) for row in zip(*values, strict=True)]
    return None


def _is_columns(value: Mapping[str, object]) -> bool:
    """Whether each field is a column: lists of equal length, none of which is the turns of one conversation."""
    columns = [column for column in value.values() if isinstance(column, list)]
    if not columns or len(columns) < len(value) or len({len(column) for column in columns}) > 1:
        return False
    names = {name.strip().lower() for name in value}
    if not names & _OF_RECORDS:
        return not names & {*_LISTS} and not any(isinstance(item, dict) for column in columns for item in column)
    turns = [column for name, column in zip(value, columns, strict=True) if name in _OF_RECORDS or name == "tools"]
    return not any(isinstance(item, dict) for column in turns for item in column)


def _check_other_keys(value: Mapping[str, object], name: str, source: str) -> None:
    """DataError for a key next to the list of records that is no metadata: no data may be lost silently."""
    for other, content in value.items():
        if other == name or other.strip().lower() in _METADATA or not content or isinstance(content, int | float):
            continue
        shown = shortened(repr(other))
        if isinstance(content, list) and any(isinstance(item, dict) for item in content):
            message = f"the object holds more than one list of records: {name!r} and {shown}."
            hint = "Write each list to a file of its own, and give octavo the files to train on."
        else:
            message = f"the object holds {shown} next to the records in {name!r}, and octavo has no use for it there."
            hint = "Remove it, or write it into each record that it belongs to."
        raise DataError(message, source=source, hint=hint) from _TableError()


def _cells_named(columns: Sequence[object], rows: Sequence[object], source: str) -> list[object]:
    names = [str(column) for column in columns]
    if len(set(names)) != len(names):
        duplicate = next(name for index, name in enumerate(names) if name in names[:index])
        message = f"the table has two columns of the name {shortened(duplicate)!r}."
        raise DataError(message, source=source, hint="Rename one of them.") from _TableError()
    named: list[object] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, list) and len(row) == len(names):
            named.append(dict(zip(names, row, strict=True)))
            continue
        cells = f"{len(row):,} cells" if isinstance(row, list) else "no list of cells"
        message = f"row {number:,} holds {cells}, but the table has {len(names):,} columns."
        named.append(DataError(message, source=source, line=number, hint="Correct the row, or use --skip-bad."))
    return named


def _unwrapped(row: object, source: str, number: int) -> object:
    """The record in a row of the Hugging Face viewer, which also has a row number and a list of truncated cells."""
    if not isinstance(row, dict) or "row_idx" not in row or "row" not in row:
        return row
    if row.get("truncated_cells"):
        message = f"row {number:,} has cells that were cut: {shortened(str(row['truncated_cells']))}."
        return DataError(message, source=source, line=number, hint="Fetch the data set's files in place of its pages.")
    return row["row"]


def _by_labels(value: Mapping[str, object]) -> list[object] | None:
    """The records of pandas' {column: {label: cell}} or {label: {column: cell}}. Labels are mostly numbers."""
    values = [item for item in value.values() if isinstance(item, dict)]
    if all(label.isdecimal() for label in value):
        return [*values]
    labels = dict.fromkeys(label for item in values for label in item)
    if not all(str(label).isdecimal() for label in labels):
        return None
    return [{name: item.get(label) for name, item in zip(value, values, strict=True)} for label in labels]


def _json_line(section: FileSection, source: str) -> Mapping[str, object] | str | DataError:
    try:
        value = parse(decode(section, source), source, section.line)
    except DataError as error:
        return error
    return _fields(value, source, section.line)


def parse(text: str, source: str, line: int = 0, *, of_lines: bool = False) -> object:
    """The value of a JSON text. `line` is the line of a JSON Lines record, or 0 for a whole file.

    Raises DataError for invalid JSON, a duplicate key in an object, and more than MAX_VALUES values.
    """
    try:
        _check_count(text)
        return bounded_json.parse(text, max_bytes=MAX_DOCUMENT_BYTES, max_values=len(text), strict=False)
    except JsonError as error:
        cause = error.__cause__
        hint = "Correct the record, or skip such records with --skip-bad."
        if not isinstance(cause, json.JSONDecodeError):
            raise DataError(f"JSON that cannot be read: {error}.", source=source, line=line, hint=hint) from error
        message = f"not valid JSON: {cause.msg}, at character {cause.colno}."
        if cause.msg == "Extra data" and not line and of_lines:
            message = "more than one JSON value, of which one takes several lines."
            hint = "Write one record a line: jq -c . OLD > NEW."
        elif cause.msg == "Extra data" and not line:
            message, hint = (
                "more than one JSON value in a .json file.",
                "If it holds one record a line, name it .jsonl.",
            )
        raise DataError(message, source=source, line=line or cause.lineno, hint=hint) from error


def _check_count(text: str) -> None:
    """JsonError for more than MAX_VALUES values, before they are parsed and take memory."""

    def upper_bound(text: str) -> int:
        return text.count(",") + text.count("[") + text.count("{")

    if upper_bound(text) > MAX_VALUES and upper_bound(_STRING.sub("", text)) > MAX_VALUES:
        raise JsonError(f"it holds more than {MAX_VALUES:,} values; a .jsonl file of one record a line has no limit")


def _fields(value: object, source: str, line: int) -> Mapping[str, object] | str | DataError:
    if isinstance(value, dict | DataError):
        return value
    if isinstance(value, str):
        return value if value.strip() else DataError("the record is an empty string.", source=source, line=line)
    hint = 'A record looks like {"text": "..."}.'
    return DataError(f"the record is {kind(value)}, not an object.", source=source, line=line, hint=hint)
