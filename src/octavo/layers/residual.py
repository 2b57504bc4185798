"""A residual branch made of layers: y = x + sum of outer_i(mix_i(inner(norm(x)))), and the norms in front of it.

`plain_residual` is the definition, under autograd. `residual` computes the same, with a backward of its own
(ops/branch.py), or over a cache, where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.layers.frozen import FrozenLinear
from octavo.ops import pointwise
from octavo.ops.branch import Branch, Keep, Norm, branch
from octavo.ops.mix import Attend, Context, Piece
from octavo.ops.wide import Wide


class LayerNorm(nn.Module):
    """LayerNorm with its weight and bias kept in float32, taken in the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.norm())

    def norm(self) -> Norm:
        return Norm(self.weight, self.bias, self.eps)


class RmsNorm(nn.Module):
    """x / rms(x) * weight; the mean square is taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normed(x, self.norm())

    def norm(self) -> Norm:
        return Norm(self.weight, None, self.eps)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    """The definition where a gradient is wanted, else the fast path, in one pass over memory."""
    if torch.is_grad_enabled():
        return pointwise.norm(x, norm.weight, norm.bias, norm.eps)
    out = torch.empty_like(x)
    pointwise.norm_into(x.view(-1, x.shape[-1]), norm.weight, norm.bias, norm.eps, out.view(-1, x.shape[-1]))
    return out


def residual(
    x: Tensor,
    norm: LayerNorm | RmsNorm,
    inner: FrozenLinear,
    pieces: Sequence[Piece],
    outer: Sequence[FrozenLinear],
    context: Context,
    *,
    keep: Keep,
    attend: Attend | None = None,
) -> Tensor:
    """(B, T, d) -> (B, T, d). Each piece takes its columns of inner's output and feeds its own layer of `outer`."""
    if attend is not None:
        u = inner.infer(norm(x), phase=context.phase).flatten(0, 1).split([piece.inputs for piece in pieces], dim=-1)
        for piece, own, layer in zip(pieces, u, outer, strict=True):
            mixed = piece.over_cache(own, context, attend).view(*x.shape[:2], -1)
            x = layer.infer(mixed, phase=context.phase, residual=x)
        return x
    parts = Wide((inner.frozen(),)), Wide(tuple(layer.frozen() for layer in outer))
    return branch(x, Branch(norm.norm(), parts[0], pieces, parts[1]), context, keep=keep)


def plain_residual(
    x: Tensor,
    norm: LayerNorm | RmsNorm,
    inner: FrozenLinear,
    pieces: Sequence[Piece],
    outer: Sequence[FrozenLinear],
    context: Context,
) -> Tensor:
    """The definition of `residual`, under autograd."""
    u = inner(norm(x)).split([piece.inputs for piece in pieces], dim=-1)
    for piece, own, layer in zip(pieces, u, outer, strict=True):
        x = x + layer(piece.plain(own, context))
    return x


def levels(keep: Keep | Sequence[Keep], blocks: int) -> Sequence[Keep]:
    """What each of so many blocks keeps."""
    return [keep] * blocks if isinstance(keep, Keep) else keep
