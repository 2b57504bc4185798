"""Documents to token ids, each with one EOS token and a mask of the target tokens. Legend: n tokens of one document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.chat import encode_chat
from octavo.data.documents import Skipped, skip
from octavo.data.encoding import Coder, EncodedText, bos_ids, coder_of, encode_plain
from octavo.data.records import Document
from octavo.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tokens:
    """One document as token ids. The last id is the EOS token.

    `trained[i]` is True if `ids[i]` is a target of the loss. The first token never is, since no token precedes it.
    """

    source: str
    line: int
    ids: npt.NDArray[np.int32]  # (n,)
    trained: npt.NDArray[np.bool_]  # (n,)
    n_bytes: int  # UTF-8 bytes of the text of the target tokens, for bits per byte; the EOS token counts 0
    n_after: int = 0  # a conversation's tokens after the last trained turn: no target needs them, so not in `ids`


def encode(document: Document, tokenizer: PreTrainedTokenizerFast, *, end_id: int) -> Tokens:
    """`encode_all` of one document."""
    return encode_all([document], tokenizer, end_id=end_id)[0]


def encode_all(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    *,
    end_id: int,
    progress: Callable[[int], None] | None = None,
    skipped: list[Skipped] | None = None,
    unused: Counter[str] | None = None,
) -> list[Tokens]:
    """All documents in order, encoded in large batches. `end_id` is the id of the EOS token: tokenizer.eos_token_id.

    A text that contains the string of a control token, such as "<|im_end|>", gets the ids of these characters, not the
    id of the control token. The BOS token comes first if the model has one (`bos_ids`); a chat template writes its
    own. A text that already ends with the EOS token's string gets no second one. Prompt and
    completion are encoded separately, as at generation time. `progress` is called with the number of characters done.
    A conversation that the template rejects raises DataError, or is added to `skipped` if that is given. Fields that
    the template does not write are counted in `unused`.
    """
    coder = coder_of(tokenizer)
    end = coder.control.id_to_token(end_id)
    if end is None:
        raise UsageError(f"the EOS token {end_id} is not in the tokenizer.", hint="Use the model's own tokenizer.")
    encoded_texts = encode_plain((text for document in documents for text in _texts(document, end)), coder, progress)
    begin = np.array(bos_ids(tokenizer), dtype=np.int32)  # (0,) or (1,)
    encoded: list[Tokens] = []
    for document in documents:
        try:
            encoded.append(
                _tokens(document, tokenizer, coder, encoded_texts, begin=begin, end_id=end_id, end=end, unused=unused)
            )
        except DataError as error:
            if skipped is None:
                raise
            # Only a chat template rejects a document here, so its text is in its messages.
            n_bytes = sum(len(message.content.encode()) for message in document.messages)
            skipped.append(skip(error, n_bytes))
        if progress and document.messages:
            progress(characters(document))
    return encoded


def _tokens(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    encoded_texts: Iterator[EncodedText],
    *,
    begin: npt.NDArray[np.int32],
    end_id: int,
    end: str,
    unused: Counter[str] | None,
) -> Tokens:
    if document.messages:
        chat = encode_chat(document, tokenizer, coder, unused)
        ids, trained, n_bytes = chat.ids, chat.trained, chat.n_bytes
        if not len(ids) or ids[-1] != end_id:
            ids, trained = np.append(ids, np.int32(end_id)), np.append(trained, True)
        n_after = chat.n_after
    else:
        prompt, n_after = begin, 0
        if document.completion is not None:
            prompt = np.concatenate([begin, next(encoded_texts).ids])
        target = next(encoded_texts)
        ids = np.concatenate([prompt, target.ids, np.array([end_id], dtype=np.int32)])  # (n,)
        trained = np.arange(len(ids)) >= len(prompt)  # (n,)
        text = _texts(document, end)[-1]
        # Without a prompt the first token of the text is no target, so its characters are not counted.
        n_bytes = len((text if len(prompt) else text[target.first_characters :]).encode())
    trained[0] = False
    return Tokens(document.source, document.line, ids, trained, n_bytes, n_after)


def characters(document: Document) -> int:
    """The number of characters of a document, the unit of progress."""
    n_plain = len(document.text) + len(document.prompt or "") + len(document.completion or "")
    return n_plain + sum(len(message.content) for message in document.messages)


def _texts(document: Document, end: str) -> tuple[str, ...]:
    """The texts to encode as plain text, the target text last; () for a conversation."""
    if document.messages:
        return ()
    if document.completion is not None:
        return document.prompt or "", _without_end(document.completion, end)
    return (_without_end(document.text, end),)


def _without_end(text: str, end: str) -> str:
    """The text without EOS strings at its end, and without the white space after them."""
    stop = len(text)
    while True:
        bare = stop
        while bare and text[bare - 1].isspace():
            bare -= 1
        if not text.endswith(end, 0, bare):
            return text[:stop]
        stop = bare - len(end)
