"""Log-probabilities in OpenAI's two shapes, and the texts that tokens stand for there."""

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

LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON has no number for
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies' letter for each byte (GPT-2's encoder.py): itself if visible, else from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


class Vocabulary:
    """The bytes and the text of single tokens. `size` is the number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.size = len(tokenizer)
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self._byte_level = any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))
        self._added = {int(number): str(added.content) for number, added in tokenizer.added_tokens_decoder.items()}

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8, of which a token may hold only a part of a character."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = str(self._tokenizer.convert_ids_to_tokens(token_id) or "")
        if self._byte_level:
            letters = _byte_letters()
            return bytes(letters[letter] for letter in token if letter in letters)
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()

    def text_of(self, token_id: int) -> str:
        """The token as text; what is no whole character is spelt as OpenAI does: bytes:\\xe2\\x80."""
        own = self.bytes_of(token_id)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def completion_logprobs(
    tokens: Sequence[Token], offsets: Sequence[int], *, vocabulary: Vocabulary, top: int
) -> CompletionLogprobs:
    """The shape of /v1/completions. A token that is not among the `top` likeliest is listed with them."""
    return CompletionLogprobs(
        tokens=[vocabulary.text_of(token.token_id) for token in tokens],
        token_logprobs=[None if token.logprob is None else max(token.logprob, LEAST) for token in tokens],
        top_logprobs=[_top_of(token, vocabulary, top=top) for token in tokens],
        text_offset=list(offsets),
    )


def _top_of(token: Token, vocabulary: Vocabulary, *, top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for number, logprob in [*token.top[:top], (token.token_id, token.logprob)]:
        found.setdefault(vocabulary.text_of(number), max(logprob, LEAST))
    return found


def chat_logprob(token: Token, vocabulary: Vocabulary, *, top: int) -> ChatLogprob:
    """The shape of /v1/chat/completions, for one token."""
    assert token.logprob is not None
    likeliest = [_entry(number, logprob, vocabulary) for number, logprob in token.top[:top]]
    own = _entry(token.token_id, token.logprob, vocabulary)
    return ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=likeliest)


def _entry(token_id: int, logprob: float, vocabulary: Vocabulary) -> TopLogprob:
    return TopLogprob(
        token=vocabulary.text_of(token_id), logprob=max(logprob, LEAST), bytes=list(vocabulary.bytes_of(token_id))
    )
