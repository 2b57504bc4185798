"""One record of a file as a reader yields it: before `records.from_fields` turns it into a Document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.errors import DataError


@dataclass(frozen=True)
class RawRecord:
    """`value` is a string (plain text), a mapping (named fields), or the error if the record cannot be read."""

    line: int  # 1-based line where the record starts, or the record's number in a format without lines
    value: str | Mapping[str, object] | DataError
    n_bytes: int  # size in the file, after decompression; 0 where the format does not give it
    positions: tuple[tuple[int, str], ...] = ()  # of a text: (character, name of the page or chapter that begins there)
    removed: Mapping[str, int] = field(default_factory=dict)  # kind of text that was left out on purpose -> number
    unread: Mapping[str, int] = field(default_factory=dict)  # kind of part without text that can be read -> number
