"""What a record means: plain text, a prompt with its completion, or a conversation.

SHAPES lists the field names that octavo knows, the more telling ones first: data sets often carry a rendered
`text` beside the fields it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from octavo.errors import DataError

_SKIP = "Correct the record, or skip such records with --skip-bad."
# The names that ShareGPT's exporters give to the speakers; every other name is kept.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """One text to learn from. Exactly one of text, prompt with completion, and messages is given."""

    source: str  # the file as the user named it
    line: int  # 1-based line or record where it starts
    text: str = ""  # plain text, everything trained
    prompt: str | None = None  # with `completion`: only the completion is trained
    completion: str | None = None
    messages: tuple[Message, ...] = ()  # a conversation: only the assistant's turns are trained

    @property
    def where(self) -> str:
        """`file:line`, as messages and reports name it."""
        return f"{self.source}:{self.line}"


@dataclass(frozen=True)
class _Record:
    fields: Mapping[str, object]
    source: str
    line: int

    def error(self, message: str, hint: str = _SKIP) -> DataError:
        return DataError(message, source=self.source, line=self.line, hint=hint)


def from_text(text: str, *, source: str, line: int) -> Document:
    """A document of plain text."""
    return Document(source, line, text=text)


def from_fields(fields: Mapping[str, object], *, source: str, line: int) -> Document:
    """A document from named fields, by the first of SHAPES whose fields are all there and not null.

    Raises DataError for a record of no known shape, and one that names the field for a wrong type or no text.
    """
    record = _Record(fields, source, line)
    for names, build in SHAPES.items():
        if all(fields.get(name) is not None for name in names):
            return build(record)
    known = "; ".join(" + ".join(names) for names in SHAPES)
    found = ", ".join(fields) or "none"
    raise record.error(f"no field that octavo knows; the record has: {found}.", hint=f"It reads: {known}.")


def _plain(record: _Record) -> Document:
    return Document(record.source, record.line, text=_filled(record, "text"))


def _completion(record: _Record) -> Document:
    prompt, completion = _string(record, "prompt"), _filled(record, "completion")
    return Document(record.source, record.line, prompt=prompt, completion=completion)


def _alpaca(record: _Record) -> Document:
    """Alpaca's three fields under three headings, which a base model can follow without a chat template."""
    prompt = f"### Instruction:\n{_filled(record, 'instruction')}\n\n"
    if record.fields.get("input") is not None and (given := _string(record, "input")).strip():
        prompt += f"### Input:\n{given}\n\n"
    completion = _filled(record, "output")
    return Document(record.source, record.line, prompt=prompt + "### Response:\n", completion=completion)


def _chat(record: _Record) -> Document:
    return _conversation(record, "messages", "role", "content")


def _sharegpt(record: _Record) -> Document:
    return _conversation(record, "conversations", "from", "value")


def _conversation(record: _Record, name: str, role_key: str, content_key: str) -> Document:
    turns = record.fields[name]
    if isinstance(turns, str):
        # A cell of a CSV file can hold a list only as JSON.
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise record.error(f"field `{name}` is not a JSON list of turns: {error}.") from error
    if not isinstance(turns, list) or not turns:
        raise record.error(f"field `{name}` must be a list of turns, not {_kind(turns)}.")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise record.error(f"`{name}[{number}]` must be an object, not {_kind(turn)}.")
        at = f"{name}[{number}]."
        inner = _Record({at + key: turn.get(key) for key in (role_key, content_key)}, record.source, record.line)
        role = _filled(inner, at + role_key)
        messages.append(Message(_SPEAKERS.get(role, role), _string(inner, at + content_key)))
    if not any(message.role == "assistant" and message.content for message in messages):
        raise record.error(f"field `{name}` has no turn of the assistant: there is nothing to learn.")
    return Document(record.source, record.line, messages=tuple(messages))


SHAPES: dict[tuple[str, ...], Callable[[_Record], Document]] = {
    ("messages",): _chat,
    ("conversations",): _sharegpt,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _alpaca,
    ("text",): _plain,
}


def _string(record: _Record, name: str) -> str:
    value = record.fields[name]
    if not isinstance(value, str):
        raise record.error(f"field `{name}` must be a string, not {_kind(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise record.error(f"field `{name}` holds half a character (a lone surrogate) at {error.start}.") from error
    return value


def _filled(record: _Record, name: str) -> str:
    value = _string(record, name)
    if not value.strip():
        raise record.error(f"field `{name}` is empty.")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else "an empty list" if value == [] else f"a {type(value).__name__}"
