"""Documents to token ids, each with one EOS token and a mask of the trained tokens: those that have a loss.

Control tokens are those that a tokenizer's file marks as special, such as <|im_end|>. A tokenizer has two copies in a
`Coder`: `plain` encodes the string of a control token as text, `control` as that token's id. Documents are encoded with
`plain`, so that a text about chat templates has no control tokens; only a chat template's own strings become some.

Legend: n tokens of one document.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.bytes import token_bytes
from octavo.data.chat import encode_chat
from octavo.data.documents import Skipped, skipped_of
from octavo.data.encoding import Coder, EncodedText, bos_ids, coder_of, encode_plain
from octavo.data.records import Document
from octavo.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tokens:
    """One document as token ids. The last id is the EOS token, except in a passage that is not the end of a text.

    `trained[i]` is True if `ids[i]` has a loss. The first token has none, since no token precedes it.
    """

    source: str
    line: int
    ids: npt.NDArray[np.int32]  # (n,)
    trained: npt.NDArray[np.bool_]  # (n,)
    n_bytes: int  # UTF-8 bytes of the text of the trained tokens, for bits per byte; the EOS token counts 0
    n_after: int = 0  # a conversation's tokens after the last trained turn: none is trained, so not in `ids`
    positions: tuple[tuple[int, str], ...] = ()  # (index of a token, name of the page or chapter that begins there)
    is_passage: bool = False  # a part of a document that is divided (octavo.data.passages)

    def where(self, index: int) -> str:
        """`file:line` of the document; `file: page 3` of the token `index` if the format has pages or chapters."""
        number = bisect_right(self.positions, index, key=itemgetter(0))
        return f"{self.source}: {self.positions[number - 1][1]}" if number else f"{self.source}:{self.line}"


def encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """`encode_all` of one document."""
    return encode_all([document], tokenizer)[0]


def encode_all(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    progress: Callable[[int], None] | None = None,
    skipped: list[Skipped] | None = None,
    unused: Counter[str] | None = None,
) -> list[Tokens]:
    """All documents in order, encoded in large batches.

    A text that contains the string of a control token, such as "<|im_end|>", gets the ids of these characters, not the
    id of the control token. The BOS token comes first if the model has one (`bos_ids`); a chat template writes its
    own. A text that already ends with the EOS token's string gets no second one. Prompt and
    completion are encoded separately, as at generation time. `progress` is called with the number of characters done.
    A conversation that the template rejects raises DataError, or is added to `skipped` if that is given. Fields that
    the template does not write are counted in `unused`.
    """
    coder = coder_of(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no EOS token.", hint="Use the model's own tokenizer.")
    end_id = int(tokenizer.eos_token_id)
    end = str(coder.control.id_to_token(end_id))
    # One iterator over the texts of all documents, since batches are larger than most documents.
    encoded_texts = encode_plain((text for document in documents for text in _texts(document, end)), coder, progress)
    begin = np.array(bos_ids(tokenizer), dtype=np.int32)  # (0,) or (1,)
    lengths = token_bytes(tokenizer) if any(document.positions for document in documents) else None  # (V,)
    encoded: list[Tokens] = []
    for document in documents:
        texts = _texts(document, end)
        own = list(islice(encoded_texts, len(texts)))  # the next ones: documents and texts come in the same order
        try:
            if document.messages:
                encoded.append(_chat_tokens(document, tokenizer, coder, end_id=end_id, unused=unused))
            else:
                found = _text_tokens(document, texts[-1], own, begin=begin, end_id=end_id)
                encoded.append(
                    found if lengths is None else replace(found, positions=_positions(document, found, lengths))
                )
        except DataError as error:
            if skipped is None:
                raise
            # Only a chat template rejects a document here, so its text is in its messages.
            n_bytes = sum(len(message.content.encode()) for message in document.messages)
            skipped.append(skipped_of(error, n_bytes))
        if progress and document.messages:
            progress(characters(document))
    return encoded


def _chat_tokens(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    *,
    end_id: int,
    unused: Counter[str] | None,
) -> Tokens:
    chat = encode_chat(document, tokenizer, coder, unused)
    ids, trained = chat.ids, chat.trained
    if not len(ids) or ids[-1] != end_id:
        ids, trained = np.append(ids, np.int32(end_id)), np.append(trained, True)
    trained[0] = False
    return Tokens(document.source, document.line, ids, trained, chat.n_bytes, chat.n_after)


def _text_tokens(
    document: Document,
    trained_text: str,
    encoded_texts: Sequence[EncodedText],
    *,
    begin: npt.NDArray[np.int32],
    end_id: int,
) -> Tokens:
    """The tokens of a document from its encoded `_texts`, the last of which is that of `trained_text`."""
    prompt, last = begin, encoded_texts[-1]
    if document.completion is not None:
        prompt = np.concatenate([begin, encoded_texts[0].ids])
    ids = np.concatenate([prompt, last.ids, np.array([end_id], dtype=np.int32)])  # (n,)
    trained = np.arange(len(ids)) >= len(prompt)  # (n,)
    trained[0] = False
    # Without a prompt the first token of the text is not trained, so its characters are not counted.
    counted = trained_text if len(prompt) else trained_text[last.first_token_length :]
    return Tokens(document.source, document.line, ids, trained, n_bytes=len(counted.encode()))


def _positions(document: Document, encoded: Tokens, lengths: npt.NDArray[np.int64]) -> tuple[tuple[int, str], ...]:
    """The tokens at which the pages or chapters of a text begin, found by the bytes of the tokens before them.

    `lengths` (V,) are those of `token_bytes`.
    """
    ends = np.cumsum(lengths[encoded.ids])  # (n,) bytes of the text up to and with each token
    positions, n_bytes, at = [], 0, 0
    for character, name in document.positions:
        n_bytes, at = n_bytes + len(document.text[at:character].encode()), character
        positions.append((int(np.searchsorted(ends, n_bytes, side="right")), name))
    return tuple(positions)


def characters(document: Document) -> int:
    """The number of characters of a document, the unit of progress."""
    n_plain = len(document.text) + len(document.prompt or "") + len(document.completion or "")
    return n_plain + sum(len(message.content) for message in document.messages)


def _texts(document: Document, end: str) -> tuple[str, ...]:
    """The texts to encode as plain text, the trained one last; () for a conversation."""
    if document.messages:
        return ()
    if document.completion is not None:
        return document.prompt or "", _without_end(document.completion, end)
    return (_without_end(document.text, end),)


def _without_end(text: str, end: str) -> str:
    """The text without EOS strings at its end, and without the white space after them.

    "a </s> </s> " is "a " if the EOS token is </s>. "a " stays: no EOS string precedes its white space.
    """
    stop = len(text)
    while True:
        bare = stop
        while bare and text[bare - 1].isspace():
            bare -= 1
        if not text.endswith(end, 0, bare):
            return text[:stop]
        stop = bare - len(end)
