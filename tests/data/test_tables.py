"""Delimited text: separators, line breaks in cells, and tables that are too wide."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data.formats import raw_records
from octavo.errors import DataError

ROWS = [("What, then?", 'Three; "four" | or\tfive.'), ("How many?", "One\nand two"), ("", "x")]


def values(path: Path, text: str | bytes) -> list[object]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [str(e.value) if isinstance(e.value, DataError) else e.value for e in raw_records(path)]


def written(separator: str, rows: list[tuple[str, ...]], end: str = "\n") -> str:
    table = io.StringIO()
    csv.writer(table, delimiter=separator, lineterminator=end).writerows(rows)
    return table.getvalue()


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_separator_is_found(tmp_path: Path, separator: str, name: str, end: str) -> None:
    if name == "a.tsv" and separator != "\t":
        return
    table = written(separator, [("prompt", "completion"), *ROWS], end)
    assert values(tmp_path / name, table) == [{"prompt": p, "completion": c} for p, c in ROWS]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("text\na;b\n", [{"text": "a;b"}]),
        ("sep=;\na;b\n1,2;3\n", [{"a": "1,2", "b": "3"}]),
        ("a,b;c\n1,2;3\n4,5\n", [{"a": "1", "b;c": "2;3"}, {"a": "4", "b;c": "5"}]),
        ("a;b,c\n1;2\n3;4,5\n6;7\n", [{"a": "1", "b,c": "2"}, {"a": "3", "b,c": "4,5"}, {"a": "6", "b,c": "7"}]),
        ('text\n"one\r\ntwo\rthree"\n', [{"text": "one\ntwo\nthree"}]),
        ("a,b\r1,2\r3,4\r", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("\ufeffa;b\n1;2\n", [{"a": "1", "b": "2"}]),
        (";;\na;b\n\n1;2\n;\n ;\t\n;;;\n", [{"a": "1", "b": "2"}]),
    ],
)
def test_tables_in_common_variants(tmp_path: Path, table: str, expected: list[object]) -> None:
    assert values(tmp_path / "a.csv", table) == expected


@given(
    rows=st.lists(
        st.tuples(st.text("ab\n;,|\t\" '\r", max_size=9), st.text("xy,;|\t\n", max_size=9)), min_size=2, max_size=9
    ),
    separator=st.sampled_from(",;\t|"),
)
def test_any_table_of_quoted_cells_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], separator: str
) -> None:
    table = io.StringIO()
    writer = csv.writer(table, delimiter=separator, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion"), *rows])
    plain = [[cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row] for row in rows]
    path = tmp_path_factory.getbasetemp() / "any.csv"
    assert values(path, table.getvalue()) == [
        {"prompt": a, "completion": b} for a, b in plain if a.strip() or b.strip()
    ]


def test_a_table_too_wide_or_with_one_name_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the header names 5,000 columns") as caught:
        values(tmp_path / "a.csv", ",".join(f"c{n}" for n in range(5000)) + "\n1\n")
    assert len(str(caught.value)) < 400
    with pytest.raises(DataError, match="names the column 'a' twice"):
        values(tmp_path / "a.csv", "a,b,a\n1,2,3\n")


def test_messages_about_short_rows_do_not_repeat_the_header(tmp_path: Path) -> None:
    header = ",".join(f"a rather long column {n}" for n in range(2000))
    (message,) = values(tmp_path / "a.csv", f"{header}\n1\n")
    assert isinstance(message, str)
    assert "1 fields, but the header names 2,000" in message
    assert len(message) < 400
