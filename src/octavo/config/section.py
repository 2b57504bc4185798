"""The base class of a section of options, and types of values that can be written in several forms."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from octavo.bounded_json import encodable

MOST_BYTES = 2**60  # of a MemorySize


def _split_commas(value: object) -> object:
    """A list of strings from "a,b" or from a list of such strings."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [part.strip() for item in value for part in item.split(",") if part.strip()]
    return value


def _columns(value: object) -> object:
    """A list of NAME=FIELD from "prompt=question,completion=answer", a list of such strings, or a mapping."""
    if isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair):
        return [f"{name}={field}" for name, field in value.items()]
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        # A comma separates two entries only before another NAME=: field names may contain commas.
        return [part.strip() for item in value for part in re.split(r",(?=\s*\w+\s*=)", item) if part.strip()]
    return value


def _numbers(value: object) -> object:
    """A list of numbers from "1e-4,3e-4", a number, or a list of either. YAML reads 1e-4 as a string."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list) or any(isinstance(item, bool) for item in value):
        return value
    try:
        return [float(part) for item in value for part in str(item).split(",") if part.strip()]
    except ValueError as error:
        raise ValueError("must be numbers with commas between them") from error


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _text(value: object) -> object:
    """A string, or a list of strings, without a lone surrogate, which tokenizers do not encode."""
    if not all(encodable(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)):
        raise ValueError("must be Unicode text, without a lone surrogate")
    return value


def _check_path(path: str) -> None:
    """ValueError for a path that no file can have."""
    try:
        has_null = b"\0" in os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError("must be Unicode text, without a lone surrogate") from error
    if has_null:
        raise ValueError("must have no null character")


def _memory_size(value: object) -> object:
    """auto, or a number with a unit: 11GiB, 11.5 GB, 8192MiB; a bare number is GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|[KMGT])?\s*", str(value), re.IGNORECASE)
    if str(value) == "auto" or (match and 0 < float(match[1]) < MOST_BYTES):  # more would be infinite in bytes
        size = size_in_bytes(str(value))
        if size is None or 1 <= size <= MOST_BYTES:
            return str(value)
    raise ValueError("must be auto or a size like 11GiB")


def size_in_bytes(value: str) -> int | None:
    """Bytes of a MemorySize; None for auto."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
    if match is None:
        return None
    letter = match[2].upper() or "G"
    decimal = value.strip().upper().endswith("B") and not match[3]  # GB is 10^9 bytes (SI), GiB and G are 2^30
    return int(float(match[1]) * (1000 if decimal else 1024) ** ("KMGT".index(letter) + 1))


def _date(value: object) -> object:
    """An ISO date as a string; YAML parses an unquoted one as a date object."""
    try:
        return value if value is None else date.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise ValueError("must be a date like 2026-11-28") from error


MemorySize = Annotated[str, BeforeValidator(_memory_size)]
Date = Annotated[str | None, BeforeValidator(_date)]
Columns = Annotated[list[str], BeforeValidator(_columns)]
Names = Annotated[list[str], BeforeValidator(_split_commas)]
Trackers = Annotated[list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], BeforeValidator(_split_commas)]
Numbers = Annotated[list[float], BeforeValidator(_numbers)]
Paths = Annotated[list[str], BeforeValidator(_one_or_many)]
Text = Annotated[str | None, BeforeValidator(_text)]
Texts = Annotated[list[str], BeforeValidator(_text), BeforeValidator(_one_or_many)]


class Section(BaseModel):
    """A group of options. Unknown keys are an error; an instance is immutable."""

    panel: ClassVar[str] = "Options"  # the heading of the group in --help

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_type(cls, value: object, info: ValidationInfo) -> object:
        """Rejects what pydantic would convert: True as the number 1, and bytes as text."""
        kind = cls.model_fields[str(info.field_name)].annotation
        numbers = {int, float} & {kind, *get_args(kind)}
        if isinstance(value, bool) and numbers:
            raise ValueError("must be a number")
        if isinstance(value, bytes | bytearray):
            raise ValueError("must be a string")
        if Path in {kind, *get_args(kind)} and isinstance(value, str):
            _check_path(value)
        return value


def flag_of(name: str) -> str:
    """The flag of an option: --seq-len for seq_len."""
    return f"--{name.replace('_', '-')}"


def arguments_of(section: Section, *, leave_out: Collection[str] = ()) -> list[str]:
    """The command-line arguments of the values of a section that differ from their defaults."""
    arguments: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name in leave_out or value == field.get_default(call_default_factory=True):
            continue
        if isinstance(value, bool):
            arguments.append(flag_of(name if value else f"no_{name}"))
            continue
        for each in value if isinstance(value, list) else [value]:
            arguments += [flag_of(name), str(each)]
    return arguments


def fields(kinds: tuple[type[Section], ...]) -> Iterator[tuple[str, FieldInfo]]:
    """All options of the sections `kinds`, in order."""
    for kind in kinds:
        yield from kind.model_fields.items()
