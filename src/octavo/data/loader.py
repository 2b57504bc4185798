"""Rows to batches in an order that only (seed, epoch) decides, from any position on.

Nothing is remembered between batches but the position, so a run that goes on from a checkpoint meets exactly
the batches that it would have met without the stop.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import DataError, UsageError


@dataclass(frozen=True)
class Position:
    """How far the data has been read."""

    epoch: int = 0
    index: int = 0  # batches already taken within the epoch


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T places; see Row for what the places hold. An epoch's last batch may have fewer rows."""

    ids: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64, already shifted; IGNORE_INDEX where nothing is learned
    positions: torch.Tensor  # (B, T) int64
    document: torch.Tensor  # (B, T) int64, -1 on padding
    sources: tuple[str, ...]  # "file:line" of each document within, once, in order
    trained_tokens: int  # labels that are learned; may be 0
    epoch: int
    index: int  # number of the batch within its epoch, from 0

    @property
    def following(self) -> Position:
        """The position to go on from once this batch has been used."""
        return Position(self.epoch, self.index + 1)


def order(n_rows: int, *, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The rows of an epoch: each of 0 .. n_rows - 1 once.

    Rows are sorted by a hash of (seed, epoch, row), so the order is the same with every version of Python,
    numpy and torch, and no generator of random numbers is read or moved.
    """
    if not shuffle:
        return list(range(n_rows))

    def place(row: int) -> bytes:
        return hashlib.blake2b(f"{seed} {epoch} {row}".encode(), digest_size=16).digest()

    return sorted(range(n_rows), key=place)


def batches_per_epoch(n_rows: int, batch_size: int) -> int:
    """The last batch is as large as what is left: no row is dropped or repeated."""
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
    """Batches from `start` on, for ever, or up to `epochs` epochs counted from the very first batch.

    A fraction of an epoch is rounded up to whole batches. Raises DataError without rows, and UsageError for a
    batch size under 1 or a start that these rows do not have, which other data or another batch size gave.
    """
    if not rows:
        raise DataError("there is nothing to train on: the data gave no rows.", hint="`octavo data` shows why.")
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} rows.", hint="--batch must be at least 1.")
    per_epoch = batches_per_epoch(len(rows), batch_size)
    start = start or Position()
    if start.epoch < 0 or not 0 <= start.index <= per_epoch:
        message = f"batch {start.index} of epoch {start.epoch} does not exist: an epoch has {per_epoch} batches."
        raise UsageError(message, hint="Resume with the data and the batch size that the run began with.")
    taken = start.epoch * per_epoch + start.index
    end = None if epochs is None else math.ceil(epochs * per_epoch)
    return _from(rows, taken, end, batch_size=batch_size, seed=seed, shuffle=shuffle)


def _from(
    rows: Sequence[Row], taken: int, end: int | None, *, batch_size: int, seed: int, shuffle: bool
) -> Iterator[Batch]:
    per_epoch = batches_per_epoch(len(rows), batch_size)
    while end is None or taken < end:
        epoch, first = divmod(taken, per_epoch)
        numbers = order(len(rows), seed=seed, epoch=epoch, shuffle=shuffle)
        last = per_epoch if end is None else min(per_epoch, end - epoch * per_epoch)
        for index in range(first, last):
            chosen = [rows[number] for number in numbers[index * batch_size : (index + 1) * batch_size]]
            yield _batch(chosen, epoch=epoch, index=index)
            taken += 1


def _batch(rows: Sequence[Row], *, epoch: int, index: int) -> Batch:
    ids, labels, positions, document = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(np.int64))
        for name in ("ids", "labels", "positions", "document")
    )
    return Batch(
        ids,
        labels,
        positions,
        document,
        sources=tuple(dict.fromkeys(source for row in rows for source in row.sources)),
        trained_tokens=int((labels != IGNORE_INDEX).sum()),
        epoch=epoch,
        index=index,
    )
