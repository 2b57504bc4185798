"""JSON records in the formats of many programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo import bounded_json
from octavo.data import json_records
from octavo.data.formats import raw_records
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
    return [str(e.value) if isinstance(e.value, DataError) else e.value for e in raw_records(path)]


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("indent", [None, 1])
def test_tables_of_every_form_give_their_rows(tmp_path: Path, form: str, indent: int | None) -> None:
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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train": [{"text": "A"}], "test": [{"text": "B"}]}, "more than one list of records: 'train' and 'test'"),
        ({"data": [{"text": "A"}], "system_prompt": "X"}, "holds 'system_prompt' next to the records in 'data'"),
        ({"data": [{"text": "A"}], "tools": [1]}, "holds 'tools' next to"),
        ({"columns": ["text", "text"], "data": [["a", "b"]]}, "two columns of the name 'text'"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_unknown_key_next_to_the_records_is_an_error(tmp_path: Path, name: str, value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        values(tmp_path / name, value)


def test_metadata_is_allowed_next_to_the_records(tmp_path: Path) -> None:
    page = {"features": [{"name": "text"}], "rows": RECORDS, "num_rows_total": 7, "partial": False, "next": "", "x": []}
    assert values(tmp_path / "a.json", page) == RECORDS


def test_rows_of_a_wrong_length_or_type_are_errors_with_their_number(tmp_path: Path) -> None:
    table = {"columns": ["text"], "data": [["a"], ["b", "c"], [], "d", ["e"]]}
    first, *bad, last = values(tmp_path / "a.json", table)
    assert (first, last) == ({"text": "a"}, {"text": "e"})
    for n, error in enumerate(bad, start=2):
        assert f"a.json:{n}: row {n} holds" in str(error)
    cut = {"rows": [{"row_idx": 0, "row": {"text": "a"}, "truncated_cells": ["text"]}]}
    assert "row 1 has cells that were cut" in str(values(tmp_path / "b.json", cut)[0])
    _, mixed = values(tmp_path / "c.json", {"data": [{"text": "a"}, 7]})
    assert "c.json:2: the record is a number" in str(mixed)


def test_a_key_that_occurs_twice_is_an_error(tmp_path: Path) -> None:
    twice = '{"text": "A", "text": "B"}'
    good, bad, last = values(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{twice}\n{{"text": "b"}}')
    assert (good, last) == ({"text": "a"}, {"text": "b"})
    assert "a.jsonl:2: JSON that cannot be read: the key 'text' occurs twice" in str(bad)
    with pytest.raises(DataError, match="the key 'text' occurs twice"):
        values(tmp_path / "a.json", f"[{twice}]")


def test_the_number_of_values_is_bounded_before_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_VALUES", 100)
    parsed: list[str] = []
    monkeypatch.setattr(bounded_json, "parse", lambda text, **_: parsed.append(text))
    many = "[" + "{}," * 60 + "{}]"
    with pytest.raises(DataError, match=r"more than 100 values; a \.jsonl file of one record a line has no limit"):
        values(tmp_path / "a.json", many)
    (bad,) = values(tmp_path / "a.jsonl", many)
    assert "more than 100 values" in str(bad)
    assert not parsed
    values(tmp_path / "a.json", [{"text": "one, [two], {three} and \\" * 60}])  # separators in strings are no values
    assert len(parsed) == 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("value", "rows"),
    [
        ({"data": [{"text": "A"}]}, [{"text": "A"}]),
        ({"text": {"0": "A", "1": "B"}}, [{"text": "A"}, {"text": "B"}]),
        ({"text": ["a", "b"], "n": [1, None]}, [{"text": "a", "n": 1}, {"text": "b", "n": None}]),
        ({"Frage": ["a", "b"], "n": [1, 2]}, [{"Frage": "a", "n": 1}, {"Frage": "b", "n": 2}]),
        ({"text": ["a"], "meta": [{"n": 1}]}, [{"text": "a", "meta": {"n": 1}}]),
        ({"text": ["a"], "items": [{"n": 1}]}, [{"text": "a", "items": {"n": 1}}]),
        ({"messages": [[{"role": "user"}], []]}, [{"messages": [{"role": "user"}]}, {"messages": []}]),
    ],
)
def test_a_table_in_one_line_is_its_rows(tmp_path: Path, name: str, value: object, rows: list[object]) -> None:
    assert values(tmp_path / name, value) == rows


@pytest.mark.parametrize("text", ['{"text":\n"a",\n"n": 1}', '{ "text": "a",\n  "n": 1 }', '\n{"text": "a", "n":\n1}'])
def test_one_object_over_several_lines_is_one_record(tmp_path: Path, text: str) -> None:
    assert values(tmp_path / "a.jsonl", text) == [{"text": "a", "n": 1}]


def test_several_objects_over_several_lines_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more than one JSON value.*\n.*jq -c"):
        values(tmp_path / "a.jsonl", json.dumps(RECORDS[0], indent=1) + "\n" + json.dumps(RECORDS[1], indent=1))


def test_a_first_line_that_is_cut_off_is_one_bad_record(tmp_path: Path) -> None:
    bad, good = values(tmp_path / "a.jsonl", '{"text": "a",\n{"text": "b"}')
    assert "a.jsonl:1: not valid JSON" in str(bad)
    assert good == {"text": "b"}
