"""A norm as one autograd function that saves its input alone: the norm before the head.

Plain autograd would keep float32 copies of the hidden states, several at a time, for some norms and on some devices.
The norms of blocks are parts of their branches (fused/branch.py).

Legend: B sequences, T positions, M = B T rows, d the width of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.layers.norm import NormSpec


def fused_norm(x: Tensor, norm: NormSpec) -> Tensor:
    """The norm of x (B, T, d), (B, T, d)."""
    y: Tensor = _Norm.apply(x, norm, *norm.trained)  # type: ignore[no-untyped-call]
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: NormSpec, *trained: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (M, d)
        ctx.save_for_backward(rows)
        ctx.norm = norm
        y = torch.empty_like(rows)  # (M, d)
        norm.write(rows, y)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors  # (M, d)
        dy = grad.reshape(rows.shape)  # (M, d)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(rows)  # (M, d)
            ctx.norm.backward(rows, dy, None, dx)
            dx = dx.view(grad.shape)
        return dx, None, *ctx.norm.grad_trained(rows, dy)
