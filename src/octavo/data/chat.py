"""Conversations to token ids with the tokenizer's chat template. Of a conversation the assistant's turns are trained.

The template is rendered twice: with the messages, and with a placeholder in place of each content. The placeholders
show which characters of the rendered text are message contents and which the template wrote, whatever either contains.
Of a turn with tool calls the whole text that the template writes is trained. `rendering.turn_span` locates that text
by rendering the conversation up to the turn.

Legend: n tokens of one conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.encoding import Coder
from octavo.data.panics import name_panics
from octavo.data.records import Document
from octavo.data.rendering import Layout, Span, lay_out, turn_span
from octavo.data.turns import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Ids = npt.NDArray[np.int32]
_Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids, up to and including the end of the assistant's last trained turn."""

    ids: npt.NDArray[np.int32]  # (n,)
    trained: npt.NDArray[np.bool_]  # (n,) True for the tokens of the assistant's contents and the end of its turns
    n_bytes: int  # UTF-8 bytes of the trained text; the token that ends a turn counts 0
    n_after: int = 0  # tokens of the contents after the last trained turn; they are not in `ids`


def encode_chat(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    unused: Counter[str] | None = None,
) -> EncodedChat:
    """The ids of apply_chat_template, except that the string of a control token in a content stays text.

    Messages after the assistant's last trained turn are left out: no trained token depends on them. A token that begins
    in the template's text and ends in a content counts as content: " yes" in "Answer: yes". Of a turn with tool calls
    everything between the turn's header and its end is trained. Names of fields that the template does not write are
    counted in `unused`.

    Raises UsageError for a tokenizer without a chat template, ModelError for a template that is invalid or exceeds its
    budget, and DataError for a conversation that the template rejects or renders without one of its turns, tool calls
    or tools.
    """
    last = max(n for n, message in enumerate(document.messages) if message.role == "assistant" and message.trained)
    after = [message.content for message in document.messages[last + 1 :]]
    with name_panics("The tokenizer"):
        n_after = sum(len(encoding.ids) for encoding in coder.plain.encode_batch_fast(after, add_special_tokens=False))
    document = replace(document, messages=document.messages[: last + 1], now=document.now or datetime.now())
    layout = lay_out(document, tokenizer, coder, unused=Counter() if unused is None else unused)
    rendered, controls = layout.rendered, _template_controls(layout, coder)
    ids, starts, ends = _encode(rendered, controls, coder)  # (n,) each
    trained = np.zeros(len(ids), dtype=np.bool_)  # (n,)
    n_bytes, length = 0, 0
    for span, end in _turns(layout, controls, document, tokenizer):
        # The first token that ends after the span starts: it may begin in the template's text.
        first = int(np.searchsorted(ends, span.start, side="right"))
        length = int(np.searchsorted(starts, end))
        trained[first:length] = True
        n_bytes += len(rendered[span.start : span.end].encode())
        n_bytes -= sum(len(c.name.encode()) for c in controls if span.start <= c.start and c.end <= span.end)
    return EncodedChat(ids[:length], trained[:length], n_bytes, n_after)


def encode_turns(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    *,
    tools: str = "",
    now: datetime | None = None,
) -> list[int]:
    """The ids of a conversation up to and including the header of the assistant's next turn, which is to be generated.

    As in training, the string of a control token in a content stays text. Raises as `encode_chat` does.
    """
    document = Document("the conversation", 1, messages=tuple(messages), tools=tools, now=now or datetime.now())
    layout = lay_out(document, tokenizer, coder, add_generation_prompt=True)
    ids, _, _ = _encode(layout.rendered, _template_controls(layout, coder), coder)
    return [int(token_id) for token_id in ids]


def _template_controls(layout: Layout, coder: Coder) -> list[Span]:
    """The control tokens in the text that the template itself wrote."""
    edges = [0, *(edge for content in layout.contents for edge in (content.start, content.end)), len(layout.rendered)]
    template_text = zip(edges[::2], edges[1::2], strict=True)
    matches = (match for start, end in template_text for match in coder.controls.finditer(layout.rendered, start, end))
    return [Span(match[0], *match.span()) for match in matches]


@name_panics("The tokenizer")
def _encode(rendered: str, controls: Sequence[Span], coder: Coder) -> tuple[_Ids, _Offsets, _Offsets]:
    """(token ids (n,), first character of each token (n,), end character of each token (n,)) of the rendered text."""
    everywhere = [match.span() for match in coder.controls.finditer(rendered)]
    if everywhere == [(control.start, control.end) for control in controls]:
        encoding = coder.control.encode(rendered, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
    else:
        # A content contains the string of a control token. Split at the template's control tokens, as the tokenizer
        # does before anything else, and encode the text between them as plain text.
        ids, offsets = [], []
        at = 0
        for control in [*controls, Span("", len(rendered), len(rendered))]:
            encoding = coder.plain.encode(rendered[at : control.start], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(at + start, at + end) for start, end in encoding.offsets]
            if control.name:
                ids.append(coder.control_ids[control.name])
                offsets.append((control.start, control.end))
            at = control.end
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T  # (n,), (n,)
    return np.array(ids, dtype=np.int32), starts, ends


def _turns(
    layout: Layout, controls: Sequence[Span], document: Document, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[Span, int]]:
    """For each trained turn of the assistant: the span of its trained text, and the end character of its end token."""
    turns = []
    for number, message in enumerate(document.messages):
        if message.role != "assistant" or not message.trained:
            continue
        if number in layout.whole:  # more than a content: tool calls, reasoning
            turns.append(_whole_turn(layout, turn_span(layout, number, document, tokenizer), controls))
        elif number in layout.order:
            turns.append(_content_turn(layout, layout.order.index(number), controls))
    return turns


def _whole_turn(layout: Layout, span: Span, controls: Sequence[Span]) -> tuple[Span, int]:
    """A whole turn, up to the control token that closes it. Text after that token belongs to no turn."""
    end = max((c.end for c in controls if span.start <= c.start and c.end <= span.end), default=span.start)
    end = span.end if layout.rendered[end : span.end].strip() else end
    return replace(span, end=end), end


def _content_turn(layout: Layout, index: int, controls: Sequence[Span]) -> tuple[Span, int]:
    """The content number `index` of the layout, with the control token that ends its turn.

    The end token of a turn is the control token that follows the assistant's last content. A turn has one if the next
    control token after its content is the same one.
    """
    contents = layout.contents
    last = max((c for c in contents if c.name == "assistant"), key=lambda c: c.start)
    turn_end = next((c.name for c in controls if c.start >= last.end), None)
    content = contents[index]
    following = next((c for c in controls if c.start >= content.end), None)
    limit = contents[index + 1].start if index + 1 < len(contents) else None
    closes = following is not None and following.name == turn_end and (limit is None or following.start < limit)
    return content, following.end if following is not None and closes else content.end
