"""Renders a conversation with its chat template, and locates each message's content in the rendered text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from octavo.data.records import Document
from octavo.data.turns import Message
from octavo.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from octavo.data.encoding import Coder

_INSTEAD = "Correct the record, skip it with --skip-bad, or give it as `prompt` and `completion`."
# Fields that a template may omit without changing the conversation: these are counted as unused.
_LABELS = ("name", "tool_call_id")
_NULL = "(no content)"  # compared by identity, since a content may be the same string


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text; `name` is a message's role or a control token."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The rendered conversation, and the span of each content in the order of the text."""

    rendered: str
    contents: list[Span]
    order: list[int]  # message index of each content
    whole: frozenset[int]  # indices of messages with more than a content: tool calls, reasoning
    empty: str | None  # the content that the template gets for a turn of only tool calls
    edges: dict[tuple[object, ...], tuple[str, str]] = field(default_factory=dict)  # filled by `turn_span`


def lay_out(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    *,
    add_generation_prompt: bool = False,
    unused: Counter[str] | None = None,
) -> Layout:
    """The layout of a conversation. `add_generation_prompt` appends the header of the assistant's next turn.

    Without it every turn, its tool calls and the tools must be in the text: DataError if the template omits one.
    """
    _check_safe(document, coder)
    document = replace(document, messages=tuple(map(_with_null, document.messages)))
    messages = document.messages
    whole = frozenset(n for n, message in enumerate(messages) if set(message.further) - {*_LABELS})
    empty = _empty_content(document, tokenizer, add_generation_prompt=add_generation_prompt)
    names = [_placeholder(n, message) for n, message in enumerate(messages)]
    stand_ins = [replace(message, content=name) for message, name in zip(messages, names, strict=True)]
    rendered = render(document, messages, tokenizer, add_generation_prompt=add_generation_prompt, empty=empty)
    skeleton = render(document, stand_ins, tokenizer, add_generation_prompt=add_generation_prompt, empty=empty)
    # A template may omit a message, such as a system prompt, or move it.
    present = [n for n in range(len(messages)) if names[n] is not _NULL and names[n] in skeleton]
    order = sorted(present, key=lambda n: skeleton.index(names[n]))
    for n, message in enumerate(messages):
        needed = message.role == "assistant" or (message.content.strip() and not add_generation_prompt)
        if needed and names[n] is not _NULL and n not in order:
            whose = "the assistant's" if message.role == "assistant" else f"of role {message.role}"
            raise refusal(document, f"the chat template leaves out turn {n + 1}, which is {whose}.")
    template_text = re.split("|".join(names[n] for n in present) or r"(?!)", skeleton)
    spans = _match(rendered, template_text, [messages[n] for n in order])
    if spans is None:
        raise refusal(document, "the chat template rewrites a message, so its trained text cannot be located.")
    if not add_generation_prompt:
        _check_used(document, tokenizer, rendered, empty, Counter() if unused is None else unused)
    return Layout(rendered, spans, order, whole, empty)


def _placeholder(number: int, message: Message) -> str:
    """A unique word in place of the content; _NULL for a turn of only tool calls."""
    return _NULL if message.content is _NULL else f"octavo{number:08d}content"


def _with_null(message: Message) -> Message:
    """The content of a turn of only tool calls becomes _NULL, which `render` replaces by `empty`."""
    bare = not message.content and "tool_calls" in message.further
    return replace(message, content=_NULL) if bare else message


def _check_safe(document: Document, coder: Coder) -> None:
    """Roles, fields and tools become part of the template's text, so they must not contain a control token."""
    for number, message in enumerate(document.messages, start=1):
        if not message.role.replace("-", "_").isidentifier():
            raise refusal(document, f"the role {message.role[:80]!r} is not a word.")
        if message.fields and (match := coder.controls.search(message.fields)):
            raise refusal(document, f"turn {number}: {', '.join(message.further)} hold the control token {match[0]}.")
    if match := coder.controls.search(document.tools):
        raise refusal(document, f"field `tools` holds the control token {match[0]}.")


def _match(rendered: str, template_text: Sequence[str], messages: Sequence[Message]) -> list[Span] | None:
    """The spans of the contents, if `rendered` is the template's text with the messages' contents in between.

    A template may strip the white space of a content, and may write a content that is not the assistant's as JSON. Any
    other change returns None.
    """
    if len(template_text) != len(messages) + 1 or not rendered.startswith(template_text[0]):
        return None
    spans: list[Span] = []
    at = len(template_text[0])
    for message, after in zip(messages, template_text[1:], strict=True):
        content = message.content
        forms = [content, content.strip(), content.lstrip(), content.rstrip()]
        if message.role != "assistant":
            forms.append(json.dumps(content, ensure_ascii=False)[1:-1])
        form = next((form for form in forms if rendered.startswith(form + after, at)), None)
        if form is None:
            return None
        spans.append(Span(message.role, at, at + len(form)))
        at += len(form) + len(after)
    return spans if at == len(rendered) else None


def _empty_content(
    document: Document, tokenizer: PreTrainedTokenizerFast, *, add_generation_prompt: bool
) -> str | None:
    """The content that the template gets for turns of only tool calls: None, as in OpenAI's data, or "".

    With None some templates write the word None, or fail. Some write the calls only if the content is an empty string.
    """
    bare = [n for n, message in enumerate(document.messages) if message.content is _NULL]
    if not bare:
        return None
    shown: dict[str | None, str] = {}
    for empty in (None, ""):
        try:
            shown[empty] = render(
                document, document.messages, tokenizer, add_generation_prompt=add_generation_prompt, empty=empty
            )
            without = _without(document.messages, bare, "tool_calls")
            if shown[empty] == render(
                document, without, tokenizer, add_generation_prompt=add_generation_prompt, empty=empty
            ):
                del shown[empty]
        except DataError:
            continue
    if None not in shown or ("" in shown and shown[None].count("None") > shown[""].count("None")):
        return ""
    return None


def _check_used(
    document: Document, tokenizer: PreTrainedTokenizerFast, rendered: str, empty: str | None, unused: Counter[str]
) -> None:
    """DataError if the template does not write a field: removing the field then leaves the rendering unchanged.

    One rendering with a mark in the fields of all turns shows most of the fields that are written. Only fields whose
    mark is missing are removed: first all of one name together and, if that changes the rendering, one by one.
    """

    def is_written(numbers: Sequence[int], key: str) -> bool:
        changed = replace(document, tools="") if key == "tools" else document
        without = _without(document.messages, numbers, key)
        try:
            return render(changed, without, tokenizer, add_generation_prompt=False, empty=empty) != rendered
        except DataError:
            return True

    if document.tools and not is_written([], "tools"):
        raise refusal(document, "the chat template leaves out `tools`.")
    unsure: dict[str, list[int]] = {}
    for n, key in _unmarked(document, tokenizer, rendered, empty):
        unsure.setdefault(key, []).append(n)
    for key, numbers in unsure.items():
        any_written = is_written(numbers, key)
        left_out = [n for n in numbers if len(numbers) > 1 and not is_written([n], key)] if any_written else numbers
        if left_out and key not in _LABELS:
            raise refusal(document, f"the chat template leaves out `{key}` of turn {left_out[0] + 1}.")
        if left_out:
            unused["`name` of turns, which the chat template does not write"] += len(left_out)


def _unmarked(
    document: Document, tokenizer: PreTrainedTokenizerFast, rendered: str, empty: str | None
) -> list[tuple[int, str]]:
    """(message index, key) of each field that leaves no mark in the rendering when its value is replaced by one.

    DataError for a turn of which the template writes only some tool calls.
    """
    mark = "octavofield"
    while mark in rendered:
        mark += "x"
    numbers = count()
    marks: dict[tuple[int, str], list[str]] = {}
    messages = list(document.messages)
    for n, message in enumerate(messages):
        fields = message.further
        for key, value in fields.items():
            if key == "tool_call_id":  # an id only links calls to answers, and some templates check its form
                continue
            field_marks = [f"{mark}{next(numbers):08d}" for _ in (value if isinstance(value, list) else [value])]
            marks[n, key] = field_marks
            fields[key] = _named(value, field_marks) if isinstance(value, list) else field_marks[0]
        if fields:
            messages[n] = replace(message, fields=json.dumps(fields, ensure_ascii=False))
    if not marks:
        return []
    try:
        text = render(document, messages, tokenizer, add_generation_prompt=False, empty=empty)
    except DataError:
        return list(marks)
    written = set(re.findall(rf"{mark}[0-9]{{8}}", text))
    for (n, _), field_marks in marks.items():
        if written.isdisjoint(field_marks) or written.issuperset(field_marks):
            continue
        n_written, n_calls = len(written.intersection(field_marks)), len(field_marks)
        raise refusal(document, f"the chat template writes {n_written} of the {n_calls} tool calls of turn {n + 1}.")
    return [place for place, field_marks in marks.items() if written.isdisjoint(field_marks)]


def _named(calls: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The tool calls with their functions renamed to `names`."""
    return [{**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)]


def _without(messages: Sequence[Message], numbers: Sequence[int], key: str) -> list[Message]:
    """The messages, with the field `key` removed from those in `numbers`."""
    changed = list(messages)
    for n in numbers:
        fields = {name: value for name, value in messages[n].further.items() if name != key}
        changed[n] = replace(messages[n], fields=json.dumps(fields, ensure_ascii=False) if fields else "")
    return changed


def turn_span(layout: Layout, number: int, document: Document, tokenizer: PreTrainedTokenizerFast) -> Span:
    """The whole text that the template writes for a turn, between the header of the assistant's turn and the next turn.

    `_rendered_span` locates the first turn of each kind (its fields and its neighbours). The text that the template
    writes around that turn is then matched around the other turns of this kind: rendering the conversation for each
    turn would take quadratic time.
    """
    gap = _gap(layout, number, document)
    if gap is None:
        return _rendered_span(layout, number, document, tokenizer)
    kind, start, end = gap
    if kind in layout.edges:
        head, tail = layout.edges[kind]
        content_span = Span(document.messages[number].role, start + len(head), end - len(tail))
        around = layout.rendered[start : content_span.start], layout.rendered[content_span.end : end]
        if content_span.start < content_span.end and around == (head, tail):
            return content_span
    span = _rendered_span(layout, number, document, tokenizer)
    if start <= span.start and span.end <= end:
        layout.edges.setdefault(kind, (layout.rendered[start : span.start], layout.rendered[span.end : end]))
    return span


def _gap(layout: Layout, number: int, document: Document) -> tuple[tuple[object, ...], int, int] | None:
    """(kind, start, end): the kind of a turn with its neighbours, and the characters between the neighbours' contents.

    None if a neighbour has no content in the text, or if another turn's content is in between.
    """
    messages = document.messages[max(0, number - 1) : number + 2]
    positions = {n: position for position, n in enumerate(layout.order)}
    if number - 1 not in positions or number + 1 not in positions:
        return None
    first, last = positions[number - 1], positions[number + 1]
    within = number in positions
    if last - first != (2 if within else 1) or (within and positions[number] != first + 1):
        return None
    is_last = number + 2 == len(document.messages)
    kind = tuple((m.role, not m.content.strip(), m.content[:1].isspace(), tuple(m.further)) for m in messages)
    return (*kind, is_last), layout.contents[first].end, layout.contents[last].start


def _rendered_span(layout: Layout, number: int, document: Document, tokenizer: PreTrainedTokenizerFast) -> Span:
    """The span of a turn: the difference of the conversation rendered up to the turn and including it.

    DataError if the latter is not the beginning of the whole rendering: then the turn is not in one place.
    """
    messages, empty = list(map(_with_null, document.messages)), layout.empty
    before = render(document, messages[:number], tokenizer, add_generation_prompt=True, empty=empty)
    with_turn = render(document, messages[: number + 1], tokenizer, add_generation_prompt=False, empty=empty)
    start = next((n for n, (a, b) in enumerate(zip(before, with_turn, strict=False)) if a != b), len(before))
    # A header may end in white space that is missing before a tool call.
    if not layout.rendered.startswith(with_turn) or before[start:].strip() or start == len(with_turn):
        message = f"the chat template does not write turn {number + 1} in one place, so it cannot be located."
        raise refusal(document, message)
    return Span(messages[number].role, start, len(with_turn))


def render(
    document: Document,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_generation_prompt: bool,
    empty: str | None = None,
) -> str:
    """The rendering of `messages` by the chat template, with the document's tools. Raises as `encode_chat` does."""
    if not tokenizer.chat_template:
        hint = "Use a model that was tuned for chat, or give the data as `prompt` and `completion`."
        raise UsageError(f"{document.where}: the model's tokenizer has no chat template.", hint=hint)
    turns = [_turn(message, empty) for message in messages]
    tools = json.loads(document.tools) if document.tools else None
    # Imported here, since `octavo data` of plain texts needs no Jinja.
    from octavo.data.template import TemplateRefusalError
    from octavo.data.template import render as render_template

    try:
        return render_template(
            tokenizer, turns, tools=tools, add_generation_prompt=add_generation_prompt, now=document.now
        )
    except TemplateRefusalError as error:
        raise refusal(document, f"{error}.") from error


def _turn(message: Message, empty: str | None) -> dict[str, Any]:
    content = empty if message.content is _NULL else message.content
    return {"role": message.role, "content": content, **message.further}


def refusal(document: Document, message: str) -> DataError:
    """The error of a conversation that cannot be used."""
    return DataError(message, source=document.source, line=document.line, hint=_INSTEAD)
