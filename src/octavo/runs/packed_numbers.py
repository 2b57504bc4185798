"""Lists of numbers as short strings for a line of metrics.jsonl: base64 of 4-byte little-endian values.

A loss takes 5.3 characters in place of 19 as JSON, and a reader that does not need the list parses one string.
"""

from __future__ import annotations

import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence

_SWAPPED = sys.byteorder == "big"


def pack_floats(values: Iterable[float]) -> str:
    """float32: a relative error of at most 6e-8. OverflowError for a finite value beyond float32."""
    return _pack(array("f", values))


def unpack_floats(text: str) -> Sequence[float]:
    """The values of `pack_floats`. ValueError if the text is not base64 of whole values."""
    return _unpack(array("f"), text)


def pack_counts(values: Iterable[int]) -> str:
    """Integers from 0 to 2^32 - 1; OverflowError for others."""
    return _pack(array("I", values))


def unpack_counts(text: str) -> Sequence[int]:
    """The values of `pack_counts`. ValueError if the text is not base64 of whole values."""
    return _unpack(array("I"), text)


def _pack(values: array) -> str:  # type: ignore[type-arg]  # of floats or of integers
    if _SWAPPED:
        values.byteswap()
    return b64encode(values.tobytes()).decode("ascii")


def _unpack(values: array, text: str) -> Sequence:  # type: ignore[type-arg]  # of floats or of integers
    values.frombytes(b64decode(text, validate=True))
    if _SWAPPED:
        values.byteswap()
    return values
