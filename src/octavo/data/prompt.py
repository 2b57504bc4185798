"""Prompts to token ids, in the form of the training data: a BOS token where the model has one, no EOS token."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from octavo.data.chat import encode_turns
from octavo.data.encoding import bos_ids, coder_of
from octavo.data.panics import name_panics
from octavo.data.turns import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def writes_date(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template writes the current time."""
    return "strftime_now" in str(tokenizer.chat_template)


@name_panics("The tokenizer")
def encode_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a text to continue. Strings of control tokens stay text. ModelError if the tokenizer fails."""
    return [*bos_ids(tokenizer), *coder_of(tokenizer).plain.encode(text, add_special_tokens=False).ids]


def encode_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast, *, tools: str = "", now: datetime | None = None
) -> list[int]:
    """The ids of a conversation, up to and including the header of the assistant's next turn.

    `tools` and `now` are those of a Document, for the chat template.
    """
    return encode_turns(messages, tokenizer, coder_of(tokenizer), tools=tools, now=now)
