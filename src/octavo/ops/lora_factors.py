"""A and B of LoRA adapters (arXiv 2106.09685) as low-rank GEMMs read them: in the compute dtype, stacked.

Legend: an adapter is A (r, K) and B (n, r) on rows [start, stop) of N; C columns, at least the sum of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.ops.linear import LoraSlice
from octavo.runtime.dispatch import kernel


@kernel
def pack_b_into(out: Tensor, loras: Sequence[LoraSlice]) -> None:
    """out (N, C) = every B times `b_scaling` on its rows, in r columns; zeros elsewhere."""
    out.zero_()
    column = 0
    for lora in loras:
        rank = len(lora.a)
        torch.mul(lora.b.detach(), lora.b_scaling, out=out[lora.start : lora.stop, column : column + rank])
        column += rank


def stack_a(loras: Sequence[LoraSlice], like: Tensor, *, transposed: bool = False) -> Tensor:
    """Every A times `a_scaling`, stacked along the rank: (sum of r, K) in the dtype of `like`, or transposed."""
    factors = [lora.a.detach() if lora.a_scaling == 1 else lora.a.detach() * lora.a_scaling for lora in loras]
    a = factors[0] if len(factors) == 1 else torch.cat(factors)  # (sum of r, K)
    a = a.T if transposed else a
    return like.new_empty(a.shape).copy_(a)
