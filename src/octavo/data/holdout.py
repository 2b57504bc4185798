"""What is held out: a share of the documents, copies between the sides, what the training text has of the other."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.bytes import token_bytes
from octavo.data.encoding import begin_ids
from octavo.data.records import ALPACA_HEADINGS, Document
from octavo.data.tokens import Tokens
from octavo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NGRAM = 13  # tokens that both sides share in a row: as in the GPT-3 paper (arXiv 2005.14165, appendix C)
NEAR_COPY = 0.5  # a document is a near copy if so much of its learned text is in the training text
_CHUNK_TOKENS = 2**20
_WRITTEN_SPACES = " \t\r\n\u2581\u0120\u010a\u0109\u010d"  # white space as vocabularies write it
# Signs that change nothing of what is read: zero-width ones, the byte-order mark, the soft hyphen.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")


def digest(document: Document) -> bytes:
    """16 bytes that are the same for documents of the same text, whatever their white space and Unicode form.

    How the text is parted into prompt and completion, turns or Alpaca's fields makes no difference.
    """
    prompt = document.prompt or ""
    for heading in ALPACA_HEADINGS:
        prompt = prompt.replace(heading, " ")
    parts = [document.text, prompt, document.completion or ""]
    parts += [part for message in document.messages for part in (message.content, message.fields)]
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", " ".join(parts)))
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def copies(documents: Sequence[Document], of: Sequence[Document]) -> list[int]:
    """The numbers of those `documents` whose text is also one of `of`."""
    known = {digest(document) for document in of}
    return [number for number, document in enumerate(documents) if digest(document) in known]


def share_of(count: int, fraction: float) -> int:
    """How many of `count` documents a fraction above 0 is: at least one on either side."""
    return min(max(1, round(fraction * count)), count - 1)


def split(documents: Sequence[Document], *, fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """A training and a test side; `fraction` of the documents are test, exact to one document.

    Documents are put in an order that their content and the seed alone decide, and the first ones are test: few change
    their side when files are added, and none when they are moved or renamed. Copies of one text stay together; where
    they are more than the share has room for, they are learned. With two or more texts neither side is empty.
    Raises UsageError for a fraction outside [0, 1), and where all documents are copies of one text.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the test fraction is {fraction}.", hint="Give a number from 0 up to, not including, 1.")
    if fraction == 0 or len(documents) < 2:
        return list(documents), []
    groups: dict[bytes, list[int]] = {}
    for number, document in enumerate(documents):
        groups.setdefault(digest(document), []).append(number)
    if len(groups) == 1:
        raise UsageError(
            f"All {len(documents):,} documents are copies of one text: none can be held out of the training.",
            hint="Give other text with --test-data, or hold nothing out with --test-fraction 0.",
        )
    ordered = sorted(groups, key=lambda content: hashlib.blake2b(b"%d\0" % seed + content).digest())
    wanted = share_of(len(documents), fraction)
    test: set[int] = set()
    taken = 0
    for content in ordered:
        if len(test) + len(groups[content]) <= wanted and taken < len(groups) - 1:
            test.update(groups[content])
            taken += 1
    if not test:
        test.update(groups[min(ordered, key=lambda content: len(groups[content]))])
    sides: tuple[list[Document], list[Document]] = ([], [])
    for number, document in enumerate(documents):
        sides[number in test].append(document)
    return sides


def cut(tokens: Tokens, at: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tokens, Tokens]:
    """A plain text parted before token `at`: its beginning, without an end token, and its rest, which begins as a text
    of its own does."""
    lengths = token_bytes(tokenizer)
    begin = np.array(begin_ids(tokenizer), dtype=np.int32)
    rest = np.concatenate([begin, tokens.ids[at:]])
    trained = np.arange(len(rest)) >= max(1, len(begin))
    first = replace(tokens, ids=tokens.ids[:at], trained=tokens.trained[:at])
    second = replace(tokens, ids=rest, trained=trained)
    sides = (replace(side, n_bytes=int(lengths[side.ids[side.trained]].sum())) for side in (first, second))
    return next(sides), next(sides)


def bare_tokens(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.int32]:
    """(V,) for each token the one that its text is without white space around it; -1 for white space alone.

    So a text that is wrapped at other columns, or indented, has the same tokens but for words that begin a line and
    are split otherwise there.
    """
    vocabulary = tokenizer.get_vocab()
    bare = np.arange(len(tokenizer), dtype=np.int32)
    for token, number in vocabulary.items():
        text = token.strip(_WRITTEN_SPACES)
        bare[number] = vocabulary.get(text, number) if text else -1
    return bare


@dataclass(frozen=True)
class Shared:
    """How much of the held-out text is in the training text as well, in runs of NGRAM tokens or more."""

    tokens: int  # learned tokens of the held-out text
    shared: int  # those of them that are in a run which the training text holds
    near_copies: tuple[int, ...]  # numbers of held-out documents with more than NEAR_COPY of them shared

    @property
    def share(self) -> float:
        """`shared` over `tokens`."""
        return self.shared / self.tokens if self.tokens else 0.0


def shared_text(
    train: Iterable[npt.NDArray[np.int32]],
    test: Sequence[npt.NDArray[np.int32]],
    learned: Sequence[npt.NDArray[np.bool_]],
) -> Shared:
    """Runs of NGRAM tokens of `test` that stand in `train`; of them those places count that are `learned`.

    Runs are compared by a hash of 64 bits. The memory is that of the test side: some 30 bytes a token.
    """
    hashes = [_hashes(ids) for ids in test]
    wanted = np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, dtype=np.uint64)
    found = np.zeros(len(wanted), dtype=np.bool_)
    if len(wanted):
        # A table of bits that most runs of the training text fall through, before the search among sorted numbers.
        shift = np.uint64(64 - min(27, max(10, len(wanted).bit_length() + 4)))
        table = np.zeros(2 ** (64 - int(shift)), dtype=np.bool_)
        table[wanted >> shift] = True
        for chunk in _chunks(train):
            some = _hashes(chunk)
            some = some[table[some >> shift]]
            place = np.minimum(np.searchsorted(wanted, some), len(wanted) - 1)
            found[place[wanted[place] == some]] = True
    tokens = shared = 0
    near: list[int] = []
    for number, (ids, mask) in enumerate(zip(hashes, learned, strict=True)):
        starts = np.flatnonzero(found[np.searchsorted(wanted, ids)]) if len(ids) else np.zeros(0, dtype=np.int64)
        # +1 where a run begins, -1 behind its end: inside a run the sum is above 0.
        edges = np.zeros(len(mask) + 1, dtype=np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + NGRAM, -1)
        inside = int(np.count_nonzero((np.cumsum(edges[:-1]) > 0) & mask))
        own = int(np.count_nonzero(mask))
        tokens, shared = tokens + own, shared + inside
        if own and inside > NEAR_COPY * own:
            near.append(number)
    return Shared(tokens, shared, tuple(near))


def _chunks(texts: Iterable[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    """All runs of the texts in arrays of about _CHUNK_TOKENS: long texts cut with an overlap, short ones put together
    with an id between them that no token has."""
    between = np.array([-1], dtype=np.int32)
    held: list[npt.NDArray[np.int32]] = []
    size = 0
    for ids in texts:
        for start in range(0, max(0, len(ids) - NGRAM + 1), _CHUNK_TOKENS):
            piece = ids[start : start + _CHUNK_TOKENS + NGRAM - 1]
            held += [piece, between]
            size += len(piece) + 1
            if size >= _CHUNK_TOKENS:
                yield np.concatenate(held)
                held, size = [], 0
    if held:
        yield np.concatenate(held)


def _hashes(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """(max(0, n - NGRAM + 1),) one number for each run of NGRAM ids: a sum of products modulo 2**64."""
    n = len(ids) - NGRAM + 1
    if n <= 0:
        return np.zeros(0, dtype=np.uint64)
    mixed = ids.astype(np.int64).astype(np.uint64)
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(n, dtype=np.uint64)
    factor = 0xBF58476D1CE4E5B9
    for offset in range(NGRAM):
        total += mixed[offset : offset + n] * np.uint64(factor)
        factor = (factor * 0x94D049BB133111EB) % 2**64
    total *= np.uint64(0xD6E8FEB86659FD93)
    return total ^ (total >> np.uint64(32))
