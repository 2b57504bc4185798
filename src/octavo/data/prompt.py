"""Prompts to token ids, exactly as training met such text: the begin token where the model has one, no end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.data.chat import encode_turns
from octavo.data.encoding import begin_ids, coder_of
from octavo.data.panics import name_panics
from octavo.data.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def writes_date(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a chat template asks for the time."""
    return "strftime_now" in str(tokenizer.chat_template)


@name_panics("The tokenizer")
def encode_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a text to continue; strings of control tokens in it stay text. ModelError if the tokenizer fails."""
    return [*begin_ids(tokenizer), *coder_of(tokenizer).plain.encode(text, add_special_tokens=False).ids]


def encode_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins."""
    return encode_turns(messages, tokenizer, coder_of(tokenizer))
