"""The named fields of a record, and errors that name a field.

A `RawRecord` is what a reader yields, a `Record` its named fields with their place, a `Document` the result: the text,
prompt and completion, or messages that records.py makes of the fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.bounded_json import shortened
from octavo.errors import DataError

_MESSAGE_CHARACTERS = 400  # of an error: a record may hold a word or a name of megabytes
_SKIP = "Correct the record, or skip such records with --skip-bad."


@dataclass(frozen=True)
class Record:
    """The fields of one record, and the file and line that it was read from."""

    fields: Mapping[str, object]
    source: str
    line: int

    def error(self, message: str, hint: str = _SKIP) -> DataError:
        """A DataError about this record. The message, which may quote the record, is cut if it is long."""
        return DataError(shortened(message, _MESSAGE_CHARACTERS), source=self.source, line=self.line, hint=hint)

    def get(self, name: str) -> object:
        """The value of a field; None if it is null or absent."""
        return self.fields.get(name)

    def string(self, value: object, at: str) -> str:
        """`value` as text; `at` names the field in errors. Raises DataError for anything but a valid Unicode string."""
        if value is None:
            raise self.error(f"{_named(at)} is null, where a string is expected.")
        if not isinstance(value, str):
            raise self.error(f"{_named(at)} must be a string, not {kind(value)}.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"{_named(at)} holds half a character (a lone surrogate) at {error.start}."
            raise self.error(message) from error
        return value

    def filled(self, value: object, at: str) -> str:
        """As `string`; DataError for a text of white space alone too. Unlike `is_blank`, "[]" and "null" are texts."""
        text = self.string(value, at)
        if not text.strip():
            raise self.error(f"{_named(at)} is empty.")
        return text

    def parsed(self, name: str) -> object:
        """The value of a field that should be a list; a string is parsed as JSON, since a CSV file has only strings.

        The callers check the type: one of them accepts an object too, a single tool.
        """
        value = self.fields[name]
        if not isinstance(value, str):
            return value
        try:
            # Not bounded_json.parse: a long conversation exceeds its limits. The reader has limited the record's size
            # (MAX_DOCUMENT_BYTES), and what is read of the value is checked by `string` and its callers.
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise self.error(f"field `{name}` is not a JSON list: {error}.") from error


# The names of types in JSON. The first match counts, so bool is before int: True is an int in Python.
_KINDS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((type(None),), "null"),
    ((bool,), "true or false"),
    ((int, float), "a number"),
    ((str,), "a string"),
    ((list, tuple), "a list"),
    ((Mapping,), "an object"),
)


def is_blank(value: object) -> bool:
    """Whether a value is null, a blank string, or an empty list or object; also as a string: "null", "[]" or "{}".

    The cells of a CSV file are strings. The number 0 is not blank.
    """
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value == [] or value == {}


def kind(value: object) -> str:
    """The type of a value, for a message."""
    if value == []:
        return "an empty list"
    for types, name in _KINDS:
        if isinstance(value, types):
            return name
    return f"a {type(value).__name__}"


def _named(at: str) -> str:
    # An `at` such as messages[2].content is a path into a field, not the name of one.
    return f"`{at}`" if "[" in at else f"field `{at}`"
