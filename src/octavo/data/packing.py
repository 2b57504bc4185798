"""Packs documents of any length into rows of one length, and accounts for every token in a ledger.

A row consists of pieces. A piece is a whole document, or a part of a document that is longer than a row. `document`
numbers the pieces of a row and `positions` restart with each piece, so that attention can be limited to the piece.

Legend: R packed rows, T row length (seq_len), n tokens of one document.
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

IGNORE_INDEX = -100  # the label of a token without a loss: the default of torch's cross_entropy


@dataclass(frozen=True, eq=False)
class Row:
    """T input tokens with their targets. The arrays are views into one array (R, T) of all rows."""

    ids: npt.NDArray[np.int32]  # (T,) input
    labels: npt.NDArray[np.int32]  # (T,) already shifted: the token that follows ids[t], or IGNORE_INDEX
    positions: npt.NDArray[np.int32]  # (T,) position within the piece; 0 on padding
    document: npt.NDArray[np.int32]  # (T,) number of the piece within the row; -1 on padding
    sources: tuple[str, ...]  # "file:line" of each document in the row, once, in order


@dataclass(frozen=True)
class _Piece:
    """Inputs ids[start : start + length] of a document. The targets are one token further."""

    document: int  # index of the document in the sequence that is packed
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
    """(packed rows of length `seq_len`, the ledger).

    A document of n tokens takes n - 1 inputs: its first token is never a target, its last never an input. A document
    longer than a row is split so that the last target of a piece is the first input of the next piece, and every token
    but the first is a target exactly once. With `truncate` the rest is dropped instead. Pieces go, the longest first,
    into the fullest row with enough space (best-fit decreasing). Rows are ordered by their first documents, and the
    same input gives the same rows.

    Dropped whole are documents of fewer than two tokens, those with an index in `excluded`, with `deduplicate` copies
    of earlier documents, and documents of fewer than `min_unique_tokens` distinct tokens.

    Padding has the id `pad_id`, the label IGNORE_INDEX and the document -1. Attention and loss ignore it, so `pad_id`
    may be any token.
    """
    if seq_len < 1:
        raise UsageError(f"rows of {seq_len} tokens.", hint="--seq-len must be at least 1; 512 is usual.")
    kept = [len(document.ids) >= 2 and _enough(document.ids, min_unique_tokens) for document in tokens]
    for index in excluded:
        kept[index] = False
    if deduplicate:
        _drop_copies(tokens, kept)
    pieces = [
        piece
        for index, document in enumerate(tokens)
        if kept[index]
        for piece in _pieces(index, len(document.ids) - 1, seq_len, truncate=truncate)
    ]
    groups = _best_fit(pieces, seq_len)
    ledger = _ledger(tokens, groups, seq_len=seq_len, skipped=skipped)
    ledger.check()
    return _fill(groups, tokens, seq_len=seq_len, pad_id=pad_id), ledger


def _enough(ids: npt.NDArray[np.int32], min_unique_tokens: int) -> bool:
    return min_unique_tokens <= 1 or len(np.unique(ids)) >= min_unique_tokens


def _drop_copies(tokens: Sequence[Tokens], kept: list[bool]) -> None:
    seen: set[bytes] = set()
    for index, document in enumerate(tokens):
        content = document.ids.tobytes() + document.trained.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        kept[index] = kept[index] and digest not in seen
        seen.add(digest)


def _pieces(index: int, n_inputs: int, seq_len: int, *, truncate: bool) -> list[_Piece]:
    starts = range(0, seq_len if truncate else n_inputs, seq_len)
    return [_Piece(index, start, min(seq_len, n_inputs - start)) for start in starts]


def _best_fit(pieces: Sequence[_Piece], seq_len: int) -> list[list[_Piece]]:
    """The pieces of each row of length `seq_len` by best-fit decreasing; rows are in the order of their first pieces.

    A search through all rows would make packing quadratic. Here one integer has a bit for each amount of free space, so
    the search is a shift and the lowest set bit.
    """
    groups: list[list[int]] = []
    # rows_by_space[s] are the rows with s free tokens, and bit s of the integer `spaces` is set if there are any.
    # Shifted right by a piece's length, `spaces` has only the bits of enough space; the lowest is the best fit.
    rows_by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0
    for number in sorted(range(len(pieces)), key=lambda number: (-pieces[number].length, number)):
        length = pieces[number].length
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
            groups[row].append(number)
        else:
            space, row = seq_len, len(groups)
            groups.append([number])
        free = space - length
        if free:
            rows_by_space[free].append(row)
            spaces |= 1 << free
    return [[pieces[number] for number in group] for group in sorted(map(sorted, groups))]


def _fill(groups: Sequence[Sequence[_Piece]], tokens: Sequence[Tokens], *, seq_len: int, pad_id: int) -> list[Row]:
    shape = (len(groups), seq_len)
    ids = np.full(shape, pad_id, dtype=np.int32)  # (R, T)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int32)  # (R, T)
    positions = np.zeros(shape, dtype=np.int32)  # (R, T)
    document = np.full(shape, -1, dtype=np.int32)  # (R, T)
    arange = np.arange(seq_len, dtype=np.int32)  # (T,)
    rows: list[Row] = []
    for row, group in enumerate(groups):
        at = 0  # the next free position of the row
        for number, piece in enumerate(group):
            source = tokens[piece.document]
            span = slice(at, at + piece.length)
            inputs = slice(piece.start, piece.start + piece.length)
            targets = slice(inputs.start + 1, inputs.stop + 1)
            ids[row, span] = source.ids[inputs]
            labels[row, span] = np.where(source.trained[targets], source.ids[targets], IGNORE_INDEX)
            positions[row, span] = arange[: piece.length]
            document[row, span] = number
            at += piece.length
        names = (f"{tokens[piece.document].source}:{tokens[piece.document].line}" for piece in group)
        sources = tuple(dict.fromkeys(names))
        rows.append(Row(ids[row], labels[row], positions[row], document[row], sources))
    return rows


def _ledger(
    tokens: Sequence[Tokens], groups: Sequence[Sequence[_Piece]], *, seq_len: int, skipped: Sequence[Skipped]
) -> Ledger:
    """The ledger of the rows, counted from the pieces that are in them: a mistake of packing would show in it."""
    targets = [0] * len(tokens)
    trained = [0] * len(tokens)
    files = {document.source: FileLedger(document.source) for document in tokens}
    for bad in skipped:
        files.setdefault(bad.source, FileLedger(bad.source))
    for group in groups:
        for piece in group:
            targets[piece.document] += piece.length
            mask = tokens[piece.document].trained[piece.start + 1 : piece.start + piece.length + 1]
            trained[piece.document] += int(np.count_nonzero(mask))
        last = tokens[group[-1].document].source
        files[last] = files[last].plus(padding=seq_len - sum(piece.length for piece in group))
    for index, document in enumerate(tokens):
        # A document that is in the rows has one token more than targets: its first token is an input only.
        input_only = 1 if targets[index] else 0
        files[document.source] = files[document.source].plus(
            tokens=len(document.ids) + document.n_after,
            trained=trained[index],
            masked=targets[index] - trained[index] + input_only,
            left_out=len(document.ids) - targets[index] - input_only + document.n_after,
            documents=1,
            dropped=1 - input_only,
        )
    for bad in skipped:
        files[bad.source] = files[bad.source].plus(skipped=1)
    return total(files.values(), rows=len(groups))
