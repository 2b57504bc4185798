"""Packed rows to batches. The order depends on (seed, epoch) only, and reading can start at any position.

The only state is the position. A run that resumes from a checkpoint reads exactly the batches that it would have read
without the interruption.

Legend: B rows of a batch, T row length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import DataError, UsageError


@dataclass(frozen=True)
class Position:
    """How far the data has been read."""

    epoch: int = 0
    index: int = 0  # batches already read within the epoch


@dataclass(frozen=True, eq=False)
class Batch:
    """B packed rows of length T; see Row for their content. The last batch of an epoch may have fewer rows."""

    ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, already shifted; IGNORE_INDEX where the next token is not trained
    positions: torch.Tensor  # (B, T) int64
    piece: torch.Tensor  # (B, T) int64, number of the piece within the row; -1 on padding
    row_sources: tuple[tuple[str, ...], ...]  # "file:line" of each document in each row
    epoch: int
    index: int  # number of the batch within its epoch, from 0
    # (B, T) float32, of each label's loss; None: 1. No command sets it yet: it is for callers of `train` in Python.
    weights: torch.Tensor | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """ "file:line" of each document in the batch, once, in order."""
        return tuple(dict.fromkeys(source for row in self.row_sources for source in row))

    @cached_property
    def trained_tokens(self) -> int:
        """The number of labels other than IGNORE_INDEX; may be 0."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def label_weight(self) -> float:
        """The sum of the weights of all labels; without weights the number of labels."""
        if self.weights is None:
            return self.trained_tokens
        return float(self.weights[self.labels != IGNORE_INDEX].sum())

    @property
    def following(self) -> Position:
        """The position after this batch: a checkpoint after its optimizer step saves it."""
        return Position(self.epoch, self.index + 1)


def order(n_rows: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The row indices of an epoch in order: each of 0 .. n_rows - 1 once.

    Rows are sorted by a hash of (seed, epoch, row). So the order is the same with every version of Python, numpy and
    torch, and no random number generator is used.
    """
    if not shuffle:
        return list(range(n_rows))

    def sort_key(row: int) -> bytes:
        return hashlib.blake2b(f"{seed} {epoch} {row}".encode(), digest_size=16).digest()

    return sorted(range(n_rows), key=sort_key)


def batches_per_epoch(n_rows: int, batch_size: int) -> int:
    """Batches of an epoch. The last one may be smaller: no row is dropped or repeated."""
    return math.ceil(n_rows / batch_size)


def batches(
    rows: Sequence[Row],
    *,
    batch_size: int,
    seed: int,
    start: Position | None = None,
    epochs: float | None = None,
    shuffle: bool = True,
) -> Iterator[Batch]:
    """Batches from position `start` on: endlessly, or until `epochs` epochs are complete.

    Epochs are counted from batch 0 of epoch 0, also with a later `start`. A fraction of an epoch is rounded up to whole
    batches. Raises DataError if there are no rows, and UsageError for a batch size below 1 and for a `start` beyond the
    end of an epoch: it is of a run with other data or another batch size.
    """
    if not rows:
        raise DataError("there is nothing to train on: the data gave no rows.", hint="`octavo data` shows why.")
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} rows.", hint="--batch-size must be at least 1.")
    per_epoch = batches_per_epoch(len(rows), batch_size)
    start = start or Position()
    # `index` may equal `per_epoch`: a checkpoint after the last batch of an epoch has that position (`following`).
    if start.epoch < 0 or not 0 <= start.index <= per_epoch:
        message = f"batch {start.index} of epoch {start.epoch} does not exist: an epoch has {per_epoch} batches."
        raise UsageError(message, hint="Resume with the data and the batch size that the run began with.")
    n_read = start.epoch * per_epoch + start.index
    n_total = None if epochs is None else math.ceil(epochs * per_epoch)
    return _batches_between(rows, n_read, n_total, batch_size=batch_size, seed=seed, shuffle=shuffle)


def _batches_between(
    rows: Sequence[Row], n_read: int, n_total: int | None, *, batch_size: int, seed: int, shuffle: bool
) -> Iterator[Batch]:
    """Batches number n_read .. n_total - 1, counted over all epochs.

    A generator of its own: `batches` checks its arguments when it is called, not when the first batch is read.
    """
    per_epoch = batches_per_epoch(len(rows), batch_size)
    while n_total is None or n_read < n_total:
        epoch, first = divmod(n_read, per_epoch)
        row_indices = order(len(rows), seed=seed, epoch=epoch, shuffle=shuffle)
        stop = per_epoch if n_total is None else min(per_epoch, n_total - epoch * per_epoch)
        for index in range(first, stop):
            chosen = [rows[row] for row in row_indices[index * batch_size : (index + 1) * batch_size]]
            yield _batch(chosen, epoch=epoch, index=index)
            n_read += 1


def _batch(rows: Sequence[Row], *, epoch: int, index: int) -> Batch:
    ids, labels, positions, piece = (  # (B, T) each
        torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(np.int64))
        for name in ("ids", "labels", "positions", "piece")
    )
    return Batch(
        ids,
        labels,
        positions,
        piece,
        row_sources=tuple(row.sources for row in rows),
        epoch=epoch,
        index=index,
    )
