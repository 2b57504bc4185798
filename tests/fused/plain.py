"""The references of mixers and residual branches: plain PyTorch under autograd, from the functions of a plain block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.fused.attention import Attention
from octavo.fused.mixers import Gelu, Mixer, Swiglu
from octavo.layers.block import attention, geglu, gelu, rope, split_heads, swiglu
from octavo.layers.context import ForwardContext
from octavo.layers.frozen import FrozenLinear
from octavo.layers.norm import LayerNorm, NormSpec, RmsNorm
from octavo.ops import pointwise


def plain(mixer: Mixer, u: Tensor, ctx: ForwardContext) -> Tensor:
    """(B, T, inputs) -> (B, T, outputs)."""
    with torch.enable_grad():  # without gradients these functions write in place
        if isinstance(mixer, Attention):
            q, k, v = split_heads(u, mixer.heads, mixer.key_value_heads, mixer.key_value_heads, size=mixer.head_size)
            if mixer.norms is not None:
                q, k = (normed(x, spec) for x, spec in zip((q, k), mixer.norms, strict=True))
            return attention(rope(q, ctx, mixer.form), rope(k, ctx, mixer.form), v, ctx)
        if isinstance(mixer, Gelu):
            return gelu(u, ctx, mixer.approximate)
        return swiglu(u, ctx) if isinstance(mixer, Swiglu) else geglu(u, ctx)


def normed(x: Tensor, spec: NormSpec) -> Tensor:
    """x (B, T, heads, D), with a norm of each head or, if the weight has so many values, of all heads together."""
    groups = x.flatten(2).unflatten(-1, (-1, len(spec.weight)))
    y = pointwise.norm(groups, spec.weight, spec.bias, spec.eps, zero_centred_weight=spec.zero_centred_weight)
    return y.view_as(x)


def plain_branch(
    x: Tensor,
    norm: LayerNorm | RmsNorm | None,
    inner: FrozenLinear,
    mixers: Sequence[Mixer],
    outer: Sequence[FrozenLinear],
    ctx: ForwardContext,
    *,
    residual: Tensor | None = None,
    post_norm: LayerNorm | RmsNorm | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(B, T, d) -> (B, T, d)."""
    u = inner.reference(x if norm is None else norm(x)).split([mixer.inputs for mixer in mixers], dim=-1)
    y = x if residual is None else residual
    for mixer, columns, layer in zip(mixers, u, outer, strict=True):
        z = layer.reference(plain(mixer, columns, ctx))
        y = y + scale * (z if post_norm is None else post_norm(z))
    return y
