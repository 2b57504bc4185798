from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from octavo.data import formats
from octavo.data.formats import raw_records
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError, UsageError


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def values(path: Path, split_on: str | None = None) -> list[object]:
    return [record.value for record in raw_records(path, split_on)]


def error_of(record: RawRecord) -> str:
    assert isinstance(record.value, DataError)
    return str(record.value)


def test_a_text_file_is_one_document_with_normalized_line_ends(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.md", "one\r\n two\rthree\n")) == ["one\n two\nthree\n"]


def test_each_line_that_is_not_blank_becomes_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\n\r\n  \ntwo\u2028still two\nthree")
    assert [(record.line, record.value) for record in raw_records(path, "lines")] == [
        (1, "one"),
        (4, "two\u2028still two"),
        (5, "three"),
    ]


def test_a_separator_is_removed_with_the_line_breaks_around_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\nmore\n<|endoftext|>\n\ntwo<|endoftext|>three\n<|endoftext|>\n")
    assert [(record.line, record.value) for record in raw_records(path, "<|endoftext|>")] == [
        (1, "one\nmore"),
        (5, "two"),
        (5, "three"),
    ]


def test_documents_after_a_bad_one_are_read(tmp_path: Path) -> None:
    first, bad, last = raw_records(write(tmp_path / "a.txt", b"one\ntw\xffo\nthree\n"), "lines")
    assert (first.value, last.value) == ("one", "three")
    assert "a.txt:2: byte 6" in error_of(bad)
    assert bad.n_bytes == 4


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_json_lines_round_trip_any_text(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    write(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts))
    assert values(path) == [{"text": text} for text in texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut off', "not valid JSON: Unterminated string starting at, at character 10"),
        ('["text"]', "the record is a list, not an object"),
        ("[" * 100_000, "JSON that cannot be read"),
        ('{"text": ' + "1" * 5000 + "}", "JSON that cannot be read"),
        (b'{"text": "\xff"}', "byte 24 "),
    ],
)
def test_a_bad_json_line_is_an_entry_with_an_error(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + raw + b'\n{"text": "b"}')
    first, bad, last = raw_records(path)
    assert (first.value, last.value) == ({"text": "a"}, {"text": "b"})
    assert f"a.jsonl:2: {message}" in error_of(bad)


def test_a_json_list_gives_numbered_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"text": "a"}, 7]')
    first, second = raw_records(path)
    assert (first.line, first.value, second.line) == (1, {"text": "a"}, 2)
    assert "a.json:2: the record is a number" in error_of(second)


def test_the_error_of_json_lines_named_json_suggests_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json:2: more than one.*\n.*name it \.jsonl"):
        values(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'))


@given(st.lists(st.tuples(st.text("ab,\"'\n ü;", min_size=1), st.text('x\n",')), min_size=1, max_size=6))
def test_csv_round_trips_any_field(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([("prompt", "completion"), *rows])
    path = write(tmp_path_factory.getbasetemp() / "any.csv", table.getvalue())
    assert values(path) == [{"prompt": a, "completion": b} for a, b in rows if a.strip() or b.strip()]


def test_csv_rows_have_their_first_line_and_bad_rows_are_errors(tmp_path: Path) -> None:
    table = b'text,extra\n"two\nlines",1\nonly one\n"a"b,2\nla\xffst,3\ngood,4\n\n"open,5\n'
    actual = list(raw_records(write(tmp_path / "a.csv", table)))
    assert [record.line for record in actual] == [2, 4, 5, 6, 7, 9]
    assert actual[0].value == {"text": "two\nlines", "extra": "1"}
    assert actual[4].value == {"text": "good", "extra": "4"}
    for record, message in zip(actual[1:4], ["4: 1 fields, but", "5: not valid CSV", "6: byte 43"], strict=True):
        assert f"a.csv:{message}" in error_of(record)
    assert "a.csv:9: not valid CSV: unexpected end" in error_of(actual[5])


def test_csv_accepts_long_fields_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ufefftext , n\r\n" + "x" * 200_000 + ",1\r\n")
    assert values(path) == [{"text": "x" * 200_000, "n": "1"}]


def test_a_csv_file_that_cannot_be_read_at_all_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="binary"):
        values(write(tmp_path / "a.csv", b"text\n\0\0\0\x01"))


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_gives_rows_with_nested_fields(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, Any]] = [
        {"text": None, "messages": [{"role": "user", "content": "a"}]},
        {"text": "b\n", "messages": None},
    ]
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    data = table.getvalue()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    assert values(path) == rows
    with pytest.raises(DataError, match="not valid parquet"):
        values(write(tmp_path / "broken.parquet", data[:-20]))


def test_missing_fields_of_parquet_objects_are_not_null(tmp_path: Path) -> None:
    calls: list[Any] = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [None, "b"]}}]
    parquet.write_table(pyarrow.table({"calls": [calls], "other": [None]}), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"calls": calls, "other": None}]


def test_parquet_without_pyarrow_raises_an_error_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'octavo\[parquet\]'"):
        values(write(tmp_path / "a.parquet", b""))


def test_a_parquet_table_that_expands_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long string, which the file stores once for all rows."""
    parquet.write_table(pyarrow.table({"text": ["x" * 10_000] * 5_000}), tmp_path / "a.parquet")
    monkeypatch.setattr(formats, "SURE_BYTES", 2**20)
    read: list[RawRecord] = []
    with pytest.raises(DataError, match="the table swells to more than 200 times"):
        read.extend(raw_records(tmp_path / "a.parquet"))
    assert len(read) < 1000
    monkeypatch.setattr(formats, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(DataError, match=r"row group 1 holds [\d,]+ bytes, more than 1,000"):
        list(raw_records(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (pyarrow.array([b"a", b"\xff\xfe", b"b"]).view(pyarrow.string()), "UnicodeDecodeError"),
        (pyarrow.array([0, 2**62, 1]).view(pyarrow.timestamp("us")), "OverflowError"),
        (pyarrow.array([0, 2**30, 1], pyarrow.int32()).view(pyarrow.date32()), "OverflowError"),
    ],
)
def test_a_parquet_cell_that_python_cannot_hold_is_a_bad_row(tmp_path: Path, cells: Any, reason: str) -> None:
    table = pyarrow.table({"text": ["one", "two", "three"], "other": cells})
    parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    first, bad, last = raw_records(tmp_path / "a.parquet")
    assert isinstance(first.value, dict)
    assert isinstance(last.value, dict)
    assert (first.value["text"], last.value["text"], last.line) == ("one", "three", 3)
    assert f"a.parquet:2: column 'other' holds what cannot be read ({reason}" in error_of(bad)


def test_a_parquet_row_with_an_unknown_time_zone_is_a_bad_row(tmp_path: Path) -> None:
    zone = pyarrow.timestamp("us", "Mars/Phobos")
    parquet.write_table(pyarrow.table({"text": ["a"], "t": pyarrow.array([1], zone)}), tmp_path / "a.parquet")
    (bad,) = raw_records(tmp_path / "a.parquet")
    assert "a.parquet:1: column 't' holds what cannot be read" in error_of(bad)


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["A"]), pyarrow.array(["B"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns of the name 'text'"):
        values(tmp_path / "a.parquet")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_separates_lines_and_records(tmp_path: Path, end: str) -> None:
    def written(name: str, text: str) -> Path:
        return write(tmp_path / name, text.replace("\n", end))

    lines = [(record.line, record.value) for record in raw_records(written("a.txt", "one\n\ntwo\n"), "lines")]
    assert lines == [(1, "one"), (3, "two")]
    records = list(raw_records(written("a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')))
    assert [(record.line, record.value) for record in records] == [(1, {"text": "a"}), (3, {"text": "b"})]
    assert values(written("a.csv", 'text\n"a\nb"\nc\n')) == [{"text": "a\nb"}, {"text": "c"}]


def test_a_separator_matches_any_kind_of_line_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\ntwo\r\nthree\n\nfour\r\n\r\nfive\r\rsix\r\n\nseven\r\neight")
    actual = [(record.line, record.value) for record in raw_records(path, "\n\n")]
    assert actual == [(1, "one"), (3, "two\nthree"), (6, "four"), (8, "five"), (10, "six"), (12, "seven\neight")]


@pytest.mark.parametrize("name", ["a.jl", "a.jsonlines", "a.ndjson", "a.JSONL.gz"])
def test_json_lines_have_several_suffixes(tmp_path: Path, name: str) -> None:
    data = b'{"text": "a"}\n{"text": "b"}\n'
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    assert values(path) == [{"text": "a"}, {"text": "b"}]


def test_tab_separated_tables_have_two_suffixes(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.tab", "text\tn\na\t1\n")) == [{"text": "a", "n": "1"}]


@pytest.mark.parametrize("name", ["a.jsonl.txt", "a", "a.data", "a.md"])
@pytest.mark.parametrize("split_on", [None, "lines"])
def test_json_lines_that_are_named_as_text_are_refused(tmp_path: Path, name: str, split_on: str | None) -> None:
    with pytest.raises(DataError, match=r"each line is a JSON object.*\n.*Name the file \.jsonl"):
        values(write(tmp_path / name, '{"text": "a"}\n\n {"text": "b"}\r\n'), split_on)


@pytest.mark.parametrize("text", ['[{"text": "a"},\n{"text": "b"}]', '{\n "text": "a"\n}'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_that_is_named_as_text_is_refused(tmp_path: Path, text: str, encoding: str) -> None:
    with pytest.raises(DataError, match=r"the file is one JSON value.*\n.*Name the file \.json,"):
        values(write(tmp_path / "a.txt", text.encode(encoding)))


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "a"}\nis a record.\n',
        '{"text": "a"}\n' * 100 + "and so on.",
        "{braces} are no JSON, {but} {prose}",
        "{}",
        "[1]\n",
        '"said"\n',
        "{\n}\n",
        '[{"a": 1}, "and prose"]',
        '[{"a": 1}] {says the author}',
    ],
)
def test_prose_with_json_in_it_is_text(tmp_path: Path, text: str) -> None:
    assert values(write(tmp_path / "a.txt", text)) == [text]
