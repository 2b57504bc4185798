"""How many bytes of text the targets of rows stand for: what bits per byte divides by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.packing import IGNORE_INDEX, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space so
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # and a byte that is no character so


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int64]:
    """(V,) UTF-8 bytes that each token stands for; control tokens none.

    A byte-level vocabulary writes every byte as one character. A SentencePiece vocabulary writes characters as
    they are, a space as its own sign and other bytes as <0xNN>. Words added to either stand there as they are.
    """
    backend = tokenizer.backend_tokenizer
    byte_level = any("ByteLevel" in repr(part) for part in (backend.pre_tokenizer, backend.decoder))
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = len(token) if byte_level else _length(token)
    for number, added in tokenizer.added_tokens_decoder.items():
        # A word that is looked for in the normalized text stands there with SentencePiece's sign for spaces.
        content = added.content.replace(SPACE, " ") if added.normalized and not byte_level else added.content
        lengths[number] = 0 if added.special else len(content.encode())
    return lengths


def target_bytes(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> int:
    """Bytes of the text of all learned targets of `rows`."""
    lengths = token_bytes(tokenizer)
    return int(sum(lengths[row.labels[row.labels != IGNORE_INDEX]].sum() for row in rows))


def _length(token: str) -> int:
    return 1 if _BYTE.fullmatch(token) else len(token.replace(SPACE, " ").encode())
