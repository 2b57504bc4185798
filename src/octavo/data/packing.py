"""Documents of any length to rows of one length, and a ledger that says where every token went.

A row holds pieces of several documents. `document` numbers them and `positions` restart with each, so that
attention can stay within a piece. T is the row's length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.data.documents import Skipped
from octavo.data.ledger import FileLedger, Ledger, total
from octavo.data.tokens import Tokens
from octavo.errors import UsageError

IGNORE_INDEX = -100  # the label of a place that is not learned: the default of torch's cross_entropy


@dataclass(frozen=True, eq=False)
class Row:
    """T places of input, each with its target. The arrays are views into one table of all rows."""

    ids: npt.NDArray[np.int32]  # (T,) input
    labels: npt.NDArray[np.int32]  # (T,) already shifted: the token that follows ids[t], or IGNORE_INDEX
    positions: npt.NDArray[np.int32]  # (T,) place within the piece; 0 on padding
    document: npt.NDArray[np.int32]  # (T,) number of the piece within the row; -1 on padding
    sources: tuple[str, ...]  # "file:line" of each document within, once, in order


@dataclass(frozen=True)
class _Piece:
    """Inputs ids[start : start + length] of a document, with the targets one further."""

    tokens: int  # index of the document
    start: int
    length: int


def pack(
    tokens: Sequence[Tokens],
    *,
    seq_len: int,
    pad_id: int,
    truncate: bool = False,
    deduplicate: bool = False,
    min_unique_tokens: int = 0,
    skipped: Sequence[Skipped] = (),
    excluded: Collection[int] = (),
) -> tuple[list[Row], Ledger]:
    """Rows of `seq_len` places, and the ledger.

    A document of n tokens takes n - 1 places, since its first token is never a target and its last never an
    input. A longer one than a row is split so that the last target of a piece is the first input of the
    next, and every token but the first is a target exactly once; with `truncate` its rest is cut instead.
    Pieces are put, the longest first, into the fullest row that still has room (best-fit decreasing). Rows
    come in the order of their first documents, and the same input gives the same rows.

    Cut whole are documents of fewer than two tokens, those whose numbers are `excluded`, and on request copies of
    earlier documents and documents of fewer than `min_unique_tokens` different tokens. `pad_id` may be any token.
    """
    if seq_len < 1:
        raise UsageError(f"rows of {seq_len} tokens.", hint="--seq-len must be at least 1; 512 is usual.")
    kept = [len(one.ids) >= 2 and _enough(one.ids, min_unique_tokens) for one in tokens]
    for index in excluded:
        kept[index] = False
    if deduplicate:
        _drop_copies(tokens, kept)
    pieces = [
        piece
        for index, one in enumerate(tokens)
        if kept[index]
        for piece in _pieces(index, len(one.ids) - 1, seq_len, truncate=truncate)
    ]
    groups = _best_fit(pieces, seq_len)
    ledger = _ledger(tokens, groups, seq_len=seq_len, skipped=skipped)
    ledger.check()
    return _fill(groups, tokens, seq_len=seq_len, pad_id=pad_id), ledger


def _enough(ids: npt.NDArray[np.int32], min_unique_tokens: int) -> bool:
    return min_unique_tokens <= 1 or len(np.unique(ids)) >= min_unique_tokens


def _drop_copies(tokens: Sequence[Tokens], kept: list[bool]) -> None:
    seen: set[bytes] = set()
    for index, one in enumerate(tokens):
        content = one.ids.tobytes() + one.trained.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        kept[index] = kept[index] and digest not in seen
        seen.add(digest)


def _pieces(index: int, places: int, seq_len: int, *, truncate: bool) -> list[_Piece]:
    starts = range(0, seq_len if truncate else places, seq_len)
    return [_Piece(index, start, min(seq_len, places - start)) for start in starts]


def _best_fit(pieces: Sequence[_Piece], seq_len: int) -> list[list[_Piece]]:
    """Groups of pieces that share a row of `seq_len` places, in the order of their first pieces."""
    groups: list[list[int]] = []
    # Rows by their free places, and those free places as the bits of one number: shifting it by a piece's
    # length leaves the rows with room, and its lowest bit is the fullest of them.
    rows_by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    for number in sorted(range(len(pieces)), key=lambda number: (-pieces[number].length, number)):
        length = pieces[number].length
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
            groups[row].append(number)
        else:
            room, row = seq_len, len(groups)
            groups.append([number])
        left = room - length
        if left:
            rows_by_room[left].append(row)
            rooms |= 1 << left
    return [[pieces[number] for number in group] for group in sorted(map(sorted, groups))]


def _fill(groups: Sequence[Sequence[_Piece]], tokens: Sequence[Tokens], *, seq_len: int, pad_id: int) -> list[Row]:
    shape = (len(groups), seq_len)
    ids = np.full(shape, pad_id, dtype=np.int32)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int32)
    positions = np.zeros(shape, dtype=np.int32)
    document = np.full(shape, -1, dtype=np.int32)
    counting = np.arange(seq_len, dtype=np.int32)
    rows: list[Row] = []
    for row, group in enumerate(groups):
        at = 0
        for number, piece in enumerate(group):
            one = tokens[piece.tokens]
            here = slice(at, at + piece.length)
            inputs = slice(piece.start, piece.start + piece.length)
            targets = slice(inputs.start + 1, inputs.stop + 1)
            ids[row, here] = one.ids[inputs]
            labels[row, here] = np.where(one.trained[targets], one.ids[targets], IGNORE_INDEX)
            positions[row, here] = counting[: piece.length]
            document[row, here] = number
            at += piece.length
        names = (f"{tokens[piece.tokens].source}:{tokens[piece.tokens].line}" for piece in group)
        sources = tuple(dict.fromkeys(names))
        rows.append(Row(ids[row], labels[row], positions[row], document[row], sources))
    return rows


def _ledger(
    tokens: Sequence[Tokens], groups: Sequence[Sequence[_Piece]], *, seq_len: int, skipped: Sequence[Skipped]
) -> Ledger:
    """Counted from the pieces that lie in rows, not from what was meant to be kept."""
    targets = [0] * len(tokens)
    trained = [0] * len(tokens)
    files = {one.source: FileLedger(one.source) for one in tokens}
    for bad in skipped:
        files.setdefault(bad.source, FileLedger(bad.source))
    for group in groups:
        for piece in group:
            targets[piece.tokens] += piece.length
            learned = tokens[piece.tokens].trained[piece.start + 1 : piece.start + piece.length + 1]
            trained[piece.tokens] += int(np.count_nonzero(learned))
        last = tokens[group[-1].tokens].source
        files[last] = files[last].plus(padding=seq_len - sum(piece.length for piece in group))
    for index, one in enumerate(tokens):
        # The first token of a document that is in a row is an input there, and predicted by nothing.
        first = 1 if targets[index] else 0
        files[one.source] = files[one.source].plus(
            tokens=len(one.ids) + one.behind,
            learned=trained[index],
            read_only=targets[index] - trained[index] + first,
            left_out=len(one.ids) - targets[index] - first + one.behind,
            documents=1,
            dropped=1 - first,
        )
    for bad in skipped:
        files[bad.source] = files[bad.source].plus(skipped=1)
    return total(files.values(), rows=len(groups))
