"""Parsing of JSON with limits: valid JSON is parsed as by Python's parser; unsafe input is a JsonError."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.bounded_json import JsonError, flag, integer, number, parse, read_object, shown, text
from octavo.errors import ModelError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_valid_json_is_parsed_as_by_the_json_module(value: object) -> None:
    for ascii_only in (True, False):
        text_of_value = json.dumps(value, ensure_ascii=ascii_only)
        assert parse(text_of_value) == parse(text_of_value.encode()) == json.loads(text_of_value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 200_000, "nested"),
        ('{"a":' * 200_000, "nested"),
        ("[" * 65 + "]" * 65, "nested"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ("1e999", "too large"),
        ("[-1e400]", "too large"),
        ("1" * 309, "309 digits"),
        ("-" + "1" * 5000, "5,000 digits"),
        ('{"r": 8, "r": 4}', "twice"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udc00x": 1}', "surrogate"),
        (b"\xff", "UTF-8"),
        (b'"\xed\xa0\x80"', "UTF-8"),
        ("", "Expecting value"),
        ("[1] 2", "Extra data"),
        ("[" + "1," * 2_000_001 + "1]", "values"),
    ],
)
def test_errors_for_limits_name_the_reason(content: str | bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason) as caught:
        parse(content)
    assert len(str(caught.value)) < 300


def test_limits_are_inclusive_and_brackets_in_strings_do_not_count() -> None:
    assert parse("[" * 64 + "]" * 64) == json.loads("[" * 64 + "]" * 64)
    assert parse(json.dumps("[" * 1000)) == "[" * 1000
    assert parse("9" * 308) == 10**308 - 1
    assert parse('{"model_max_length": 1000000000000000019884624838656}') == {"model_max_length": int(1e30)}
    assert parse('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse(b"\xef\xbb\xbf{}") == {}
    with pytest.raises(JsonError, match="limit of 3"):
        parse("[12]", max_bytes=3)


def test_not_strict_accepts_any_number_and_any_string() -> None:
    values = parse('[NaN, Infinity, 1e999, "\\ud800"]', strict=False)
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, math.inf, "\ud800"]
    for invalid in ("[" * 200_000, '{"a": 1, "a": 2}', "1" * 400):
        with pytest.raises(JsonError):
            parse(invalid, strict=False)


def test_read_object_raises_the_callers_error_with_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_object(path, error=ModelError) == {"a": 1}
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)  # opening it would block
    folder.mkdir()
    path.write_text("[1]")
    long_file = tmp_path / "long.json"
    long_file.write_text(" " * 33 + "{}")
    for invalid, reason in ((pipe, "regular"), (folder, "regular"), (path, "object"), (tmp_path / "no", "cannot be")):
        with pytest.raises(ModelError, match=reason) as caught:
            read_object(invalid, error=ModelError)
        assert str(invalid) in str(caught.value)
    with pytest.raises(ModelError, match="limit of 32"):
        read_object(long_file, error=ModelError, max_bytes=32)


def test_field_types_and_bounds() -> None:
    source = {"r": 8, "f": 8.0, "h": 8.5, "b": True, "s": "x", "n": None, "inf": math.inf, "nan": math.nan, "l": [1]}
    assert integer(source, "r", least=1, most=8) == integer(source, "f", least=1, most=8) == 8
    for key in ("n", "absent"):
        assert integer(source, key, least=1, most=8, default=3) == 3
    assert number(source, "h", least=0, most=10) == 8.5
    assert flag(source, "b")
    assert not flag(source, "n")
    assert text(source, "s") == "x"
    for key in ("h", "b", "s", "inf", "nan", "l", "n", "absent"):
        with pytest.raises(JsonError, match=key):
            integer(source, key, least=1, most=10**9)
    for least, most in ((9, 10), (1, 7)):
        with pytest.raises(JsonError, match=f"from {least} to {most}"):
            integer(source, "r", least=least, most=most)
    with pytest.raises(JsonError, match="true or false"):
        flag(source, "r")
    with pytest.raises(JsonError, match="a string"):
        text(source, "r")


def test_shown_truncates_values() -> None:
    for value in ("x" * 10**6, ["x"] * 10**6, {str(i): i for i in range(1000)}, 10**400):
        assert len(shown(value)) < 220
