"""Records in JSON, whatever program wrote the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.data.formats import entries
from octavo.errors import DataError

RECORDS: list[dict[str, Any]] = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
COLUMNS = ["prompt", "completion"]
TABLES: dict[str, Any] = {
    "records": RECORDS,
    "columns": {name: {str(n): row[name] for n, row in enumerate(RECORDS)} for name in COLUMNS},
    "index": {str(n): row for n, row in enumerate(RECORDS)},
    "split": {"columns": COLUMNS, "index": [0, 1], "data": [list(row.values()) for row in RECORDS]},
    "table": {"schema": {"fields": [], "pandas_version": "1.4.0"}, "data": RECORDS},
    "lists": {name: [row[name] for row in RECORDS] for name in COLUMNS},
    "data": {"version": "1", "data": RECORDS},
    "rows": {"rows": [{"row_idx": n, "row": row} for n, row in enumerate(RECORDS)]},
}


def values(path: Path, value: object, *, indent: int | None = None) -> list[object]:
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
    return [str(e.value) if isinstance(e.value, DataError) else e.value for e in entries(path)]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("indent", [None, 1])
def test_tables_of_every_form_are_their_rows(tmp_path: Path, form: str, indent: int | None) -> None:
    assert values(tmp_path / "a.json", TABLES[form], indent=indent) == RECORDS


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_jsonl_file_is_read(tmp_path: Path, indent: int | None) -> None:
    assert values(tmp_path / "a.jsonl", RECORDS, indent=indent) == RECORDS
    assert values(tmp_path / "b.jsonl", "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n") == RECORDS
    assert values(tmp_path / "c.jsonl", RECORDS[0], indent=2) == RECORDS[:1]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_strings_are_texts(tmp_path: Path, name: str) -> None:
    lines = '"one"\n"two"\n' if name == "a.jsonl" else '["one", "two"]'
    assert values(tmp_path / name, lines) == ["one", "two"]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "t", "data": [{"a": 1}]},
        {"messages": [{"role": "assistant", "content": "b"}], "tools": [{"name": "f"}]},
        {"prompt": {"a": 1}, "completion": {"b": 2}},
        {},
    ],
)
def test_a_record_alone_is_no_table(tmp_path: Path, record: dict[str, Any]) -> None:
    assert values(tmp_path / "a.json", record) == [record]
    assert values(tmp_path / "a.jsonl", json.dumps(record) + "\n" + json.dumps(record)) == [record, record]
