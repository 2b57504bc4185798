"""Lists of numbers as base64: what is read is what was written, in one byte order."""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.runs.packed_numbers import pack_counts, pack_floats, unpack_counts, unpack_floats


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_are_read_back_bit_for_bit(values: list[float]) -> None:
    assert list(unpack_floats(pack_floats(values))) == values
    assert b64decode(pack_floats(values)) == struct.pack(f"<{len(values)}f", *values)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_counts_are_read_back(values: list[int]) -> None:
    assert list(unpack_counts(pack_counts(values))) == values
    assert b64decode(pack_counts(values)) == struct.pack(f"<{len(values)}I", *values)


def test_a_double_loses_at_most_the_precision_of_float32() -> None:
    assert unpack_floats(pack_floats([1234.56789]))[0] == pytest.approx(1234.56789, rel=6e-8)


@pytest.mark.parametrize("text", ["AAAA*", b64encode(b"12345").decode(), "é"])
def test_damaged_text_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack_floats(text)
    with pytest.raises(ValueError, match=r".+"):
        unpack_counts(text)
