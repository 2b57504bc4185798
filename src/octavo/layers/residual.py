"""A residual branch made of layers: y = x + sum of outer_i(mix_i(inner(norm(x)))), and the norms in front of it.

`residual` with a cache is the definition, layer by layer; without one it is ops/branch.py, which computes the same
with a backward of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.layers.frozen import FrozenLinear
from octavo.ops import pointwise
from octavo.ops.branch import Branch, Keep, Norm, branch
from octavo.ops.mix import Context, Piece, Store
from octavo.ops.wide import Wide


class LayerNorm(nn.Module):
    """LayerNorm with its weight and bias kept in float32, taken in the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return pointwise.norm(x, self.weight, self.bias, self.eps)

    def norm(self) -> Norm:
        return Norm(self.weight, self.bias, self.eps)


class RmsNorm(nn.Module):
    """x / rms(x) * weight; the mean square is taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return pointwise.norm(x, self.weight, None, self.eps)

    def norm(self) -> Norm:
        return Norm(self.weight, None, self.eps)


def residual(
    x: Tensor,
    norm: LayerNorm | RmsNorm,
    inner: FrozenLinear,
    pieces: Sequence[Piece],
    outer: Sequence[FrozenLinear],
    context: Context,
    *,
    keep: Keep,
    store: Store | None = None,
) -> Tensor:
    """(B, T, d) -> (B, T, d). Each piece takes its columns of inner's output and feeds its own layer of `outer`."""
    if store is not None:
        return plain_residual(x, norm, inner, pieces, outer, context, store=store)
    parts = Wide((inner.frozen(),)), Wide(tuple(layer.frozen() for layer in outer))
    return branch(x, Branch(norm.norm(), parts[0], pieces, parts[1]), context, keep=keep)


def plain_residual(
    x: Tensor,
    norm: LayerNorm | RmsNorm,
    inner: FrozenLinear,
    pieces: Sequence[Piece],
    outer: Sequence[FrozenLinear],
    context: Context,
    *,
    store: Store | None = None,
) -> Tensor:
    """The definition of `residual`, under autograd."""
    u = inner(norm(x)).split([piece.inputs for piece in pieces], dim=-1)
    for piece, own, layer in zip(pieces, u, outer, strict=True):
        x = x + layer(piece.plain(own, context, store))
    return x


def levels(keep: Keep | Sequence[Keep], blocks: int) -> Sequence[Keep]:
    """What each of so many blocks keeps."""
    return [keep] * blocks if isinstance(keep, Keep) else keep
