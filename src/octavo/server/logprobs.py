"""Logprobs in OpenAI's two formats, and the text and bytes of single tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from octavo.data.bytes import SPACE
from octavo.infer.requests import Token
from octavo.server.responses import ChatLogprob, CompletionLogprobs, TopLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_LOGPROB = -9999.0  # OpenAI's value for minus infinity, which JSON cannot represent
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=1)
def _byte_decoder() -> dict[str, int]:
    """Inverse of GPT-2's bytes_to_unicode (encoder.py): the byte of each character of a byte-level vocabulary.

    A printable byte is the character of the same code point; the others are numbered from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


class Vocabulary:
    """The bytes and the text of single tokens. `size` is the vocab size including added tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.size = len(tokenizer)
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self._byte_level = any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))
        self._added = {int(token_id): str(added.content) for token_id, added in tokenizer.added_tokens_decoder.items()}

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, which may be part of a character only."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = str(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        if self._byte_level:
            decoder = _byte_decoder()
            return bytes(decoder[char] for char in token if char in decoder)
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()

    def text_of(self, token_id: int) -> str:
        """The token as text. Bytes that are not whole characters are written as OpenAI does: bytes:\\xe2\\x80."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    tokens: Sequence[Token], offsets: Sequence[int], *, vocabulary: Vocabulary, top: int
) -> CompletionLogprobs:
    """The format of /v1/completions. The sampled token is included even if it is not among the `top` likeliest."""
    return CompletionLogprobs(
        tokens=[vocabulary.text_of(token.token_id) for token in tokens],
        token_logprobs=[None if token.logprob is None else max(token.logprob, MIN_LOGPROB) for token in tokens],
        top_logprobs=[_top_of(token, vocabulary, top=top) for token in tokens],
        text_offset=list(offsets),
    )


def _top_of(token: Token, vocabulary: Vocabulary, *, top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    top_logprobs: dict[str, float] = {}
    for token_id, logprob in [*token.top[:top], (token.token_id, token.logprob)]:
        top_logprobs.setdefault(vocabulary.text_of(token_id), max(logprob, MIN_LOGPROB))
    return top_logprobs


def chat_logprob(token: Token, vocabulary: Vocabulary, *, top: int) -> ChatLogprob:
    """The format of /v1/chat/completions, for one token."""
    assert token.logprob is not None
    likeliest = [_entry(token_id, logprob, vocabulary) for token_id, logprob in token.top[:top]]
    sampled = _entry(token.token_id, token.logprob, vocabulary)
    return ChatLogprob(token=sampled.token, logprob=sampled.logprob, bytes=sampled.bytes, top_logprobs=likeliest)


def _entry(token_id: int, logprob: float, vocabulary: Vocabulary) -> TopLogprob:
    return TopLogprob(
        token=vocabulary.text_of(token_id), logprob=max(logprob, MIN_LOGPROB), bytes=list(vocabulary.bytes_of(token_id))
    )
