"""A residual branch made of layers: y = x + sum of outer_i(mix_i(inner(norm(x)))), and the norms in front of it.

`plain_residual` is the definition, under autograd. `residual` computes the same, with a backward of its own
(fused/branch.py), or over a cache, where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from octavo.fused.branch import Branch, Norm, Save, branch
from octavo.fused.linear import FusedLinear
from octavo.fused.mixers import Attend, ForwardContext, Mixer
from octavo.layers.frozen import FrozenLinear
from octavo.ops import pointwise


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
    mixers: Sequence[Mixer],
    outer: Sequence[FrozenLinear],
    context: ForwardContext,
    *,
    save: Save,
    attend: Attend | None = None,
) -> Tensor:
    """(B, T, d) -> (B, T, d). Each piece takes its columns of inner's output and feeds its own layer of `outer`."""
    if attend is not None:
        u = inner.infer(norm(x), phase=context.phase).flatten(0, 1).split([mixer.inputs for mixer in mixers], dim=-1)
        for mixer, own, layer in zip(mixers, u, outer, strict=True):
            mixed = mixer.over_cache(own, context, attend).view(*x.shape[:2], -1)
            x = layer.infer(mixed, phase=context.phase, residual=x)
        return x
    parts = FusedLinear((inner.frozen(),)), FusedLinear(tuple(layer.frozen() for layer in outer))
    return branch(x, Branch(norm.norm(), parts[0], mixers, parts[1]), context, save=save)


def plain_residual(
    x: Tensor,
    norm: LayerNorm | RmsNorm,
    inner: FrozenLinear,
    mixers: Sequence[Mixer],
    outer: Sequence[FrozenLinear],
    context: ForwardContext,
) -> Tensor:
    """The definition of `residual`, under autograd."""
    u = inner(norm(x)).split([mixer.inputs for mixer in mixers], dim=-1)
    for mixer, own, layer in zip(mixers, u, outer, strict=True):
        x = x + layer(mixer.plain(own, context))
    return x


def save_levels(save: Save | Sequence[Save], blocks: int) -> Sequence[Save]:
    """What each of so many blocks keeps."""
    return [save] * blocks if isinstance(save, Save) else save
