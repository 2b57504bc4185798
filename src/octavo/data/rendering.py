"""A conversation as its chat template writes it, and where each content stands in that."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from octavo.data.records import Document, Message
from octavo.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from octavo.data.encoding import Coder

_INSTEAD = "Correct the record, skip it with --skip-bad, or give it as `prompt` and `completion`."
# What a template may leave out of a turn without a change of what is said: these are counted as unused.
_LABELS = ("name", "tool_call_id")
_NULL = "(no content)"  # compared by identity: a content may say the same


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the rendered text; `name` is a message's role or a control token."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The rendered conversation and where each content stands in it, in the order of the text."""

    rendered: str
    contents: list[Span]
    order: list[int]  # the number of the message that each content is of
    whole: frozenset[int]  # messages of which the template writes more than a content: tool calls, thoughts
    empty: str | None  # what templates get for the content of a turn that is only tool calls
    edges: dict[tuple[object, ...], tuple[str, str]] = field(default_factory=dict)  # filled by `turn_span`


def lay_out(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    *,
    asks_for_more: bool = False,
    unused: Counter[str] | None = None,
) -> Layout:
    """The layout of a conversation. With `asks_for_more` the template adds what begins the assistant's next turn.

    Else every turn, its tool calls and the tools must be in the text: DataError for a template that leaves one out.
    """
    _check_safe(document, coder)
    document = replace(document, messages=tuple(map(_with_null, document.messages)))
    messages = document.messages
    whole = frozenset(n for n, message in enumerate(messages) if set(message.further) - {*_LABELS})
    empty = _empty_content(document, tokenizer, asks_for_more=asks_for_more)
    names = [_placeholder(n, message) for n, message in enumerate(messages)]
    stand_ins = [replace(message, content=name) for message, name in zip(messages, names, strict=True)]
    rendered = render(document, messages, tokenizer, asks_for_more=asks_for_more, empty=empty)
    skeleton = render(document, stand_ins, tokenizer, asks_for_more=asks_for_more, empty=empty)
    # A template may leave a message out, such as a system prompt, or move it.
    present = [n for n in range(len(messages)) if names[n] is not _NULL and names[n] in skeleton]
    order = sorted(present, key=lambda n: skeleton.index(names[n]))
    for n, message in enumerate(messages):
        needed = message.role == "assistant" or (message.content.strip() and not asks_for_more)
        if needed and names[n] is not _NULL and n not in order:
            whose = "the assistant's" if message.role == "assistant" else f"of role {message.role}"
            raise refusal(document, f"the chat template leaves out turn {n + 1}, which is {whose}.")
    own_text = re.split("|".join(names[n] for n in present) or r"(?!)", skeleton)
    spans = _match(rendered, own_text, [messages[n] for n in order])
    if spans is None:
        raise refusal(document, "the chat template rewrites a message, so what to train cannot be told.")
    if not asks_for_more:
        _check_used(document, tokenizer, rendered, empty, Counter() if unused is None else unused)
    return Layout(rendered, spans, order, whole, empty)


def _placeholder(number: int, message: Message) -> str:
    """A word that stands for the content; none where tool calls stand in its place."""
    return _NULL if message.content is _NULL else f"octavo{number:08d}content"


def _with_null(message: Message) -> Message:
    """The content of a turn that is only tool calls as _NULL, for which `render` takes what the template expects."""
    bare = not message.content and "tool_calls" in message.further
    return replace(message, content=_NULL) if bare else message


def _check_safe(document: Document, coder: Coder) -> None:
    """What becomes part of the template's own text must not be able to hold a control token."""
    for number, message in enumerate(document.messages, start=1):
        if not message.role.replace("-", "_").isidentifier():
            raise refusal(document, f"the role {message.role[:80]!r} is not a word.")
        if message.fields and (held := coder.controls.search(message.fields)):
            raise refusal(document, f"turn {number}: {', '.join(message.further)} hold the control token {held[0]}.")
    if held := coder.controls.search(document.tools):
        raise refusal(document, f"field `tools` holds the control token {held[0]}.")


def _match(rendered: str, own_text: Sequence[str], messages: Sequence[Message]) -> list[Span] | None:
    """The contents' places if `rendered` is the template's own text with the messages' contents in between.

    Templates may trim the white space of a content, and write one that is not the assistant's as JSON, but change
    nothing else in it.
    """
    if len(own_text) != len(messages) + 1 or not rendered.startswith(own_text[0]):
        return None
    spans: list[Span] = []
    at = len(own_text[0])
    for message, behind in zip(messages, own_text[1:], strict=True):
        content = message.content
        forms = [content, content.strip(), content.lstrip(), content.rstrip()]
        if message.role != "assistant":
            forms.append(json.dumps(content, ensure_ascii=False)[1:-1])
        form = next((form for form in forms if rendered.startswith(form + behind, at)), None)
        if form is None:
            return None
        spans.append(Span(message.role, at, at + len(form)))
        at += len(form) + len(behind)
    return spans if at == len(rendered) else None


def _empty_content(document: Document, tokenizer: PreTrainedTokenizerFast, *, asks_for_more: bool) -> str | None:
    """What the template is to get as the content of turns that are only tool calls: null, as in the data of OpenAI.

    Some templates write that as the word None, fail on it, or write the calls only where it is an empty string.
    """
    bare = [n for n, message in enumerate(document.messages) if message.content is _NULL]
    if not bare:
        return None
    shown: dict[str | None, str] = {}
    for empty in (None, ""):
        try:
            shown[empty] = render(document, document.messages, tokenizer, asks_for_more=asks_for_more, empty=empty)
            without = _without(document.messages, bare, "tool_calls")
            if shown[empty] == render(document, without, tokenizer, asks_for_more=asks_for_more, empty=empty):
                del shown[empty]
        except DataError:
            continue
    if None not in shown or ("" in shown and shown[None].count("None") > shown[""].count("None")):
        return ""
    return None


def _check_used(
    document: Document, tokenizer: PreTrainedTokenizerFast, rendered: str, empty: str | None, unused: Counter[str]
) -> None:
    """The rendering must change when something is taken out; else the template does not write it.

    One rendering, with a mark in the fields of all turns, shows most of what is written. Only fields whose mark is not
    there are taken out: first all of one name, then, if that changes the rendering, one after the other.
    """

    def is_written(numbers: Sequence[int], key: str) -> bool:
        changed = replace(document, tools="") if key == "tools" else document
        without = _without(document.messages, numbers, key)
        try:
            return render(changed, without, tokenizer, asks_for_more=False, empty=empty) != rendered
        except DataError:
            return True

    if document.tools and not is_written([], "tools"):
        raise refusal(document, "the chat template leaves out `tools`.")
    unsure: dict[str, list[int]] = {}
    for n, key in _unmarked(document, tokenizer, rendered, empty):
        unsure.setdefault(key, []).append(n)
    for key, numbers in unsure.items():
        some = is_written(numbers, key)
        left_out = numbers if not some else [n for n in numbers if len(numbers) > 1 and not is_written([n], key)]
        if left_out and key not in _LABELS:
            raise refusal(document, f"the chat template leaves out `{key}` of turn {left_out[0] + 1}.")
        if left_out:
            unused["`name` of turns, which the chat template does not write"] += len(left_out)


def _unmarked(
    document: Document, tokenizer: PreTrainedTokenizerFast, rendered: str, empty: str | None
) -> list[tuple[int, str]]:
    """The fields of turns (number, key) of which no mark in their place is in the rendering.

    DataError for a turn of which the template writes some tool calls and not all.
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
            if key == "tool_call_id":  # an id only ties calls and answers together, and some templates check its form
                continue
            some = [f"{mark}{next(numbers):08d}" for _ in (value if isinstance(value, list) else [value])]
            marks[n, key] = some
            fields[key] = _named(value, some) if isinstance(value, list) else some[0]
        if fields:
            messages[n] = replace(message, fields=json.dumps(fields, ensure_ascii=False))
    if not marks:
        return []
    try:
        text = render(document, messages, tokenizer, asks_for_more=False, empty=empty)
    except DataError:
        return list(marks)
    found = set(re.findall(rf"{mark}[0-9]{{8}}", text))
    for (n, _), some in marks.items():
        if found.isdisjoint(some) or found.issuperset(some):
            continue
        written = len(found.intersection(some))
        raise refusal(document, f"the chat template writes {written} of the {len(some)} tool calls of turn {n + 1}.")
    return [place for place, some in marks.items() if found.isdisjoint(some)]


def _named(calls: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Tool calls, of which each calls another function."""
    return [{**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)]


def _without(messages: Sequence[Message], numbers: Sequence[int], key: str) -> list[Message]:
    """The messages, some of them without the field `key`."""
    changed = list(messages)
    for n in numbers:
        left = {name: value for name, value in messages[n].further.items() if name != key}
        changed[n] = replace(messages[n], fields=json.dumps(left, ensure_ascii=False) if left else "")
    return changed


def turn_span(layout: Layout, number: int, document: Document, tokenizer: PreTrainedTokenizerFast) -> Span:
    """All that the template writes for a turn, between what begins an assistant's turn and the next turn.

    It is found by `_rendered_span` for the first turn between turns of its kind. What the template wrote around that
    one is then looked for around the others: a rendering for each turn would take time by the square of their number.
    """
    gap = _gap(layout, number, document)
    if gap is None:
        return _rendered_span(layout, number, document, tokenizer)
    kind, start, end = gap
    if kind in layout.edges:
        head, tail = layout.edges[kind]
        inner = Span(document.messages[number].role, start + len(head), end - len(tail))
        around = layout.rendered[start : inner.start], layout.rendered[inner.end : end]
        if inner.start < inner.end and around == (head, tail):
            return inner
    span = _rendered_span(layout, number, document, tokenizer)
    if start <= span.start and span.end <= end:
        layout.edges.setdefault(kind, (layout.rendered[start : span.start], layout.rendered[span.end : end]))
    return span


def _gap(layout: Layout, number: int, document: Document) -> tuple[tuple[object, ...], int, int] | None:
    """The kind of a turn and its neighbours, and the characters between these two's contents.

    None where one of them has no content in the text, or where another turn's is between.
    """
    messages = document.messages[max(0, number - 1) : number + 2]
    places = {n: place for place, n in enumerate(layout.order)}
    if number - 1 not in places or number + 1 not in places:
        return None
    first, last = places[number - 1], places[number + 1]
    if last - first != (2 if number in places else 1) or (number in places and places[number] != first + 1):
        return None
    is_last = number + 2 == len(document.messages)
    kind = tuple((m.role, not m.content.strip(), m.content[:1].isspace(), tuple(m.further)) for m in messages)
    return (*kind, is_last), layout.contents[first].end, layout.contents[last].start


def _rendered_span(layout: Layout, number: int, document: Document, tokenizer: PreTrainedTokenizerFast) -> Span:
    """The place of a turn, by rendering the conversation up to it, and with it.

    DataError where these are not the beginning of the whole: then a turn has no place of its own.
    """
    messages, empty = list(map(_with_null, document.messages)), layout.empty
    before = render(document, messages[:number], tokenizer, asks_for_more=True, empty=empty)
    with_it = render(document, messages[: number + 1], tokenizer, asks_for_more=False, empty=empty)
    start = next((n for n, (one, other) in enumerate(zip(before, with_it, strict=False)) if one != other), len(before))
    # A header may end in white space that is not there before a tool call.
    if not layout.rendered.startswith(with_it) or before[start:].strip() or start == len(with_it):
        message = f"the chat template does not write turn {number + 1} in one place, so what to train cannot be told."
        raise refusal(document, message)
    return Span(messages[number].role, start, len(with_it))


def render(
    document: Document,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    asks_for_more: bool,
    empty: str | None = None,
) -> str:
    """What the chat template makes of `messages`, with the document's tools. Raises as `encode_chat` does."""
    if not tokenizer.chat_template:
        hint = "Take a model that was tuned for chat, or give the data as `prompt` and `completion`."
        raise UsageError(f"{document.where}: the model's tokenizer has no chat template.", hint=hint)
    turns = [_turn(message, empty) for message in messages]
    tools = json.loads(document.tools) if document.tools else None
    # Imported here, since `octavo data` of plain texts needs no Jinja.
    from octavo.data.template import TemplateRefusalError
    from octavo.data.template import render as render_template

    try:
        return render_template(tokenizer, turns, tools=tools, add_generation_prompt=asks_for_more, now=document.now)
    except TemplateRefusalError as error:
        raise refusal(document, f"{error}.") from error


def _turn(message: Message, empty: str | None) -> dict[str, Any]:
    content = empty if message.content is _NULL else message.content
    return {"role": message.role, "content": content, **message.further}


def refusal(document: Document, message: str) -> DataError:
    """Why a conversation cannot be used."""
    return DataError(message, source=document.source, line=document.line, hint=_INSTEAD)
