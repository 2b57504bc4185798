"""How well a model predicts a text: perplexity, and bits per byte, which can be compared between tokenizers.

The losses of all tokens are summed and divided once: a mean over the means of rows would overweight tokens of rows with
few of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from octavo.data.loader import batches
from octavo.data.packing import Row
from octavo.models import Decoder
from octavo.objective import batch_loss


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood of a text under a model."""

    nats: float  # -log p(text), the sum over its tokens
    tokens: int  # predicted tokens
    n_bytes: int  # UTF-8 bytes of their text

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
    progress: Callable[[int], None] | None = None,
) -> Score:
    """The score of all labelled tokens of `rows`, in eval mode. `progress(n)` is called after each batch of n rows."""
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches(rows, batch_size=batch_size, seed=0, epochs=1, shuffle=False):
            nats += float(batch_loss(model, batch))
            tokens += batch.trained_tokens
            if progress:
                progress(len(batch.ids))
    model.train(was_training)
    return Score(nats, tokens, n_bytes)
