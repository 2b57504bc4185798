"""Learned positions: a vector for each position, which is added to the embedding (GPT-2, GPT-Neo).

Legend: B sequences of a batch, T positions, P positions that a model has, d the width of the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LearnedPositions(nn.Module):
    """weight[p] for each position p, in float32; trained where the norms are trained."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width), requires_grad=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions (B or 1, T) below P -> (B or 1, T, d)."""
        return F.embedding(positions, self.weight).to(dtype)
