"""Interprets the fields of a record: plain text, a prompt with its completion, or a conversation.

SHAPES lists the field names that octavo reads, the most specific ones first: data sets often have a rendered `text`
in addition to the fields that it was made from. `columns` maps other names.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePath

from octavo.bounded_json import shortened
from octavo.data.fields import Record, is_blank
from octavo.data.turns import ROLES, Message, conversation, has_answer, is_turns, tools_of
from octavo.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Document:
    """One training text. Exactly one of text, prompt with completion, and messages is set."""

    source: str  # the file as the user named it
    line: int  # 1-based line or record number
    text: str = ""  # plain text; all of it is trained
    prompt: str | None = None  # with `completion`; only the completion is trained
    completion: str | None = None
    messages: tuple[Message, ...] = ()  # a conversation; only the assistant's turns are trained
    tools: str = ""  # of a conversation: the tools for the chat template, a JSON list
    now: datetime | None = None  # of a conversation: the time for the chat template; None: the current time
    positions: tuple[tuple[int, str], ...] = ()  # of `text`: (character, name of the page or chapter that begins there)

    @property
    def where(self) -> str:
        """`file:line`, for messages and reports."""
        return f"{self.source}:{self.line}"


def from_text(text: str, *, source: str, line: int, positions: tuple[tuple[int, str], ...] = ()) -> Document:
    """A document of plain text."""
    return Document(source, line, text=text, positions=positions)


def from_fields(
    fields: Mapping[str, object],
    *,
    source: str,
    line: int,
    columns: Mapping[str, str] | None = None,
    unused: Counter[str] | None = None,
) -> Document:
    """A document from named fields, by the first of SHAPES whose fields all exist, the last of them not blank.

    `columns` maps octavo's names to the record's; then only those fields are read. Names of unused fields are counted
    in `unused`. Raises DataError for a record of no known shape, with the field's name for a wrong type or a blank
    text to train on, and for a field that would change the training but has no use in the shape.
    """
    unused = Counter() if unused is None else unused
    record = _renamed(fields, columns, source, line) if columns else _lowered(fields, source, line)
    candidates = [(shape, names) for shape in SHAPES if (names := _names_in(record, shape))]
    if not candidates:
        raise _unknown(record, fields, columns)
    # A table with rows of several shapes leaves cells blank, so the first shape with a filled last field is taken.
    shape, names = next(((s, n) for s, n in candidates if not is_blank(record.get(n[-1]))), candidates[0])
    document = shape.build(record, names, unused)
    _account(record, fields, columns, [*names, *shape.uses], shape, unused)
    return document


def _names_in(record: Record, shape: _Shape) -> list[str]:
    """The record's name of each field that the shape needs, preferring one that is not blank; [] if one is missing."""
    names = []
    for group in shape.needs:
        present = [name for name in group if record.get(name) is not None]
        if not present:
            return []
        names.append(next((name for name in present if not is_blank(record.get(name))), present[0]))
    return names


def check_columns(columns: Sequence[str]) -> dict[str, str]:
    """`name=field` pairs as a mapping from octavo's names to the record's. UsageError for an invalid pair."""
    mapping: dict[str, str] = {}
    for pair in columns:
        name, equals, field = pair.partition("=")
        name = name.strip()
        if not equals or not field.strip() or name not in _TARGETS:
            hint = f"A column is NAME=FIELD, as in prompt=question; NAME is one of {', '.join(_TARGETS)}."
            raise UsageError(f"--columns {shortened(pair)}: no mapping of a column.", hint=hint)
        if name in mapping:
            raise UsageError(f"--columns names {name} twice.", hint="Give one field for each name.")
        mapping[name] = field
    if mapping and not any(all(any(name in mapping for name in group) for group in shape.needs) for shape in SHAPES):
        raise UsageError("--columns names too few columns for a record.", hint=f"Name those of one kind: {_KNOWN}.")
    return mapping


def _renamed(fields: Mapping[str, object], columns: Mapping[str, str], source: str, line: int) -> Record:
    record = Record(fields, source, line)
    named = {name: field_named(fields, field) for name, field in columns.items()}
    for name, field in named.items():
        if field not in fields and name in _REQUIRED:
            present = shortened(", ".join(fields)) or "none"
            raise record.error(f"no field `{shortened(field)}`, which --columns names; the record has: {present}.")
    return Record({name: fields.get(field) for name, field in named.items()}, source, line)


def field_named(fields: Collection[str], name: str) -> str:
    """The field that --columns means by `name`: with its surrounding spaces if there is such a field, else without."""
    return name if name in fields else name.strip()


def is_field(fields: Collection[str], name: str) -> bool:
    """Whether the `name` of --columns is one of the fields, with or without its surrounding spaces."""
    return field_named(fields, name) in fields


def _lowered(fields: Mapping[str, object], source: str, line: int) -> Record:
    """The fields also under their lower-case names: tables often have Question and Answer."""
    record = Record(fields, source, line)
    lowered: dict[str, object] = {}
    spelling: dict[str, str] = {}
    for field, value in fields.items():
        name = field.strip().lower()
        if not is_blank(value) and not is_blank(lowered.get(name)) and value != lowered[name]:
            raise record.error(
                f"fields `{spelling[name]}` and `{field}` are one name in two spellings.", hint=_MAP_HINT
            )
        if name not in lowered or not is_blank(value):
            lowered[name], spelling[name] = value, field
    systems = [name for name in ("system", *_SYSTEM) if not is_blank(lowered.get(name))]
    if len({str(lowered[name]) for name in systems}) > 1:
        raise record.error(f"fields {' and '.join(f'`{name}`' for name in systems)} give two system messages.")
    if systems:
        lowered["system"] = lowered[systems[0]]
    return Record({**fields, **lowered}, source, line)


def _plain(record: Record, names: list[str], unused: Counter[str]) -> Document:
    role = record.get("role")
    if role is not None and (names[0] == "content" or str(role).strip().lower() in ROLES):
        raise record.error("the record is one turn, with a role: a record holds a whole conversation, as `messages`.")
    return Document(record.source, record.line, text=_filled(record, names[0]))


def _completion(record: Record, names: list[str], unused: Counter[str]) -> Document:
    """A prompt and its completion, as texts or as two lists of turns; only the completion is trained."""
    values = [record.get(name) for name in names]
    if all(map(is_turns, values)):
        prompt_turns = [replace(message, trained=False) for message in conversation(record, names[0], unused)]
        return _talk(record, [*prompt_turns, *conversation(record, names[1], unused)], names[1])
    prompt, completion = _string(record, names[0]), _filled(record, names[1])
    if tools := next((name for name in ("tools", "functions") if not is_blank(record.get(name))), None):
        raise record.error(f"field `{tools}` needs a conversation: without a chat template nothing shows the tools.")
    if not is_blank(record.get("system")):
        prompt = f"{_filled(record, 'system')}\n\n{prompt}"
    return Document(record.source, record.line, prompt=prompt, completion=completion)


def _alpaca(record: Record, names: list[str], unused: Counter[str]) -> Document:
    """Alpaca's fields under headings, a format for base models without a chat template."""
    prompt = f"{_filled(record, 'system')}\n\n" if not is_blank(record.get("system")) else ""
    instruction, input_heading, response = ALPACA_HEADINGS
    prompt += f"{instruction}\n{_filled(record, names[0])}\n\n"
    inputs = [name for name in ("input", "context") if record.get(name) is not None and _string(record, name).strip()]
    if len(inputs) > 1:
        raise record.error("both `input` and `context` hold text.", hint=_MAP_HINT)
    if inputs:
        prompt += f"{input_heading}\n{_string(record, inputs[0])}\n\n"
    completion = _filled(record, names[1])
    return Document(record.source, record.line, prompt=f"{prompt}{response}\n", completion=completion)


def _chat(record: Record, names: list[str], unused: Counter[str]) -> Document:
    return _talk(record, conversation(record, names[0], unused), names[0])


def _talk(record: Record, messages: Sequence[Message], name: str) -> Document:
    messages = list(messages)
    if not is_blank(record.get("system")):
        system = _filled(record, "system")
        first = next((message.content for message in messages if message.role == "system"), None)
        if first is None:
            messages.insert(0, Message("system", system))
        elif first != system:
            raise record.error(f"field `system` and a turn of `{name}` give two system messages.")
    if not any(m.role == "assistant" and (m.content or m.fields) for m in messages):
        raise record.error(f"field `{name}` has no turn of the assistant: there is nothing to train on.")
    if not any(m.role == "assistant" and m.trained and (m.content or m.fields) for m in messages):
        raise record.error(f"field `{name}` has no turn of the assistant to train on: all have weight 0.")
    return Document(record.source, record.line, messages=tuple(messages), tools=tools_of(record))


@dataclass(frozen=True)
class _Shape:
    needs: tuple[tuple[str, ...], ...]  # one name of each group must exist; the first is the usual one
    build: Callable[[Record, list[str], Counter[str]], Document]
    uses: tuple[str, ...] = ()  # optional fields that `build` reads
    is_synonym: bool = False  # other names for a prompt and its completion, so that several fields may match


ALPACA_HEADINGS = ("### Instruction:", "### Input:", "### Response:")
_KNOWN = "messages; prompt + completion; instruction + output; text"
_MAP_HINT = "Name the fields to use with --columns, as in --columns prompt=question,completion=answer."
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "adapter_config.json",
)
_MODEL_HINT = "The file seems to be of a model's folder: name that folder with --model, and texts as the data."
_PROMPTS = ("prompt", "question", "query", "input", "inputs", "problem")
_ANSWERS = ("completion", "response", "answer", "output", "outputs", "target", "targets", "solution")
SHAPES = (
    _Shape((("messages", "conversations", "conversation"),), _chat, ("system", "tools", "functions")),
    _Shape((("prompt",), ("completion",)), _completion, ("system", "tools", "functions")),
    _Shape((("instruction",), ("output", "response", "completion")), _alpaca, ("input", "context", "system")),
    _Shape((_PROMPTS, _ANSWERS), _completion, ("system",), True),
    _Shape((("text",),), _plain),
    _Shape((("user", "human"), ("assistant", "gpt", "bot")), _completion, ("system",), True),
    _Shape((("source",), ("target",)), _completion, (), True),
    _Shape((("article",), ("summary",)), _completion, (), True),
    _Shape((("content",),), _plain),
)
_TARGETS = ("text", "prompt", "completion", "instruction", "input", "output", "messages", "system", "tools")
_REQUIRED = ("text", "prompt", "completion", "instruction", "output", "messages")
_SYSTEM = ("system_prompt", "system_message")
# Fields that change the training. If one is filled and the shape does not use it, the record is rejected: octavo drops
# no such field silently. _WEIGHTY_ASIDE applies where the prompt has another name than `prompt`.
_WEIGHTY = (
    "system", *_SYSTEM, "tools", "functions", "history", "chat_template_kwargs", "suffix", "reasoning",
    "reasoning_content", "thinking", "image", "images", "audio",
)  # fmt: skip
_WEIGHTS = ("weight", "sample_weight", "loss_weight", "train", "trainable")  # 1 and true are the default
_WEIGHTY_ASIDE = ("context", "input", "instruction")
_MOST_NAMES = 1000


def _account(
    record: Record,
    fields: Mapping[str, object],
    columns: Mapping[str, str] | None,
    used: Sequence[str],
    shape: _Shape,
    unused: Counter[str],
) -> None:
    """Every field is used, counted as unused, or rejected by name."""
    if columns:
        used_fields = {field_named(fields, columns[name]) for name in used if name in columns}
        unused.update(field for field in fields if field not in used_fields and len(unused) < _MOST_NAMES)
        return
    used_fields = {*used, *(_SYSTEM if "system" in used else ())}
    weighty = {*_WEIGHTY, *(_WEIGHTY_ASIDE if shape.is_synonym else ())} if shape.build is not _plain else set()
    rivals = {name for group in shape.needs for name in group} if shape.is_synonym else set()
    for field, value in fields.items():
        name = field.strip().lower()
        is_weight = name in _WEIGHTS or (name == "label" and value is False)  # false marks a rejected answer
        if name in used_fields or field in used_fields or is_blank(value):
            continue
        if is_weight and str(value).strip().lower() in ("1", "1.0", "true"):
            continue
        if name in rivals:
            raise record.error(f"fields {_listed(used, shape)} and `{field}` are ambiguous.", hint=_MAP_HINT)
        if name in weighty or is_weight:
            raise record.error(
                f"field `{field}` would change the training, and octavo has no use for it here.",
                hint="Remove it from the records, or name the fields to use with --columns.",
            )
        if len(unused) < _MOST_NAMES or field in unused:
            unused[field] += 1


def _listed(used: Sequence[str], shape: _Shape) -> str:
    return ", ".join(f"`{name}`" for name in used if any(name in group for group in shape.needs))


def _unknown(record: Record, fields: Mapping[str, object], columns: Mapping[str, str] | None) -> DataError:
    """The error of a record without a shape, with the --columns flag that maps its field names."""
    names = [field_named(fields, columns[name]) for name in record.fields] if columns else list(fields)
    nulls = [name for name in names if fields.get(name) is None]
    known = {name for shape in SHAPES for group in shape.needs for name in group}
    null = next((name for name in nulls if columns or name.strip().lower() in known), None)
    if null is not None:
        return record.error(f"field `{shortened(null)}` is null: there is nothing to train on.")
    present = shortened(", ".join(fields)) or "none"
    hint = _MODEL_HINT if _is_of_model(record.source, fields) else _suggestion(fields)
    return record.error(f"no field that octavo reads; the record has: {present}.", hint=hint)


def _is_of_model(source: str, fields: Mapping[str, object]) -> bool:
    """Whether a record is a settings file of a model's folder: its values are no texts."""
    return PurePath(source).name in _MODEL_FILES or not {"model_type", "architectures"}.isdisjoint(fields)


def _suggestion(fields: Mapping[str, object]) -> str:
    """A hint with the --columns flag that reads the record, filled with its field names where they are clear."""
    if turns := next((name for name, value in fields.items() if is_turns(value) and has_answer(value)), None):
        return _columns_hint(f"messages={turns}")
    texts = [name for name, value in fields.items() if isinstance(value, str) and value.strip() and len(name) <= 60]
    prompt = next((name for name in texts if name.strip().lower() in _PROMPTS), None)
    completion = next((name for name in texts if name.strip().lower() in (*_ANSWERS, "chosen")), None)
    if prompt or completion:
        hint = _columns_hint(f"prompt={prompt or 'FIELD'},completion={completion or 'FIELD'}")
        return hint if completion != "chosen" else f"{hint} Rejected answers are not trained on."
    longest = sorted(texts, key=lambda name: -len(str(fields[name])))[:2]  # not an id or a date
    texts = [name for name in texts if name in longest]
    if not texts:
        return f"It reads: {_KNOWN}."
    return _columns_hint(f"prompt={texts[0]},completion={texts[1]}" if len(texts) > 1 else f"text={texts[0]}")


def _columns_hint(flag: str) -> str:
    return f"Name the fields: --columns {shlex.quote(flag)}. Without it octavo reads: {_KNOWN}."


def _string(record: Record, name: str) -> str:
    return record.string(record.fields[name], name)


def _filled(record: Record, name: str) -> str:
    return record.filled(record.fields[name], name)
