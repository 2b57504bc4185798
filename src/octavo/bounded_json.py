"""JSON from files that others wrote, read within bounds.

Every reader of JSON calls `parse` (text) or `read_object` (a file that holds one object). Python's own reader lets
through what breaks its callers later: nesting that ends in RecursionError, NaN and Infinity, 1e999 as infinity,
integers too large for a float, a key twice, strings that are no Unicode text. Here each is a `JsonError`.

`integer`, `number`, `flag` and `text` read one field of an object with its type and its bounds.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from octavo.errors import OctavoError

MAX_BYTES = 2**25  # 32 MiB; the largest index of a sharded model seen has 9 MB
MAX_VALUES = 2_000_000  # bounds the memory: an empty object takes 2 bytes of text and 64 of memory
MAX_DEPTH = 64
MAX_DIGITS = 308  # of an integer: a longer one overflows as a float
SHOWN_CHARACTERS = 200  # of a value in a message
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """The text is not JSON, or is not within the bounds. The message says what and where."""


def parse(
    text: str | bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
    strict: bool = True,
) -> Any:
    """The value of a JSON text (UTF-8 if bytes). JsonError if it is broken or out of bounds, never RecursionError.

    All integers fit a float, no object held a key twice, and with `strict` all numbers are finite and all strings can
    be encoded. Files that octavo wrote itself are read without `strict`: a diverged loss or odd text is recorded too.
    """
    if len(text) > max_bytes:
        raise JsonError(f"{len(text):,} bytes are more than the limit of {max_bytes:,}")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        openings = text.count("[") + text.count("{")  # those in strings too: the sums are upper bounds
        if openings + text.count(",") > max_values:
            raise JsonError(f"it holds more than {max_values:,} values")
        value = (_DECODER if strict else _LENIENT_DECODER).decode(text)
        if openings > max_depth:
            _check_depth(value, max_depth)
        if strict and (_SURROGATE_ESCAPE.search(text) or not _encodable(text)):
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
    """The object in a JSON file. Raises `error`, naming the file, if it is missing, no regular file, not JSON, out of
    bounds, or holds another value than an object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{path} is not a regular file.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        value = parse(content, max_bytes=max_bytes, max_depth=max_depth, max_values=max_values, strict=strict)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror or problem}).") from problem
    except JsonError as problem:
        raise error(f"{path} is not valid JSON ({shortened(str(problem))}).") from problem
    if not isinstance(value, dict):
        raise error(f"{path} does not hold a JSON object.")
    return value


def integer(source: Mapping[str, Any], key: str, *, least: int, most: int, default: int | None = None) -> int:
    """The integer under `key`; a float without a fraction counts. JsonError if it is another value or out of bounds.

    `default` is for a key that is absent or null; without one the key must be there.
    """
    value = number(source, key, least=least, most=most, default=default)
    if value != int(value):
        raise JsonError(f"{key} is {value}; it must be an integer")
    return int(source[key]) if source.get(key) is not None else int(value)


def number(source: Mapping[str, Any], key: str, *, least: float, most: float, default: float | None = None) -> float:
    """The number under `key`, from `least` to `most`, both included. Otherwise as `integer`."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise JsonError(f"{key} is missing")
    # bool is an int to Python; a NaN is neither under nor over a bound.
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise JsonError(f"{key} is {shown(value)}; it must be a number from {_bound(least)} to {_bound(most)}")
    return value


def _bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def flag(source: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """The truth value under `key`; `default` for one that is absent or null. JsonError for any other value."""
    value = source.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise JsonError(f"{key} is {shown(value)}; it must be true or false")
    return value


def text(source: Mapping[str, Any], key: str, *, default: str | None = None) -> str:
    """The string under `key`; `default` for one that is absent or null. JsonError for any other value."""
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise JsonError(f"{key} is missing")
    if not isinstance(value, str):
        raise JsonError(f"{key} is {shown(value)}; it must be a string")
    return value


def shown(value: object) -> str:
    """A value for a message: its repr, cut at 200 characters. Deep or wide values are not written out to be cut."""
    if isinstance(value, str):
        return shortened(repr(value[: SHOWN_CHARACTERS + 1]))
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    return shortened(repr(value))


def shortened(message: str, limit: int = SHOWN_CHARACTERS) -> str:
    """The text, cut at `limit` characters."""
    return message if len(message) <= limit else message[:limit] + " .."


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
    raise JsonError(f"{name} is not a number of JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_without_duplicates, parse_float=_float, parse_int=_int, parse_constant=_constant
)
_LENIENT_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_int=_int)


def _check_depth(value: Any, max_depth: int) -> None:
    """JsonError if objects and lists are nested more than `max_depth` deep. Without recursion."""
    level = [value]
    for depth in range(max_depth + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return
        if depth < max_depth:
            level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]
    raise JsonError(f"it is nested more than {max_depth} deep")


def _check_strings(value: Any) -> None:
    """JsonError for a string with half of a surrogate pair. The depth is checked already."""
    if isinstance(value, str) and not _encodable(value):
        raise JsonError("a string holds half of a surrogate pair, which is not text")
    if isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_strings(item)


def _encodable(string: str) -> bool:
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
