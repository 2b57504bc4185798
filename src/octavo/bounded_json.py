"""Parses untrusted JSON with limits.

All code that reads JSON calls `parse` (text) or `read_object` (a file with one object). Python's parser accepts input
that breaks its callers later: nesting that ends in RecursionError, NaN and Infinity, 1e999 as infinity, integers too
large for a float, duplicate keys, lone surrogates. Here each of them is a `JsonError`.

`integer`, `number`, `flag` and `text` read one field of an object and check its type and bounds.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from octavo.errors import OctavoError

MAX_BYTES = 2**25  # 32 MiB; the largest known index of a sharded model has 9 MB
MAX_VALUES = 2_000_000  # limits memory: an empty object has 2 bytes of text and takes 64 bytes
MAX_DEPTH = 64
MAX_DIGITS = 308  # of an integer; longer ones overflow a float
SHOWN_CHARACTERS = 200  # of a value in an error message
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """The text is not JSON or exceeds a limit."""


def parse(
    text: str | bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
    strict: bool = True,
) -> Any:
    """The value of a JSON text (UTF-8 if bytes). JsonError if it is invalid or exceeds a limit, never RecursionError.

    All integers fit a float and no object has duplicate keys. With `strict` all numbers are finite and all strings can
    be encoded as UTF-8. Files written by octavo are parsed without `strict`: they may have a NaN loss or invalid text.
    """
    if len(text) > max_bytes:
        raise JsonError(f"{len(text):,} bytes are more than the limit of {max_bytes:,}")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        openings = text.count("[") + text.count("{")  # upper bounds: brackets and commas in strings are counted too
        if openings + text.count(",") > max_values:
            raise JsonError(f"it has more than {max_values:,} values")
        value = (_DECODER if strict else _LENIENT_DECODER).decode(text)
        if openings > max_depth:
            _check_depth(value, max_depth)
        if strict and (_SURROGATE_ESCAPE.search(text) or not encodable(text)):
            _check_strings(value)
    except RecursionError as error:
        raise JsonError(f"it is nested more than {max_depth} deep") from error
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 (byte {error.start})") from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from error
    return value


def read_object(
    path: Path,
    *,
    error: type[OctavoError],
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
    strict: bool = True,
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises `error` with the file name if it is missing, not a regular file, not JSON, too large, or not an object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path} is not a regular file.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        value = parse(content, max_bytes=max_bytes, max_depth=max_depth, max_values=max_values, strict=strict)
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror or cause}).") from cause
    except JsonError as cause:
        raise error(f"{path} is not valid JSON ({shortened(str(cause))}).") from cause
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object.")
    return value


def integer(source: Mapping[str, Any], key: str, *, least: int, most: int, default: int | None = None) -> int:
    """The integer at `key`; an integral float is accepted. JsonError for another type or a value out of bounds.

    A missing or null key has the value `default`, or is an error if there is no default.
    """
    value = number(source, key, least=least, most=most, default=default)
    if value != int(value):
        raise JsonError(f"{key} is {value}; it must be an integer")
    return int(source[key]) if source.get(key) is not None else int(value)


def number(source: Mapping[str, Any], key: str, *, least: float, most: float, default: float | None = None) -> float:
    """The number at `key`, from `least` to `most` inclusive. Missing keys as in `integer`."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise JsonError(f"{key} is missing")
    # bool is a subclass of int. Every comparison with NaN is False, so `not least <= value <= most` rejects it.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise JsonError(f"{key} is {shown(value)}; it must be a number from {_bound(least)} to {_bound(most)}")
    return value


def _bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def flag(source: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """The boolean at `key`; `default` if it is missing or null. JsonError for another type."""
    value = source.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise JsonError(f"{key} is {shown(value)}; it must be true or false")
    return value


def text(source: Mapping[str, Any], key: str, *, default: str | None = None) -> str:
    """The string at `key`; `default` if it is missing or null. JsonError for another type."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise JsonError(f"{key} is missing")
    if not isinstance(value, str):
        raise JsonError(f"{key} is {shown(value)}; it must be a string")
    return value


def shown(value: object) -> str:
    """A value for an error message: its repr, truncated to 200 characters. Large containers show only their size."""
    if isinstance(value, str):
        return shortened(repr(value[: SHOWN_CHARACTERS + 1]))
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    return shortened(repr(value))


def shortened(message: str, limit: int = SHOWN_CHARACTERS) -> str:
    """The text, truncated to `limit` characters."""
    return message if len(message) <= limit else message[:limit] + " .."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    text = ", ".join(map(shortened, names[:most]))
    return text + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {shown(key)} occurs twice")
            seen.add(key)
    return content


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError(f"the number {shortened(digits)} is too large")
    return value


def _int(digits: str) -> int:
    if (count := len(digits.lstrip("-"))) > MAX_DIGITS:
        raise JsonError(f"an integer has {count:,} digits")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not a valid JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_float=_float, parse_int=_int, parse_constant=_constant
)
_LENIENT_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_int=_int)


def _check_depth(value: Any, max_depth: int) -> None:
    """JsonError if objects and lists are nested more than `max_depth` deep. Not recursive."""
    level = [value]
    for depth in range(max_depth + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        if depth < max_depth:
            level = [item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent)]
    raise JsonError(f"it is nested more than {max_depth} deep")


def _check_strings(value: Any) -> None:
    """JsonError for a string with a lone surrogate. Recursive: the depth has been checked before."""
    if isinstance(value, str) and not encodable(value):
        raise JsonError("a string has a lone surrogate, which is not valid Unicode")
    if isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_strings(item)


def encodable(string: str) -> bool:
    """Whether a string can be written as UTF-8: it has no lone surrogate."""
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
