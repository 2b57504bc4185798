"""Packs documents of any length into rows of one length, and accounts for every token in a ledger.

A row consists of pieces. A piece is a whole document, or a part of a document that is longer than a row. `piece`
numbers the pieces of a row and `positions` restart with each piece, so that attention can be limited to the piece.

Every token but the first of a document is the next token of another one, which predicts it. Of these next tokens the
trained ones have a loss; the others, such as those of a prompt, have none.

A model that was trained with a BOS token before every text predicts badly without it: on one text Gemma has a loss of
5.44 in place of 4.11. So each part of a document that begins with the BOS token begins with it too. A repeated BOS
token has no label: the token after it is already the label of the last input of the preceding part.

Legend: R packed rows, T row length (seq_len), n tokens of one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.bytes import token_bytes
from octavo.data.documents import Skipped
from octavo.data.ledger import FileLedger, Ledger, total
from octavo.data.tokens import Tokens
from octavo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE_INDEX = -100  # the label of a token without a loss: the default of torch's cross_entropy


@dataclass(frozen=True, eq=False)
class Row:
    """T input tokens with the next token of each. The arrays are views into one array (R, T) of all rows."""

    ids: npt.NDArray[np.int32]  # (T,) input
    labels: npt.NDArray[np.int32]  # (T,) already shifted: the token that follows ids[t]; IGNORE_INDEX if not trained
    positions: npt.NDArray[np.int32]  # (T,) position within the piece; 0 on padding
    piece: npt.NDArray[np.int32]  # (T,) number of the piece within the row; -1 on padding
    sources: tuple[str, ...]  # "file:line" or "file: page 3" of each piece in the row, once, in order
    documents: tuple[int, ...]  # of each piece, its document's index in the sequence that was packed
    files: tuple[str, ...] = ()  # of each piece, its document's file
    passages: bool = False  # whether the documents are passages: parts of few documents, for octavo.intervals


@dataclass(frozen=True)
class _Piece:
    """Inputs ids[start : start + length] of a document. The next tokens are one further."""

    index: int  # of its document in the sequence that is packed
    start: int
    length: int
    repeated_bos: int  # BOS tokens before the inputs: 0 at the beginning of a document, which has its own

    @property
    def size(self) -> int:
        """Positions that it takes in a row."""
        return self.repeated_bos + self.length


def pack(
    tokens: Sequence[Tokens],
    *,
    seq_len: int,
    pad_id: int,
    bos_ids: Sequence[int] = (),
    truncate: bool = False,
    deduplicate: bool = False,
    min_unique_tokens: int = 0,
    skipped: Sequence[Skipped] = (),
    excluded: Collection[int] = (),
) -> tuple[list[Row], Ledger]:
    """(packed rows of length `seq_len`, the ledger).

    A document of n tokens takes n - 1 inputs: its first token is no next token, its last no input. A document
    longer than a row is split so that the last next token of a piece is the first input of the following piece, and
    every token but the first is a next token exactly once. If the document begins with `bos_ids`, the following pieces
    do too, and have as many inputs fewer. With `truncate` the rest is dropped instead. Pieces go, the longest first,
    into the fullest row with enough space (best-fit decreasing). Rows are ordered by their first documents, and the
    same input gives the same rows.

    Dropped whole are documents of fewer than two tokens, those with an index in `excluded`, with `deduplicate` copies
    of earlier documents, and documents of fewer than `min_unique_tokens` distinct tokens.

    Padding has the id `pad_id`, the label IGNORE_INDEX and the piece -1. Attention and loss ignore it, so `pad_id`
    may be any token.
    """
    if seq_len < 1:
        raise UsageError(f"rows of {seq_len} tokens.", hint="--seq-len must be at least 1; 512 is usual.")
    kept, copies = _kept(tokens, min_unique_tokens=min_unique_tokens, deduplicate=deduplicate, excluded=excluded)
    begin = np.array(bos_ids, dtype=np.int32)
    pieces = [
        piece
        for index, document in enumerate(tokens)
        if kept[index]
        for piece in _pieces(index, document.ids, seq_len, begin=begin, truncate=truncate)
    ]
    rows = _best_fit(pieces, seq_len)
    ledger = _ledger(tokens, rows, copies, seq_len=seq_len, skipped=skipped)
    ledger.check(seq_len=seq_len)
    return _fill(rows, tokens, seq_len=seq_len, pad_id=pad_id, begin=begin), ledger


def pack_windows(
    tokens: Sequence[Tokens],
    *,
    window: int,
    stride: int,
    pad_id: int,
    bos_ids: Sequence[int] = (),
    deduplicate: bool = False,
    min_unique_tokens: int = 0,
) -> list[Row]:
    """Rows of length `window` for evaluation: overlapping windows of each document, every `stride` tokens.

    The labels of a window are the next tokens that no earlier window has. So each token is predicted once, from at
    least window - stride tokens before it, or from all if there are fewer, and its loss does not depend on any row
    length. As in `pack`, windows after the first repeat the BOS token, and windows of short documents share a row.
    UsageError unless the stride is at most the window without the BOS token.
    """
    begin = np.array(bos_ids, dtype=np.int32)
    if not 1 <= stride <= window - len(begin):
        raise UsageError(
            f"a sliding window of {window:,} tokens with a stride of {stride:,}.",
            hint=f"--stride must be at least 1 and at most {window - len(begin):,}; half of --window is usual.",
        )
    kept, _ = _kept(tokens, min_unique_tokens=min_unique_tokens, deduplicate=deduplicate)
    pieces, seen = [], {}  # seen: (document, start of a window) -> its inputs that an earlier window has
    for index, document in enumerate(tokens):
        if kept[index]:
            stop = 0  # of the inputs of the windows so far
            for piece in _windows(index, document.ids, window, stride, begin=begin):
                pieces.append(piece)
                seen[index, piece.start] = stop - piece.start if stop else 0
                stop = piece.start + piece.length
    rows = _best_fit(pieces, window)
    filled = _fill(rows, tokens, seq_len=window, pad_id=pad_id, begin=begin)
    for row, pieces_of_row in zip(filled, rows, strict=True):
        at = 0
        for piece in pieces_of_row:
            row.labels[at : at + piece.repeated_bos + seen[piece.index, piece.start]] = IGNORE_INDEX
            at += piece.size
    return filled


def trained_bytes(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> int:
    """UTF-8 bytes of the text of all trained tokens of `rows`: labels other than IGNORE_INDEX."""
    lengths = token_bytes(tokenizer)
    return int(sum(lengths[row.labels[row.labels != IGNORE_INDEX]].sum() for row in rows))


def most_documents(rows: Sequence[Row]) -> int:
    """The most documents of a row, its padding counted as one. 1 if no row has several, whether padded or not."""
    changes = [np.diff(row.piece) for row in rows]  # (T - 1,) each; positive where a document follows another one
    if not any((change > 0).any() for change in changes):
        return 1
    return 1 + max(int(np.count_nonzero(change)) for change in changes)


def _kept(
    tokens: Sequence[Tokens], *, min_unique_tokens: int, deduplicate: bool, excluded: Collection[int] = ()
) -> tuple[list[bool], list[int]]:
    """(of each document whether it is packed, the indices of those that are copies of earlier ones)."""
    kept = [len(document.ids) >= 2 and _enough(document.ids, min_unique_tokens) for document in tokens]
    for index in excluded:
        kept[index] = False
    copies = _copies(tokens, kept)
    if deduplicate:
        for index in copies:
            kept[index] = False
    return kept, copies


def _windows(
    index: int, ids: npt.NDArray[np.int32], window: int, stride: int, *, begin: npt.NDArray[np.int32]
) -> list[_Piece]:
    """The windows of a document, the last of which ends with it."""
    n_inputs = len(ids) - 1
    windows = [_Piece(index, 0, min(window, n_inputs), 0)]
    repeated = len(begin) if np.array_equal(ids[: len(begin)], begin) else 0
    while (stop := windows[-1].start + windows[-1].length) < n_inputs:
        # The first new input is `stop`: window - repeated - stride inputs before it are read again.
        start = stop - (window - repeated - stride)
        windows.append(_Piece(index, start, min(window - repeated, n_inputs - start), repeated))
    return windows


def _enough(ids: npt.NDArray[np.int32], min_unique_tokens: int) -> bool:
    return min_unique_tokens <= 1 or len(np.unique(ids)) >= min_unique_tokens


def _copies(tokens: Sequence[Tokens], kept: Sequence[bool]) -> list[int]:
    """The indices of the `kept` documents with the tokens of an earlier one, of which the same are trained."""
    seen: set[bytes] = set()
    copies = []
    for index, document in enumerate(tokens):
        content = document.ids.tobytes() + document.trained.tobytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if kept[index] and digest in seen:
            copies.append(index)
        seen.add(digest)
    return copies


def _pieces(
    index: int, ids: npt.NDArray[np.int32], seq_len: int, *, begin: npt.NDArray[np.int32], truncate: bool
) -> list[_Piece]:
    """The pieces of a document: all of it, or with `truncate` the first piece alone. `begin` are the BOS ids."""
    n_inputs = len(ids) - 1
    first = _Piece(index, 0, min(seq_len, n_inputs), 0)
    if truncate or n_inputs <= seq_len:
        return [first]
    repeated = len(begin) if np.array_equal(ids[: len(begin)], begin) else 0
    space = seq_len - repeated
    if space < 1:
        raise UsageError(
            f"rows of {seq_len} token{'s' * (seq_len > 1)} cannot continue a document: each of them begins with the "
            "BOS token of this model.",
            hint=f"--seq-len must be at least {repeated + 1}; 512 is usual.",
        )
    starts = range(seq_len, n_inputs, space)
    return [first, *(_Piece(index, start, min(space, n_inputs - start), repeated) for start in starts)]


def _best_fit(pieces: Sequence[_Piece], seq_len: int) -> list[list[_Piece]]:
    """The pieces of each row of length `seq_len` by best-fit decreasing; rows are in the order of their first pieces.

    A search through all rows would make packing quadratic. Here one integer has a bit for each amount of free space, so
    the search is a shift and the lowest set bit.
    """
    rows: list[list[int]] = []  # indices into `pieces`
    # rows_by_space[s] are the indices of the rows with s free tokens, and bit s of the integer `spaces` is set if there
    # are any. Shifted right by a piece's size, it has only the bits of enough space: the lowest is the best fit.
    rows_by_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0
    for number in sorted(range(len(pieces)), key=lambda number: (-pieces[number].size, number)):
        size = pieces[number].size
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            index = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
            rows[index].append(number)
        else:
            space, index = seq_len, len(rows)
            rows.append([number])
        free = space - size
        if free:
            rows_by_space[free].append(index)
            spaces |= 1 << free
    return [[pieces[number] for number in row] for row in sorted(map(sorted, rows))]


def _fill(
    rows: Sequence[Sequence[_Piece]],
    tokens: Sequence[Tokens],
    *,
    seq_len: int,
    pad_id: int,
    begin: npt.NDArray[np.int32],
) -> list[Row]:
    """The arrays of all rows from the pieces of each."""
    shape = (len(rows), seq_len)
    ids = np.full(shape, pad_id, dtype=np.int32)  # (R, T)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int32)  # (R, T)
    positions = np.zeros(shape, dtype=np.int32)  # (R, T)
    numbers = np.full(shape, -1, dtype=np.int32)  # (R, T)
    arange = np.arange(seq_len, dtype=np.int32)  # (T,)
    filled: list[Row] = []
    for row, pieces in enumerate(rows):
        at = 0  # the next free position of the row
        for number, piece in enumerate(pieces):
            document = tokens[piece.index]
            whole, span = slice(at, at + piece.size), slice(at + piece.repeated_bos, at + piece.size)
            inputs = slice(piece.start, piece.start + piece.length)
            following = slice(inputs.start + 1, inputs.stop + 1)  # the next tokens
            ids[row, at : span.start] = begin[: piece.repeated_bos]
            ids[row, span] = document.ids[inputs]
            labels[row, span] = np.where(document.trained[following], document.ids[following], IGNORE_INDEX)
            positions[row, whole] = arange[: piece.size]
            numbers[row, whole] = number
            at += piece.size
        places = (tokens[piece.index].where(piece.start) for piece in pieces)
        sources = tuple(dict.fromkeys(places))
        documents = tuple(piece.index for piece in pieces)
        files = tuple(tokens[piece.index].source for piece in pieces)
        passages = any(tokens[piece.index].is_passage for piece in pieces)
        filled.append(Row(ids[row], labels[row], positions[row], numbers[row], sources, documents, files, passages))
    return filled


def _ledger(
    tokens: Sequence[Tokens],
    rows: Sequence[Sequence[_Piece]],
    copies: Sequence[int],
    *,
    seq_len: int,
    skipped: Sequence[Skipped],
) -> Ledger:
    """The ledger of the rows, counted from the pieces that are in them: a mistake of packing would show in it."""
    next_tokens = [0] * len(tokens)
    trained = [0] * len(tokens)
    files = {document.source: FileLedger(document.source) for document in tokens}
    for bad in skipped:
        files.setdefault(bad.source, FileLedger(bad.source))
    for pieces in rows:
        for piece in pieces:
            next_tokens[piece.index] += piece.length
            mask = tokens[piece.index].trained[piece.start + 1 : piece.start + piece.length + 1]
            trained[piece.index] += int(np.count_nonzero(mask))
            if piece.repeated_bos:
                source = tokens[piece.index].source
                files[source] = files[source].plus(repeated_bos=piece.repeated_bos)
        last = tokens[pieces[-1].index].source
        files[last] = files[last].plus(padding=seq_len - sum(piece.size for piece in pieces))
    for index, document in enumerate(tokens):
        # A document that is in the rows has one token more than next tokens: its first token is an input only.
        input_only = 1 if next_tokens[index] else 0
        files[document.source] = files[document.source].plus(
            tokens=len(document.ids) + document.n_after,
            trained=trained[index],
            masked=next_tokens[index] - trained[index] + input_only,
            left_out=len(document.ids) - next_tokens[index] - input_only + document.n_after,
            documents=1,
            dropped=1 - input_only,
        )
    for index in copies:
        source = tokens[index].source
        files[source] = files[source].plus(copies=1)
    for bad in skipped:
        files[bad.source] = files[bad.source].plus(skipped=1)
    return total(files.values(), rows=len(rows))
