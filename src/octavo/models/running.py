"""Runs a block of a decoder: fused where its family has a fused form, else as plain PyTorch.

Over a cache every block runs plain: there its layers take the kernels of inference. In training a block without a
fused form runs under autograd, which saves all that it needs, or is computed again in backward from its input.

Legend: B sequences, T positions, d the width of the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.layers.context import ForwardContext, Save
from octavo.layers.dropout import RepeatedDropout
from octavo.models.fused_blocks import FUSED


def run_block(block: nn.Module, x: Tensor, ctx: ForwardContext) -> Tensor:
    """(B, T, d) -> (B, T, d)."""
    if ctx.cache is None and ctx.fused and (fused := FUSED.get(type(block))) is not None:
        return fused(block, x, ctx)
    # A block without a fused form has two save levels: all that autograd saves, or its input.
    if ctx.cache is None and torch.is_grad_enabled() and (ctx.save < Save.ALL or ctx.offload is not None):
        return recomputed(block, x, ctx)
    y: Tensor = block(x, ctx)
    return y


def recomputed(block: nn.Module, x: Tensor, ctx: ForwardContext) -> Tensor:
    """The block, which saves its input alone and runs once more in backward (arXiv 1604.06174)."""
    anchor = torch.empty(0, device=x.device, requires_grad=True)  # the embedding's output may need no gradient
    y: Tensor = _Recomputed.apply(x, anchor, block, ctx)  # type: ignore[no-untyped-call]
    return y


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, block: nn.Module, context: ForwardContext) -> Tensor:
        dropout = RepeatedDropout(context.dropout)  # backward draws the same masks
        context = replace(context, dropout=dropout)
        ctx.block, ctx.context = block, replace(context, offload=None)
        ctx.offload, ctx.needs_x = context.offload, x.requires_grad
        if context.offload is not None:
            context.offload.put(x)
        else:
            ctx.save_for_backward(x)
        y: Tensor = block(x, context)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x,) = ctx.saved_tensors if ctx.offload is None else (ctx.offload.take(),)
        assert isinstance(ctx.context.dropout, RepeatedDropout)
        with torch.enable_grad():  # the block again, this time with a graph
            x = x.detach().requires_grad_(ctx.needs_x)
            y = ctx.block(x, replace(ctx.context, dropout=ctx.context.dropout.again()))
        torch.autograd.backward(y, grad)  # also adds the gradients of the block's parameters
        return x.grad, None, None, None
