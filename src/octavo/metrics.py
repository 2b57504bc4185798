"""How well a model predicts a text: perplexity, and bits per byte, which can be compared between tokenizers.

The losses of all tokens are summed and divided once: a mean over the means of rows would overweight tokens of rows with
few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.data.loader import batches
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.intervals import Units, units_of
from octavo.layers.context import ForwardOptions
from octavo.models import Decoder
from octavo.objective import token_losses


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of a text under a model."""

    nats: float  # -log p(text), the sum over its tokens
    tokens: int  # predicted tokens
    n_bytes: int  # UTF-8 bytes of their text
    units: Units | None = field(default=None, compare=False)  # the losses by document, for intervals
    files: dict[str, Units] = field(default_factory=dict, compare=False)  # of each file, if there are several

    @property
    def loss(self) -> float:
        """Nats per token; NaN for a text without tokens."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf  # log of the largest float64: 709.8

    @property
    def bits_per_byte(self) -> float:
        """NaN for a text without bytes."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def score(
    model: Decoder,
    rows: Sequence[Row],
    *,
    n_bytes: int,
    batch_size: int,
    tiled_head: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """The score of all labelled tokens of `rows`, in eval mode. `progress(n)` is called after each batch of n rows.

    `tiled_head` is that of the memory plan (layers.context.ForwardOptions).
    """
    each = label_losses(model, rows, batch_size=batch_size, tiled_head=tiled_head, progress=progress)  # (N,)
    units, files = _units(rows, each)
    return Score(float(each.sum()), len(each), n_bytes, units, files)


def label_losses(
    model: Decoder,
    rows: Sequence[Row],
    *,
    batch_size: int,
    tiled_head: bool = False,
    progress: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """(N,) -log p of each label of `rows` in nats, in their order, in eval mode. Options as in `score`."""
    options = ForwardOptions(tiled_head=tiled_head)
    was_training = model.training
    model.eval()
    losses: list[npt.NDArray[np.float64]] = []  # of each batch
    for batch in batches(rows, batch_size=batch_size, seed=0, epochs=1, shuffle=False):
        losses.append(token_losses(model, batch, options).double().cpu().numpy())
        if progress:
            progress(len(batch.ids))
    model.train(was_training)
    return np.concatenate(losses)


def document_losses(rows: Sequence[Row], losses: npt.NDArray[np.float64], documents: int) -> npt.NDArray[np.float64]:
    """(documents,) The sum of the losses (N,) of `label_losses` over the labels of each document."""
    of_label = [
        np.array(row.documents, dtype=np.int64)[row.piece[row.labels != IGNORE_INDEX]] for row in rows
    ]  # (labels of the row,) each
    return np.bincount(np.concatenate(of_label), weights=losses, minlength=documents).astype(np.float64)


def _units(rows: Sequence[Row], losses: npt.NDArray[np.float64]) -> tuple[Units, dict[str, Units]]:
    """The losses (N,) of all labels of the rows by document, or by row; and the same of each of several files."""
    nats: list[npt.NDArray[np.float64]] = []  # of each row: the sums over its pieces
    tokens: list[npt.NDArray[np.int64]] = []
    start = 0
    for row in rows:
        pieces = row.piece[row.labels != IGNORE_INDEX]  # (labels of the row,)
        stop = start + len(pieces)
        sums = np.bincount(pieces, weights=losses[start:stop], minlength=len(row.documents))
        nats.append(sums.astype(np.float64))
        tokens.append(np.bincount(pieces, minlength=len(row.documents)).astype(np.int64))
        start = stop
    documents = np.concatenate([np.array(row.documents, dtype=np.int64) for row in rows])
    numbers = np.repeat(np.arange(len(rows)), [len(row.documents) for row in rows])
    parts = np.concatenate(nats), np.concatenate(tokens), documents, numbers  # (P,) each
    names = np.array([name for row in rows for name in row.files], dtype=object)  # (P,), or () in rows without files
    passages = any(row.passages for row in rows)
    files = _units_of_files(names, parts, passages=passages) if len(names) == len(documents) else {}
    return units_of(*parts, passages=passages), files


def _units_of_files(
    names: npt.NDArray[np.object_], parts: Sequence[npt.NDArray[Any]], *, passages: bool
) -> dict[str, Units]:
    """The units of each file from its name for each part; {} if there is one file. One pass, however many there are."""
    scored = parts[1] > 0  # tokens
    several, numbers, counts = np.unique(names[scored], return_inverse=True, return_counts=True)
    if len(several) < 2:
        return {}
    order, stops = np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1]  # the parts of a file keep their order
    of_files = zip(*(np.split(part[scored][order], stops) for part in parts), strict=True)
    return {str(name): units_of(*of_file, passages=passages) for name, of_file in zip(several, of_files, strict=True)}
