"""JSON and JSON Lines: one record each, and the tables that pandas and others write as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from octavo.data.entries import Entry
from octavo.data.files import Piece, decode, name_of, pieces
from octavo.errors import DataError

# Where one object holds all records: Alpaca's and pandas' "data", the hub's "rows", and their like.
_LISTS = ("data", "rows", "records", "examples", "train", "instances", "items")
# Names that say that an object is a record itself.
_OF_RECORDS = {
    *("text", "content", "prompt", "completion", "messages", "conversations", "conversation", "instruction", "output"),
    *("question", "answer", "input"),
}


def read_jsonl(path: Path, split_on: str | None) -> Iterator[Entry]:
    """One JSON object, or one string, a line. Only `\\n` ends a line: U+2028 and its like may stand inside a string.

    A file that begins with a list, or with an object that goes on behind its first line, is read as `read_json` does.
    """
    if _is_one_value(path):
        yield from read_json(path, split_on)
        return
    for piece in pieces(path, b"\n"):
        if piece.data.strip():
            yield Entry(piece.line, _json_line(piece, name_of(path)), len(piece.data))


def _is_one_value(path: Path) -> bool:
    """Whether the first line is the beginning of one value that takes the whole file."""
    first = next((piece.data.strip() for piece in pieces(path, b"\n") if piece.data.strip()), b"")
    if first in (b"{", b"["):
        return True
    if not first.startswith(b"[") or first.startswith(b"[["):
        return False
    try:  # a list in one line is the whole file; where more lines follow, each should have been an object
        return isinstance(json.loads(first), list) and sum(1 for p in pieces(path, b"\n") if p.data.strip()) == 1
    except (ValueError, RecursionError):
        return first.endswith((b",", b"{"))


def read_json(path: Path, split_on: str | None) -> Iterator[Entry]:
    """A list of objects or strings, a table, or a single object; an entry's line is its number in the list.

    A table is {"data": [..]} or its like, or what pandas' to_json writes: columns, index, split or records.
    """
    source = name_of(path)
    for piece in pieces(path, None):
        value = parse(decode(piece, source), source)
        rows = table_rows(value, source) if isinstance(value, dict) else value
        for number, record in enumerate(rows if isinstance(rows, list) else [value], start=1):
            yield Entry(number, _fields(record, source, number), 0)


def table_rows(value: Mapping[str, object], source: str = "") -> list[object] | None:
    """The rows of a table in one object; None for an object that is a record itself."""
    for name in _LISTS:
        rows = value.get(name)
        if not isinstance(rows, list) or not rows:
            continue
        columns = value.get("columns")
        if all(isinstance(row, list) for row in rows) and isinstance(columns, list):
            return [dict(zip(map(str, columns), row, strict=False)) for row in rows]
        if all(isinstance(row, dict | str) for row in rows) and not _OF_RECORDS & value.keys():
            return [row["row"] if isinstance(row, dict) and "row_idx" in row and "row" in row else row for row in rows]
    columns_or_index = list(value.values())
    if columns_or_index and all(isinstance(inner, dict) and inner for inner in columns_or_index):
        return _by_labels(value)
    if columns_or_index and all(isinstance(inner, list) for inner in columns_or_index):
        lengths = {len(inner) for inner in columns_or_index if isinstance(inner, list)}
        scalars = all(isinstance(item, str) for inner in columns_or_index if isinstance(inner, list) for item in inner)
        if len(lengths) == 1 and scalars:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns_or_index, strict=True)]
    return None


def _by_labels(value: Mapping[str, object]) -> list[object] | None:
    """pandas' {column: {label: cell}} or {label: {column: cell}}: labels are mostly numbers, columns are not."""
    inner = [item for item in value.values() if isinstance(item, dict)]
    if all(label.isdecimal() for label in value):
        return [*inner]
    labels = dict.fromkeys(label for item in inner for label in item)
    if not all(str(label).isdecimal() for label in labels):
        return None
    return [{name: item.get(label) for name, item in zip(value, inner, strict=True)} for label in labels]


def _json_line(piece: Piece, source: str) -> Mapping[str, object] | str | DataError:
    try:
        value = parse(decode(piece, source), source, piece.line)
    except DataError as error:
        return error
    return _fields(value, source, piece.line)


def parse(text: str, source: str, line: int = 0) -> object:
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


def _fields(value: object, source: str, line: int) -> Mapping[str, object] | str | DataError:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return value if value.strip() else DataError("the record is an empty string.", source=source, line=line)
    hint = 'A record looks like {"text": "..."}.'
    return DataError(f"the record is a {type(value).__name__}, not an object.", source=source, line=line, hint=hint)
