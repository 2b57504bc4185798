"""UTF-8 bytes of the text of each token: bits per byte count them, and positions in a text are found by them.

Legend: V vocabulary size.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte that has no token of its character


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int64]:
    """(V,) UTF-8 bytes of the text of each token id. Control tokens have 0 bytes.

    A byte-level vocabulary writes every byte as one character. A SentencePiece vocabulary writes a space as U+2581,
    a byte without a character as <0xNN>, and any other character as it is. Both write added tokens as plain text.
    """
    backend = tokenizer.backend_tokenizer
    byte_level = any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))
    lengths = np.zeros(len(tokenizer), dtype=np.int64)  # (V,)
    for token, token_id in tokenizer.get_vocab().items():
        lengths[token_id] = len(token) if byte_level else _length(token)
    for token_id, added in tokenizer.added_tokens_decoder.items():
        # A `normalized` added token is matched in the normalized text, so SentencePiece writes its spaces as U+2581.
        content = added.content.replace(SPACE, " ") if added.normalized and not byte_level else added.content
        lengths[token_id] = 0 if added.special else len(content.encode())
    return lengths


def _length(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
