"""Conversations to token ids through the tokenizer's own chat template: the assistant's turns are trained.

The template is rendered twice, once with a placeholder for each content. The placeholders show which
stretches of the rendered text are the users' and which are the template's, whatever either of them says.
A turn with tool calls is what the template writes for it: it is found by rendering the turns before it alone.
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
from octavo.data.records import Document, Message
from octavo.data.rendering import Layout, Span, lay_out, turn_span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Ids = npt.NDArray[np.int32]
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChatCode:
    """A conversation as ids, up to and including the end of the assistant's last learned turn."""

    ids: npt.NDArray[np.int32]  # (n,)
    trained: npt.NDArray[np.bool_]  # (n,) the tokens of the assistant's contents and of its turns' ends
    n_bytes: int  # UTF-8 bytes of the trained text; a turn's end has none
    behind: int = 0  # tokens of the contents that stand behind the last learned turn, and are left out


def encode_chat(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    unused: Counter[str] | None = None,
) -> ChatCode:
    """The ids that apply_chat_template gives, except that a control token's string in a content stays text.

    What stands behind the assistant's last learned turn teaches nothing and is left out. A token that begins in the
    template's text and ends in a content counts as the content's: " yes" in "Answer: yes". Of a turn with tool calls
    all that the template writes between its header and its end is learned. Names of fields that the template does not
    write are counted in `unused`.

    Raises UsageError for a tokenizer without a template, ModelError for a template that is broken or uses too much,
    DataError for a conversation that the template cannot render or renders without one of its turns, tool calls or
    tools.
    """
    last = max(n for n, message in enumerate(document.messages) if message.role == "assistant" and message.learned)
    behind = [message.content for message in document.messages[last + 1 :]]
    with name_panics("The tokenizer"):
        left_out = sum(len(code.ids) for code in coder.plain.encode_batch_fast(behind, add_special_tokens=False))
    document = replace(document, messages=document.messages[: last + 1], now=document.now or datetime.now())
    layout = lay_out(document, tokenizer, coder, unused=Counter() if unused is None else unused)
    rendered, controls = layout.rendered, _template_controls(layout, coder)
    ids, starts, ends = _encode(rendered, controls, coder)
    trained = np.zeros(len(ids), dtype=np.bool_)
    n_bytes, length = 0, 0
    for span, end in _turns(layout, controls, document, tokenizer):
        first = int(np.searchsorted(ends, span.start, side="right"))
        length = int(np.searchsorted(starts, end))
        trained[first:length] = True
        n_bytes += len(rendered[span.start : span.end].encode())
        n_bytes -= sum(len(c.name.encode()) for c in controls if span.start <= c.start and c.end <= span.end)
    return ChatCode(ids[:length], trained[:length], n_bytes, left_out)


def encode_turns(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, coder: Coder) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins, to be gone on with.

    As in training, a control token's string in a content stays text. Raises as `encode_chat` does.
    """
    document = Document("the conversation", 1, messages=tuple(messages), now=datetime.now())
    layout = lay_out(document, tokenizer, coder, asks_for_more=True)
    ids, _, _ = _encode(layout.rendered, _template_controls(layout, coder), coder)
    return [int(number) for number in ids]


def _template_controls(layout: Layout, coder: Coder) -> list[Span]:
    """The control tokens in the template's own text."""
    edges = [0, *(edge for content in layout.contents for edge in (content.start, content.end)), len(layout.rendered)]
    own = zip(edges[::2], edges[1::2], strict=True)
    found = (match for start, end in own for match in coder.controls.finditer(layout.rendered, start, end))
    return [Span(match[0], *match.span()) for match in found]


@name_panics("The tokenizer")
def _encode(rendered: str, controls: Sequence[Span], coder: Coder) -> tuple[_Ids, _Places, _Places]:
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
        for control in [*controls, Span("", len(rendered), len(rendered))]:
            code = coder.plain.encode(rendered[at : control.start], add_special_tokens=False)
            ids += code.ids
            places += [(at + start, at + end) for start, end in code.offsets]
            if control.name:
                ids.append(coder.control_ids[control.name])
                places.append((control.start, control.end))
            at = control.end
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return np.array(ids, dtype=np.int32), starts, ends


def _turns(
    layout: Layout, controls: Sequence[Span], document: Document, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[Span, int]]:
    """What is learned of each of the assistant's turns, with the character behind the turn's end token."""
    turns = []
    for number, message in enumerate(document.messages):
        if message.role != "assistant" or not message.learned:
            continue
        if number in layout.whole:
            turns.append(_whole_turn(layout, turn_span(layout, number, document, tokenizer), controls))
        elif number in layout.order:
            turns.append(_content_turn(layout, layout.order.index(number), controls))
    return turns


def _whole_turn(layout: Layout, span: Span, controls: Sequence[Span]) -> tuple[Span, int]:
    """A turn as the template writes it, up to the control token that closes it: what is behind is between turns."""
    end = max((c.end for c in controls if span.start <= c.start and c.end <= span.end), default=span.start)
    end = span.end if layout.rendered[end : span.end].strip() else end
    return replace(span, end=end), end


def _content_turn(layout: Layout, place: int, controls: Sequence[Span]) -> tuple[Span, int]:
    """A content. The turn's end is the control token behind it that also stands behind the assistant's last content."""
    contents = layout.contents
    last = max((c for c in contents if c.name == "assistant"), key=lambda c: c.start)
    turn_end = next((c.name for c in controls if c.start >= last.end), None)
    content = contents[place]
    following = next((c for c in controls if c.start >= content.end), None)
    limit = contents[place + 1].start if place + 1 < len(contents) else None
    closes = following is not None and following.name == turn_end and (limit is None or following.start < limit)
    return content, following.end if following is not None and closes else content.end
