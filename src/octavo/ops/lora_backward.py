"""The backward of an activation with the LoRA gradients of the layers before and after it (LoRA, arXiv 2106.09685).

The input x of an activation y = f(x) has the LoRA terms t B^T of the layers before it; the layer after it has the LoRA
term s (y A^T) B^T. Given dy, the gradient of y:

    dx = dy f'(x)
    dB = dx^T t      and dt = dx B      of a layer before
    dA = after^T y                      of the layer after, where `after` is the gradient of y A^T

Computed one by one these are three more passes over the widest matrices of a model, and y is a matrix of its own. A
kernel reads x and dy once, writes dx over x and keeps the sums in registers (kernels/lora_backward.py).

Legend: M rows; x is (M, H F), H parts of F columns: GELU has one, SwiGLU and GEGLU two (gate, up), each with an adapter
of rank r; the adapter of the layer after has rank q.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops.linear import mm_float32
from octavo.ops.pointwise import geglu_backward_, gelu_backward_, swiglu_backward_
from octavo.runtime.dispatch import kernel


class LoraOperands(NamedTuple):
    """The LoRA operands next to an activation. `b` is None if dt is not needed."""

    t: Tensor  # (M, H r)
    b: Tensor | None  # (H F, r): B of each part, one below the other
    after: Tensor  # (M, q)


class LoraGrads(NamedTuple):
    """Gradients of t, B and A, float32."""

    t: Tensor | None  # (M, H r)
    b: Tensor  # (H F, r)
    a: Tensor  # (q, F)


@kernel(on_meta="kernel")
def gelu_lora_backward_(x: Tensor, dy: Tensor, operands: LoraOperands, *, approximate: str = "tanh") -> LoraGrads:
    """Writes dy gelu'(x) over x, both (M, F); dy is overwritten."""
    gelu_backward_(x, dy, approximate=approximate)
    return lora_grads(x, dy, operands)


@kernel(on_meta="kernel")
def swiglu_lora_backward_(x: Tensor, dy: Tensor, operands: LoraOperands) -> LoraGrads:
    """Writes the gradients of [gate | up], x (M, 2F), over them; dy (M, F) is overwritten."""
    swiglu_backward_(x, dy)
    return lora_grads(x, dy, operands)


@kernel(on_meta="kernel")
def geglu_lora_backward_(x: Tensor, dy: Tensor, operands: LoraOperands) -> LoraGrads:
    """Writes the gradients of [gate | up], x (M, 2F), over them; dy (M, F) is overwritten."""
    geglu_backward_(x, dy)
    return lora_grads(x, dy, operands)


def lora_grads(dx: Tensor, y: Tensor, operands: LoraOperands) -> LoraGrads:
    """The gradients for dx (M, H F) and y (M, F)."""
    f, parts = y.shape[1], dx.shape[1] // y.shape[1]
    dxs, ts = dx.split(f, dim=1), operands.t.split(operands.t.shape[1] // parts, dim=1)  # (M, F), (M, r) each
    db = torch.cat([mm_float32(part.T, t) for part, t in zip(dxs, ts, strict=True)])  # (H F, r)
    dt = None
    if operands.b is not None:
        bs = operands.b.split(f)  # (F, r) each
        dt = torch.cat([mm_float32(part, b) for part, b in zip(dxs, bs, strict=True)], dim=1)  # (M, H r)
    return LoraGrads(dt, db, mm_float32(operands.after.T, y))  # da (q, F)
