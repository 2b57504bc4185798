"""Held-out documents: the split, copies on both sides, and n-gram overlap with the training text (contamination).

Legend: V vocabulary size, n tokens of a text, h n-grams of the held-out text without repetitions.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.ngrams import CHUNK_TOKENS, hashes, joined
from octavo.data.records import ALPACA_HEADINGS, Document
from octavo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NGRAM = 13  # tokens of an n-gram, as in the contamination study of the GPT-3 paper (arXiv 2005.14165, appendix C)
NEAR_COPY = 0.5  # a document is a near copy if more than this share of its trained tokens is in the training text
_CHUNK_TOKENS = CHUNK_TOKENS  # tokens of the training text that are hashed at once
_WRITTEN_SPACES = " \t\r\n\u2581\u0120\u010a\u0109\u010d"  # white space as vocabularies write it
# Characters that a reader does not see: zero-width characters, the byte-order mark, the soft hyphen.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


def digest(document: Document) -> bytes:
    """A 16-byte hash of a document's text, independent of white space and Unicode form.

    It does not depend on how the text is split into prompt and completion, turns or Alpaca's fields.
    """
    prompt = document.prompt or ""
    for heading in ALPACA_HEADINGS:
        prompt = prompt.replace(heading, " ")
    parts = [document.text, prompt, document.completion or ""]
    parts += [part for message in document.messages for part in (message.content, message.fields)]
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", " ".join(parts)))
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def copies(documents: Sequence[Document], of: Sequence[Document]) -> list[int]:
    """The indices of those `documents` that have the same text as one of the documents `of`."""
    digests = {digest(document) for document in of}
    return [index for index, document in enumerate(documents) if digest(document) in digests]


def share_of(count: int, fraction: float) -> int:
    """`fraction` > 0 of `count` documents, rounded, but at least 1 and at most count - 1: neither side is empty."""
    return min(max(1, round(fraction * count)), count - 1)


def split(documents: Sequence[Document], *, fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training documents, test documents); the share `fraction` of the documents is test, exact to one document.

    Documents are ordered by a hash of their content and the seed, and the first ones are the test side. So few
    documents change sides if files are added, and none if files are moved or renamed. Copies of one text stay on one
    side; copies that exceed the share go to the training side. With two or more texts neither side is empty.
    Raises UsageError for a fraction outside [0, 1), and if all documents are copies of one text.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the test fraction is {fraction}.", hint="Give a number from 0 up to, not including, 1.")
    if fraction == 0 or len(documents) < 2:
        return list(documents), []
    groups: dict[bytes, list[int]] = {}  # digest -> indices of the copies of one text
    for index, document in enumerate(documents):
        groups.setdefault(digest(document), []).append(index)
    if len(groups) == 1:
        raise UsageError(
            f"All {len(documents):,} documents are copies of one text: none can be held out of the training.",
            hint="Give other text with --test-data, or hold nothing out with --test-fraction 0.",
        )
    ordered = sorted(groups, key=lambda content: hashlib.blake2b(b"%d\0" % seed + content).digest())
    n_test = share_of(len(documents), fraction)
    test: set[int] = set()
    n_groups = 0
    for content in ordered:
        # A group that would exceed the share is passed over. One group always stays on the training side.
        if len(test) + len(groups[content]) <= n_test and n_groups < len(groups) - 1:
            test.update(groups[content])
            n_groups += 1
    if not test:  # every group is larger than the share
        test.update(groups[min(ordered, key=lambda content: len(groups[content]))])
    sides: tuple[list[Document], list[Document]] = ([], [])
    for index, document in enumerate(documents):
        sides[index in test].append(document)
    return sides


def bare_tokens(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int32]:
    """(V,) For each token id the id of the token without surrounding white space; -1 for white space alone.

    Mapped so, a text and a copy of it with other line breaks or indentation have the same ids (without the -1), except
    for words that the tokenizer splits differently at the start of a line.
    """
    vocabulary = tokenizer.get_vocab()
    bare = np.arange(len(tokenizer), dtype=np.int32)  # (V,)
    for token, token_id in vocabulary.items():
        text = token.strip(_WRITTEN_SPACES)
        bare[token_id] = vocabulary.get(text, token_id) if text else -1
    return bare


@dataclass(frozen=True)
class Shared:
    """The overlap of held-out text with the training text."""

    tokens: int  # trained tokens of the held-out text
    shared: int  # those of them that are in an n-gram which the training text contains
    near_copies: tuple[int, ...]  # indices of held-out documents with a shared part above NEAR_COPY

    @property
    def share(self) -> float:
        """`shared` over `tokens`."""
        return self.shared / self.tokens if self.tokens else 0.0


def shared_text(
    train: Iterable[npt.NDArray[np.int32]],
    test: Sequence[npt.NDArray[np.int32]],
    trained: Sequence[npt.NDArray[np.bool_]],
) -> Shared:
    """How many tokens of `test` are in an n-gram that occurs in `train`. Only tokens that are `trained` are counted.

    N-grams are compared by a 64-bit hash. Those of the test side are sorted, and each one of the training side is
    searched among them, so memory is proportional to the test side: some 30 bytes a token.
    """
    of_test = [hashes(ids, NGRAM) for ids in test]
    wanted = np.unique(np.concatenate(of_test)) if of_test else np.zeros(0, dtype=np.uint64)  # (h,) sorted
    occurs = np.zeros(len(wanted), dtype=np.bool_)  # (h,)
    if len(wanted):
        # A bitmap over the top bits of the hash rejects most training n-grams before the binary search.
        shift = np.uint64(64 - min(27, max(10, len(wanted).bit_length() + 4)))
        bitmap = np.zeros(2 ** (64 - int(shift)), dtype=np.bool_)
        bitmap[wanted >> shift] = True
        for chunk in _chunks(train):
            candidates = hashes(chunk, NGRAM)
            candidates = candidates[bitmap[candidates >> shift]]
            index = np.minimum(np.searchsorted(wanted, candidates), len(wanted) - 1)
            occurs[index[wanted[index] == candidates]] = True
    n_tokens = n_shared = 0
    near: list[int] = []
    for number, (ngrams, mask) in enumerate(zip(of_test, trained, strict=True)):
        starts = np.flatnonzero(occurs[np.searchsorted(wanted, ngrams)]) if len(ngrams) else np.zeros(0, dtype=np.int64)
        # +1 where a shared n-gram begins, -1 after its end: the cumulative sum is above 0 within shared n-grams.
        edges = np.zeros(len(mask) + 1, dtype=np.int64)  # (n + 1,)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + NGRAM, -1)
        shared = int(np.count_nonzero((np.cumsum(edges[:-1]) > 0) & mask))
        total = int(np.count_nonzero(mask))
        n_tokens, n_shared = n_tokens + total, n_shared + shared
        if total and shared > NEAR_COPY * total:
            near.append(number)
    return Shared(n_tokens, n_shared, tuple(near))


def _chunks(texts: Iterable[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    """All n-grams of the texts, in arrays of about _CHUNK_TOKENS ids.

    A long text is split with an overlap of NGRAM - 1, so that no n-gram is lost.
    """
    parts = (
        ids[start : start + _CHUNK_TOKENS + NGRAM - 1]
        for ids in texts
        for start in range(0, max(0, len(ids) - NGRAM + 1), _CHUNK_TOKENS)
    )
    return joined(parts, _CHUNK_TOKENS)
