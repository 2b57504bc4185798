"""Prompts to token ids, exactly as training met such text: the begin token where the model has one, no end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.data.chat import encode_turns
from octavo.data.encoding import coder_of
from octavo.data.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def begin_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The begin token that the model's texts start with ([id]), or [] for a model that has none.

    A Llama was trained with one before every text and predicts badly without; GPT-J and SmolLM2 have none. The
    tokenizer itself tells: it puts it before an empty text.
    """
    added = tokenizer("", add_special_tokens=True)["input_ids"]
    begin = tokenizer.bos_token_id
    return [int(begin)] if begin is not None and added and added[0] == begin else []


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a text to continue; strings of control tokens in it stay text."""
    return [*begin_ids(tokenizer), *coder_of(tokenizer).plain.encode(text, add_special_tokens=False).ids]


def encode_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins."""
    return encode_turns(messages, tokenizer, coder_of(tokenizer))
