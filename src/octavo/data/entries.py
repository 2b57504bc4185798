"""One document of a file, before anybody asked what its fields mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.errors import DataError


@dataclass(frozen=True)
class Entry:
    """A string is plain text, a mapping named fields, an error stands for a record that cannot be read."""

    line: int  # 1-based line where it starts, or its number where a format has no lines
    value: str | Mapping[str, object] | DataError
    n_bytes: int  # its size in the file, after decompression; 0 where the format does not tell
