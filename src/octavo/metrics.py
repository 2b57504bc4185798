"""How well a model predicts text: token-weighted perplexity, and bits per byte, which tokenizers do not change.

Nats are summed over all tokens and divided once; averaging the means of windows would weigh short ones too much.
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
    """The cost of a text under a model. `n_bytes` are the UTF-8 bytes of the text that the tokens stand for."""

    nats: float
    tokens: int
    n_bytes: int

    @property
    def loss(self) -> float:
        """Mean nats a token; not a number of a text without any."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is more than a float holds."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def score(
    model: Decoder,
    rows: Sequence[Row],
    *,
    n_bytes: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """The score of all labelled tokens of `rows`, in eval mode. `progress` is told of the rows done."""
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
