"""Verbatim copies of training text in generated text, in n-grams of tokens.

Legend: P tokens of a prompt, n generated tokens of one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.encoding import bos_ids
from octavo.data.ngrams import chunks_of, hashes, occurrences, pieces_of
from octavo.data.packing import IGNORE_INDEX, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = npt.NDArray[np.int32]

COPY = 8  # tokens, some six words: shorter runs are also stock phrases, of which any text has many
PROMPT = 16  # tokens, the same for all prompts: they are continued in one batch
NEW_TOKENS = 24  # of a sample
PROMPTS = 6  # of each side: held-out text and training text


@dataclass(frozen=True)
class Longest:
    """The longest run of generated tokens that the training text has."""

    tokens: int = 0
    text: tuple[int, ...] = ()
    source: str = ""  # "file:line" of a training document that has it; of the documents in its row


def choose_prompts(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Ids]:
    """Prompts (P,): the beginnings of pieces of up to PROMPTS rows that have at least COPY more tokens.

    In a conversation they end where its answer begins.
    """
    begin = np.array(bos_ids(tokenizer), dtype=np.int32)
    prompts: list[Ids] = []
    for number in sorted(range(len(rows)), key=lambda number: hashlib.blake2b(b"%d" % number, digest_size=8).digest()):
        for piece, ids in enumerate(pieces_of(rows[number])):
            trained = np.flatnonzero(rows[number].labels[rows[number].piece == piece] != IGNORE_INDEX)
            at = max(PROMPT, int(trained[0]) + 1) if len(trained) else len(ids)
            if at + COPY <= len(ids) and len(prompts) < PROMPTS:
                inner = ids[at - PROMPT : at] if at == PROMPT else ids[at - PROMPT + len(begin) : at]
                prompts.append(inner if at == PROMPT else np.concatenate([begin, inner]))
                break
        if len(prompts) == PROMPTS:
            break
    return prompts


def copied(samples: Sequence[Ids], training: Sequence[Row]) -> tuple[list[int], list[int]]:
    """(of each sample how many of its n-grams of COPY tokens the training text has, how many n-grams it has)."""
    grams = [hashes(ids, COPY) for ids in samples]
    found = occurrences(np.concatenate(grams), chunks_of(training), COPY) > 0 if grams else np.zeros(0, np.bool_)
    parts = np.split(found, np.cumsum([len(each) for each in grams])[:-1])
    return [int(part.sum()) for part in parts], [len(each) for each in grams]


def shuffled(samples: Sequence[Ids]) -> list[Ids]:
    """The tokens of each sample in another order: the control, which has the same words."""
    orders = (sorted(range(len(ids)), key=lambda index: hashlib.blake2b(b"%d" % index).digest()) for ids in samples)
    return [ids[order] for ids, order in zip(samples, orders, strict=True)]


def longest_copy(samples: Sequence[Ids], training: Sequence[Row]) -> Longest:
    """The longest run of at least COPY tokens that a sample shares with a training piece, and where; the first one."""
    wanted: dict[int, list[Ids]] = {}  # hash of an n-gram -> the ids from it on
    for sample in samples:
        for start, value in enumerate(hashes(sample, COPY)):
            wanted.setdefault(int(value), []).append(sample[start:])
    keys = np.array(sorted(wanted), dtype=np.uint64)
    best = Longest()
    for row in training:
        for number, ids in enumerate(pieces_of(row)):
            grams = hashes(ids, COPY)
            for at in np.flatnonzero(np.isin(grams, keys)).tolist():
                for rest in wanted[int(grams[at])]:
                    if (length := _common(rest, ids[at:])) > best.tokens:
                        best = Longest(length, tuple(rest[:length].tolist()), _source(row, number))
    return best


def _source(row: Row, piece: int) -> str:
    """Where a piece is from; of rows whose pieces share sources, all of these."""
    return row.sources[piece] if len(row.sources) == len(row.documents) else ", ".join(row.sources)


def _common(first: Ids, second: Ids) -> int:
    """How many tokens both begin with."""
    n = min(len(first), len(second))
    different = np.flatnonzero(first[:n] != second[:n])
    return int(different[0]) if len(different) else n
