"""The functions between the linears of a block, for training and for inference over a cache.

With gradients enabled they are plain PyTorch under autograd. Without, they write in place or in one pass, and over a
cache a row of their result has the same bits in every batch (ops/tiles.py).

Legend: B sequences, T positions, H query heads, G key/value heads, D the size of a head, F the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.layers.context import ForwardContext
from octavo.ops.attention import causal_attention
from octavo.ops.pointwise import geglu_into, gelu_into, swiglu_into
from octavo.ops.rotary import rotate, rotate_into
from octavo.ops.tiles import elementwise_tiles


def split_heads(x: Tensor, *heads: int, size: int) -> list[Tensor]:
    """x (B, T, sum of heads * D) as views (B, T, heads, D)."""
    return [part.unflatten(-1, (-1, size)) for part in x.split([count * size for count in heads], dim=-1)]


def rope(x: Tensor, ctx: ForwardContext, form: str) -> Tensor:
    """x (B, T, heads, D) with rotary positions (RoFormer, arXiv 2104.09864), if the layer has them.

    In place where no gradient is needed.
    """
    if ctx.rotary is None:
        return x
    if torch.is_grad_enabled():
        return rotate(x, ctx.rotary, form)
    rows = x.flatten(2).flatten(0, 1)  # (B T, heads D), a view
    rotate_into(rows, *ctx.rotary, x.shape[-1], form, rows)
    return x


def attention(q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, T, G, D), and over the cache if there is one: (B, T, H D).

    The layer's window, scale and soft-cap are those of `ctx`.
    """
    if ctx.query_scale is not None:
        q = q * ctx.query_scale.to(q.dtype)
    if ctx.cache is not None:
        return ctx.cache.attend(ctx.layer, q, k, v, ctx.attention).reshape(*q.shape[:2], -1)
    return causal_attention(q, k, v, ctx.attention, documents=ctx.documents, masks=ctx.masks).flatten(2)


def gelu(x: Tensor, ctx: ForwardContext, approximate: str = "tanh") -> Tensor:
    """GELU (arXiv 1606.08415) in its tanh form or, if `approximate` is "none", with erf: (B, T, F) -> (B, T, F)."""
    if torch.is_grad_enabled():
        return F.gelu(x, approximate=approximate)
    return _in_tiles(x, x.shape[-1], partial(gelu_into, approximate=approximate), ctx)


def swiglu(x: Tensor, ctx: ForwardContext) -> Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202) of x = [gate | up], (B, T, 2 F) -> (B, T, F)."""
    if torch.is_grad_enabled():
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _in_tiles(x, x.shape[-1] // 2, swiglu_into, ctx)


def geglu(x: Tensor, ctx: ForwardContext) -> Tensor:
    """gelu(gate) * up (GEGLU, arXiv 2002.05202; GELU in its tanh form) of x = [gate | up], (B, T, 2 F) -> (B, T, F)."""
    if torch.is_grad_enabled():
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up
    return _in_tiles(x, x.shape[-1] // 2, geglu_into, ctx)


def elementwise(function: Callable[[Tensor], Tensor], x: Tensor, ctx: ForwardContext) -> Tensor:
    """`function` of the rows of x (B, T, F) -> (B, T, ..), which may be narrower, as those of a gated activation.

    Over a cache the bits of a row do not depend on the other rows.
    """
    if torch.is_grad_enabled() or ctx.cache is None:
        return function(x)
    rows = torch.cat([function(tile) for tile in elementwise_tiles(x.flatten(0, 1), ctx.phase)])  # (B T, ..)
    return rows.view(*x.shape[:2], -1)


def _in_tiles(x: Tensor, width: int, write: Callable[[Tensor, Tensor], None], ctx: ForwardContext) -> Tensor:
    rows = x.flatten(0, 1)
    out = x.new_empty(len(rows), width)
    for source, target in zip(elementwise_tiles(rows, ctx.phase), elementwise_tiles(out, ctx.phase), strict=True):
        write(source, target)
    return out.view(*x.shape[:-1], width)
