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
def pack_b_into(out: Tensor, pairs: Sequence[LoraSlice]) -> None:
    """out (N, C) = every B times `on_b` on its rows, in r columns; zeros elsewhere."""
    out.zero_()
    column = 0
    for pair in pairs:
        rank = len(pair.a)
        torch.mul(pair.b.detach(), pair.on_b, out=out[pair.start : pair.stop, column : column + rank])
        column += rank


def stack_a(pairs: Sequence[LoraSlice], like: Tensor, *, transposed: bool = False) -> Tensor:
    """Every A times `on_a`, stacked along the rank, in the dtype of `like`: (sum of r, K), transposed (K, sum of r)."""
    factors = [pair.a.detach() if pair.on_a == 1 else pair.a.detach() * pair.on_a for pair in pairs]
    a = factors[0] if len(factors) == 1 else torch.cat(factors)  # (sum of r, K)
    a = a.T if transposed else a
    return like.new_empty(a.shape).copy_(a)
