"""A frozen linear as a matmul reads it, and how it is computed in 8 bits.

Legend: N outputs and K inputs of a linear, M rows (tokens), C outlier channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops.linear import LoraSlice
from octavo.ops.scheme import INT8_LEVELS

OUTLIERS = 16  # channels, the depth of one tensor-core step: a model has few outlier channels (arXiv 2208.07339)


@dataclass
class QuantErrorProbe:
    """The errors of a matmul in 8 bits, measured while the exact result is used.

    forward    ||y8 - y|| / ||y - mean(y)||: the mean over rows is subtracted, since a constant that all tokens share
               would hide the error of everything else
    backward   ||dx8 - dx|| / ||dx||
    outliers   as forward, with the C `channels` of the input with the largest values kept exact
    """

    forward: Tensor | None = None
    backward: Tensor | None = None
    outliers: Tensor | None = None
    channels: Tensor | None = None  # (C,)


class Outliers(NamedTuple):
    """Outlier channels of an input, which stay in the compute dtype (LLM.int8(), arXiv 2208.07339).

    One value of large magnitude would leave the rest of its row few of the 255 quantization levels.
    """

    channels: Tensor  # (C,) int64
    prescale: Tensor  # (K,) float32, the pre-scale of quantization: 0 for outlier channels, else 127


def split_outliers(channels: Tensor, columns: int) -> Outliers:
    """The outliers `channels` (C,) of an input with K = `columns`."""
    prescale = torch.full((columns,), float(INT8_LEVELS), device=channels.device)  # (K,)
    return Outliers(channels, prescale.index_fill_(0, channels, 0))


class Matmul8(NamedTuple):
    """A linear that training multiplies in 8 bits, with the tensors for that.

    `transposed` is the weight as backward reads it, (K, N) with absmax (N,), if it is kept. With a `probe` the matmul
    is exact, and its errors in 8 bits are written there. `forward_only`: backward is exact.
    """

    outliers: Outliers | None = None
    transposed: tuple[Tensor, Tensor] | None = None
    probe: QuantErrorProbe | None = None
    forward_only: bool = False


class LinearSpec(NamedTuple):
    """A frozen linear as a matmul reads it. Weight (N, K), bias on rows from `bias_start` on, LoRA slices."""

    rows: int  # N
    columns: int  # K
    fill: Callable[[Tensor], None]  # writes the weight into the (N, K) tensor that it is given
    bias: Tensor | None = None
    bias_start: int = 0
    lora: tuple[LoraSlice, ...] = ()
    dropout: float = 0.0  # on the input of LoRA; 0 in evaluation
    int8_weight: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # like -> int8 (N, K) and absmax (N,)
    matmul8: Matmul8 | None = None  # None: in the compute dtype
    fill_rows: Callable[[int, Tensor], None] | None = None  # writes rows of the weight, from a first one on

    @property
    def rank(self) -> int:
        """The sum of the LoRA ranks."""
        return sum(part.a.shape[0] for part in self.lora)
