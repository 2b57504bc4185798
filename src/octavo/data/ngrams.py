"""Hashes of the n-grams of token ids, and how often each of some n-grams occurs in a text.

Legend: m ids of a text, h n-grams that are searched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from octavo.data.packing import Row

CHUNK_TOKENS = 2**20  # ids of a text that are hashed at once
Hashes = npt.NDArray[np.uint64]


def hashes(ids: npt.NDArray[np.int32], n: int) -> Hashes:
    """(max(0, m - n + 1),) A hash of each n-gram: sum_i c_i mix(id_i) modulo 2**64, then mixed; the c_i are odd.

    As a sum it takes n vectorized additions for a whole text. The constants of `mix` and c_i are splitmix64's.
    """
    count = len(ids) - n + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    mixed = ids.astype(np.int64).astype(np.uint64)
    mixed = (mixed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(count, dtype=np.uint64)
    factor = 0xBF58476D1CE4E5B9
    for offset in range(n):
        total += mixed[offset : offset + count] * np.uint64(factor)
        factor = (factor * 0x94D049BB133111EB) % 2**64
    total *= np.uint64(0xD6E8FEB86659FD93)
    return total ^ (total >> np.uint64(32))


def occurrences(wanted: Hashes, chunks: Iterable[npt.NDArray[np.int32]], n: int) -> npt.NDArray[np.int64]:
    """(h,) How often an n-gram of the chunks of a text has each of the hashes `wanted` (h,), which may repeat."""
    unique, numbers = np.unique(wanted, return_inverse=True)
    counts = np.zeros(len(unique), dtype=np.int64)
    if len(unique):
        for chunk in chunks:
            found = hashes(chunk, n)
            index = np.minimum(np.searchsorted(unique, found), len(unique) - 1)
            counts += np.bincount(index[unique[index] == found], minlength=len(unique))
    return counts[numbers.reshape(-1)]


def joined(texts: Iterable[npt.NDArray[np.int32]], tokens: int = CHUNK_TOKENS) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of texts in arrays of about `tokens`, with the id -1, which no token has, after each text.

    So no n-gram across two texts matches.
    """
    separator = np.array([-1], dtype=np.int32)
    parts: list[npt.NDArray[np.int32]] = []
    size = 0
    for ids in texts:
        parts += [ids, separator]
        size += len(ids) + 1
        if size >= tokens:
            yield np.concatenate(parts)
            parts, size = [], 0
    if parts:
        yield np.concatenate(parts)


def chunks_of(rows: Iterable[Row]) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of the pieces of packed rows, as `joined`.

    A document that is split over several rows has a few n-grams fewer.
    """
    return joined(ids for row in rows for ids in pieces_of(row))


def pieces_of(row: Row) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of each piece of a row, with the label of its last input if it has one."""
    for number in range(len(row.documents)):
        inside = row.piece == number  # (T,)
        last = row.labels[inside][-1:]
        yield np.concatenate([row.ids[inside], last[last >= 0]])
