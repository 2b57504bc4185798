"""Documents to token ids, each with its one end token and with what is to be learned marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.chat import encode_chat
from octavo.data.documents import Skipped, skip
from octavo.data.encoding import Code, Coder, begin_ids, coder_of, plain_codes
from octavo.data.records import Document
from octavo.errors import DataError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tokens:
    """One document as token ids. The last id is the end token, and no other one is its end.

    `trained[i]` says whether `ids[i]` is a target to learn; the first never is, since nothing predicts it.
    """

    source: str
    line: int
    ids: npt.NDArray[np.int32]  # (n,)
    trained: npt.NDArray[np.bool_]  # (n,)
    n_bytes: int  # UTF-8 bytes of the text of the trained tokens, for bits per byte; an end token has none
    behind: int = 0  # tokens of the document that teach nothing and are not in `ids`: turns behind the last learned one


def encode(document: Document, tokenizer: PreTrainedTokenizerFast, *, end_id: int) -> Tokens:
    """One document; see `encode_all`."""
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
    """All documents in order, encoded many at a time. `end_id` is the end token: tokenizer.eos_token_id.

    Strings of control tokens in a text stay text. The model's begin token comes first where it has one
    (`begin_ids`); a chat template writes its own. A text that ends in the end token's string already gets no
    second one. Prompt and completion are encoded apart, as generation will meet them. `progress` is called with
    the characters that are done. A conversation that the template refuses raises DataError, or is added to `skipped`
    where that is given; fields that it does not write are counted in `unused`.
    """
    coder = coder_of(tokenizer)
    end = coder.control.id_to_token(end_id)
    if end is None:
        raise UsageError(f"the end token {end_id} is not in the tokenizer.", hint="Use the model's own tokenizer.")
    codes = plain_codes((text for document in documents for text in _texts(document, end)), coder, progress)
    begin = np.array(begin_ids(tokenizer), dtype=np.int32)
    encoded: list[Tokens] = []
    for document in documents:
        try:
            encoded.append(
                _tokens(document, tokenizer, coder, codes, begin=begin, end_id=end_id, end=end, unused=unused)
            )
        except DataError as error:
            if skipped is None:
                raise
            n_bytes = sum(len(message.content.encode()) for message in document.messages)
            skipped.append(skip(error, n_bytes))
        if progress and document.messages:
            progress(characters(document))
    return encoded


def _tokens(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    coder: Coder,
    codes: Iterator[Code],
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
        behind = chat.behind
    else:
        prompt, behind = begin, 0
        if document.completion is not None:
            prompt = np.concatenate([begin, next(codes).ids])
        learned = next(codes)
        ids = np.concatenate([prompt, learned.ids, np.array([end_id], dtype=np.int32)])
        trained = np.arange(len(ids)) >= len(prompt)
        text = _texts(document, end)[-1]
        # Where no prompt comes first, nothing predicts the first token.
        n_bytes = len((text if len(prompt) else text[learned.first_characters :]).encode())
    trained[0] = False
    return Tokens(document.source, document.line, ids, trained, n_bytes, behind)


def characters(document: Document) -> int:
    """How much text a document is: what progress is counted in."""
    own = len(document.text) + len(document.prompt or "") + len(document.completion or "")
    return own + sum(len(message.content) for message in document.messages)


def _texts(document: Document, end: str) -> tuple[str, ...]:
    """What to encode as plain text, the text to learn last; of a conversation nothing."""
    if document.messages:
        return ()
    if document.completion is not None:
        return document.prompt or "", _without_end(document.completion, end)
    return (_without_end(document.text, end),)


def _without_end(text: str, end: str) -> str:
    """The text without end tokens' strings at its end, nor the white space behind them."""
    stop = len(text)
    while True:
        bare = stop
        while bare and text[bare - 1].isspace():
            bare -= 1
        if not text.endswith(end, 0, bare):
            return text[:stop]
        stop = bare - len(end)
