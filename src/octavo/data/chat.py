"""Conversations to token ids through the tokenizer's own chat template: the assistant's turns are trained.

The template is rendered twice, once with a placeholder for each content. The placeholders show which
stretches of the rendered text are the users' and which are the template's, whatever either of them says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.encoding import Coder, name_panics
from octavo.data.records import Document, Message
from octavo.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_INSTEAD = "Correct the record, skip it with --skip-bad, or give it as `prompt` and `completion`."


_Ids = npt.NDArray[np.int32]
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChatCode:
    """A conversation as ids, up to and including the end of the assistant's last turn."""

    ids: npt.NDArray[np.int32]  # (n,)
    trained: npt.NDArray[np.bool_]  # (n,) the tokens of the assistant's contents and of its turns' ends
    n_bytes: int  # UTF-8 bytes of the trained text; a turn's end has none


@dataclass(frozen=True)
class _Span:
    """Characters [start, end) of the rendered text; `name` is a message's role or a control token."""

    name: str
    start: int
    end: int


def encode_chat(document: Document, tokenizer: PreTrainedTokenizerFast, coder: Coder) -> ChatCode:
    """The ids that apply_chat_template gives, except that a control token's string in a content stays text.

    What stands behind the assistant's last turn teaches nothing and is left out. A token that begins in the
    template's text and ends in a content counts as the content's: " yes" in "Answer: yes".
    Raises UsageError for a tokenizer without a template, ModelError for a template that is broken or uses too much,
    DataError for a conversation that it cannot render.
    """
    last = max(number for number, message in enumerate(document.messages) if message.role == "assistant")
    document = replace(document, messages=document.messages[: last + 1])
    rendered, contents = _layout(document, tokenizer)
    controls = _template_controls(rendered, contents, coder)
    ids, starts, ends = _encode(rendered, controls, coder)
    trained = np.zeros(len(ids), dtype=np.bool_)
    n_bytes, length = 0, 0
    for content, end in _turns(contents, controls):
        first = int(np.searchsorted(ends, content.start, side="right"))
        length = int(np.searchsorted(starts, end))
        trained[first:length] = True
        n_bytes += len(rendered[content.start : content.end].encode())
    return ChatCode(ids[:length], trained[:length], n_bytes)


def encode_turns(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, coder: Coder) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins, to be gone on with.

    As in training, a control token's string in a content stays text. Raises as `encode_chat` does.
    """
    document = Document("the conversation", 1, messages=tuple(messages))
    rendered, contents = _layout(document, tokenizer, asks_for_more=True)
    ids, _, _ = _encode(rendered, _template_controls(rendered, contents, coder), coder)
    return [int(number) for number in ids]


def _layout(
    document: Document, tokenizer: PreTrainedTokenizerFast, *, asks_for_more: bool = False
) -> tuple[str, list[_Span]]:
    """The rendered conversation and where each content stands in it, in the order of the text.

    With `asks_for_more` the template adds what begins the assistant's next turn.
    """
    messages = document.messages
    for message in messages:
        # A role becomes part of the template's own text, so it must not be able to hold a control token.
        if not message.role.replace("-", "_").isidentifier():
            raise _refusal(document, f"the role {message.role!r} is not a word.")
    names = [f"octavo{number:08d}content" for number in range(len(messages))]
    stand_ins = [Message(message.role, name) for message, name in zip(messages, names, strict=True)]
    rendered = _render(document, messages, tokenizer, asks_for_more=asks_for_more)
    skeleton = _render(document, stand_ins, tokenizer, asks_for_more=asks_for_more)
    # A template may leave a message out, such as a system prompt, or move it.
    order = sorted((n for n in range(len(messages)) if names[n] in skeleton), key=lambda n: skeleton.index(names[n]))
    lost = [n for n, message in enumerate(messages) if message.role == "assistant" and n not in order]
    if lost:
        raise _refusal(document, f"the chat template leaves out turn {lost[0] + 1}, which is the assistant's.")
    own_text = re.split("|".join(names), skeleton)
    spans = _match(rendered, own_text, [messages[n] for n in order])
    if spans is None:
        raise _refusal(document, "the chat template rewrites a message, so what to train cannot be told.")
    return rendered, spans


def _match(rendered: str, own_text: Sequence[str], messages: Sequence[Message]) -> list[_Span] | None:
    """The contents' places if `rendered` is the template's own text with the messages' contents in between.

    Templates may trim the white space of a content, but change nothing else in it.
    """
    if len(own_text) != len(messages) + 1 or not rendered.startswith(own_text[0]):
        return None
    spans: list[_Span] = []
    at = len(own_text[0])
    for message, behind in zip(messages, own_text[1:], strict=True):
        content = message.content
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((form for form in forms if rendered.startswith(form + behind, at)), None)
        if form is None:
            return None
        spans.append(_Span(message.role, at, at + len(form)))
        at += len(form) + len(behind)
    return spans if at == len(rendered) else None


def _render(
    document: Document,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    *,
    asks_for_more: bool,
) -> str:
    if not tokenizer.chat_template:
        hint = "Take a model that was tuned for chat, or give the data as `prompt` and `completion`."
        raise UsageError(f"{document.where}: the model's tokenizer has no chat template.", hint=hint)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    # Imported here, since `octavo data` of plain texts needs no Jinja.
    from octavo.data.template import TemplateRefusalError, render

    try:
        return render(tokenizer, turns, add_generation_prompt=asks_for_more)
    except TemplateRefusalError as error:
        raise _refusal(document, f"{error}.") from error


def _template_controls(rendered: str, contents: Sequence[_Span], coder: Coder) -> list[_Span]:
    """The control tokens in the template's own text."""
    edges = [0, *(edge for content in contents for edge in (content.start, content.end)), len(rendered)]
    own = zip(edges[::2], edges[1::2], strict=True)
    found = (match for start, end in own for match in coder.controls.finditer(rendered, start, end))
    return [_Span(match[0], *match.span()) for match in found]


@name_panics("The tokenizer")
def _encode(rendered: str, controls: Sequence[_Span], coder: Coder) -> tuple[_Ids, _Places, _Places]:
    """The ids of the rendered text, and the characters that each begins at and ends before."""
    everywhere = [match.span() for match in coder.controls.finditer(rendered)]
    if everywhere == [(control.start, control.end) for control in controls]:
        code = coder.control.encode(rendered, add_special_tokens=False)
        ids, places = code.ids, code.offsets
    else:
        # A content holds a control token's string. Cut at the template's control tokens, as the tokenizer
        # does itself before anything else, and take what is between as plain text.
        ids, places = [], []
        at = 0
        for control in [*controls, _Span("", len(rendered), len(rendered))]:
            code = coder.plain.encode(rendered[at : control.start], add_special_tokens=False)
            ids += code.ids
            places += [(at + start, at + end) for start, end in code.offsets]
            if control.name:
                ids.append(coder.control_ids[control.name])
                places.append((control.start, control.end))
            at = control.end
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return np.array(ids, dtype=np.int32), starts, ends


def _turns(contents: Sequence[_Span], controls: Sequence[_Span]) -> list[tuple[_Span, int]]:
    """The assistant's contents, each with the character behind its turn's end token.

    That token is the first control token behind the last content; where a turn has none, its content's end.
    """
    following = [next((c for c in controls if c.start >= content.end), None) for content in contents]
    turn_end = following[-1].name if following[-1] else None
    limits = [content.start for content in contents[1:]] + [None]
    turns: list[tuple[_Span, int]] = []
    for content, control, limit in zip(contents, following, limits, strict=True):
        if content.name != "assistant":
            continue
        closes = control is not None and control.name == turn_end and (limit is None or control.start < limit)
        turns.append((content, control.end if control is not None and closes else content.end))
    return turns


def _refusal(document: Document, message: str) -> DataError:
    return DataError(message, source=document.source, line=document.line, hint=_INSTEAD)
