"""Dataclasses from JSON objects, by the types of their fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_fields(cls: type[T], record: Mapping[str, Any]) -> T | None:
    """A dataclass from its JSON object. None if a field without a default is missing or has another type."""
    values = {}
    known: dict[str, tuple[Any, bool]] = _fields(cls)  # type: ignore[arg-type]  # a class is hashable
    for name, (kind, has_default) in known.items():
        try:
            values[name] = _value(kind, record[name])
        except (KeyError, ValueError):
            if not has_default:
                return None
    return cls(**values)


@cache
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a dataclass: name -> (type, whether it has a default)."""
    hints = get_type_hints(cls)
    return {
        field.name: (hints[field.name], (field.default, field.default_factory) != (MISSING, MISSING))
        for field in fields(cls)
    }


def _value(kind: Any, value: object) -> Any:
    """A JSON value as a field of the type `kind`. ValueError if it is of another type."""
    if get_origin(kind) is UnionType:  # X | None
        return None if value is None else _value(next(arg for arg in get_args(kind) if arg is not NoneType), value)
    if kind is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        return float(value)  # "nan" and "inf" are written as strings
    if get_origin(kind) in (tuple, Sequence) and isinstance(value, list):
        return tuple(_value(get_args(kind)[0], item) for item in value)
    if get_origin(kind) is not None and isinstance(value, Mapping):
        return {key: _value(get_args(kind)[1], item) for key, item in value.items()}
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
        if (found := read_fields(kind, value)) is not None:
            return found
    elif isinstance(kind, type) and type(value) is kind:  # not a bool for an int
        return value
    raise ValueError(f"{value!r} is no {kind}")
