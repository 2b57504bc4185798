"""A frozen linear as a product reads it, and what is known of it in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops.linear import LoraSlice
from octavo.ops.quantize import INT8_LEVELS


@dataclass
class QuantErrorProbe:
    """What 8 bits would cost a product: ||its result in 8 bits - the exact one|| over what the exact one says.

    Of an output that is how far rows are from their mean: a far outlier that all tokens share would hide the loss of
    everything else behind a large constant. Of a gradient it is its length. `channels` are the inputs with the largest
    numbers, and `apart` is the cost of an output with these taken apart.
    """

    forward: Tensor | None = None
    backward: Tensor | None = None
    outliers: Tensor | None = None
    channels: Tensor | None = None


class Outliers(NamedTuple):
    """Inputs of a product in 8 bits that stay in the compute type: their places (C,), and 127 for each other one, 0 for
    these (K,), as coding folds it in. One far number would leave its whole row few of the 255 steps."""

    channels: Tensor
    others: Tensor


OUTLIERS = 16  # channels, a step of the thin product's: a model's far channels are few (LLM.int8(), arXiv 2208.07339)


def split_outliers(channels: Tensor, columns: int) -> Outliers:
    """Takes these of so many inputs apart."""
    others = torch.full((columns,), float(INT8_LEVELS), device=channels.device)
    return Outliers(channels, others.index_fill_(0, channels, 0))


class LinearSpec(NamedTuple):
    """A frozen linear as a product reads it: `fill` writes its matrix into the (N, K) columns that it is given."""

    rows: int
    columns: int
    fill: Callable[[Tensor], None]
    bias: Tensor | None = None
    bias_start: int = 0
    lora: tuple[LoraSlice, ...] = ()
    dropout: float = 0.0  # on what the pairs read, while training
    int8_weight: Callable[[Tensor], tuple[Tensor, Tensor]] | None = (
        None  # int8 (N, K) and absmax (N,), to multiply in 8 bits
    )
    probe: QuantErrorProbe | None = None
    outliers: Outliers | None = None
    transposed: tuple[Tensor, Tensor] | None = (
        None  # what `codes` gives, transposed (K, N) for backward, if that is kept
    )

    @property
    def rank(self) -> int:
        return sum(pair.a.shape[0] for pair in self.lora)
