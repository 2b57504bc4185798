"""Factors of low-rank pairs (LoRA, arXiv 2106.09685) as thin products read them: in the compute type, side by side.

Legend: a pair is A (r, K) and B (n, r) on rows [start, stop) of N; C columns, at least the ranks of all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.ops.linear import LoraSlice
from octavo.runtime.dispatch import kernel


@kernel
def pack_b_into(out: Tensor, pairs: Sequence[LoraSlice]) -> None:
    """out (N, C) = every B times `on_b` on its rows, one beside the other; zeros elsewhere."""
    out.zero_()
    column = 0
    for pair in pairs:
        rank = len(pair.a)
        torch.mul(pair.b.detach(), pair.on_b, out=out[pair.start : pair.stop, column : column + rank])
        column += rank


def stack_a(pairs: Sequence[LoraSlice], like: Tensor, *, transposed: bool = False) -> Tensor:
    """(sum of r, K): every A times `on_a`, one under the other, in the type of `like`; `turned` is (K, sum of r)."""
    each = [pair.a.detach() if pair.on_a == 1 else pair.a.detach() * pair.on_a for pair in pairs]
    a = each[0] if len(each) == 1 else torch.cat(each)
    a = a.T if transposed else a
    return like.new_empty(a.shape).copy_(a)
