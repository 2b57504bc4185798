"""PyTorch's attention on the meta device, where a training step is simulated to forecast its memory.

It allocates what the implementation of the GPU to plan for allocates, in forward and in backward. Legend as in
ops/attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from octavo.runtime.dispatch import observe

FLASH_ROWS = 128  # the positions of a tile of queries in FlashAttention's backward
LSE_ROWS = 32  # the memory-efficient implementation rounds the positions of the log-sums up to a multiple


def flash_attention(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    """(B, T, H, D) of cuDNN's attention (`sequences` is 0), or of FlashAttention's over so many sequences."""
    out: Tensor = _Flash.apply(q, k, v, sequences)  # type: ignore[no-untyped-call]
    return out


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, H, D) of the memory-efficient implementation, for as many key heads as query heads."""
    out: Tensor = _Efficient.apply(q, k, v, mask)  # type: ignore[no-untyped-call]
    return out


class _Flash(torch.autograd.Function):
    """Forward saves the log-sums; backward makes dq in float32 first and, if key heads are shared, dk and dv for every
    query head.

    Empty sequences count too: FlashAttention's dq in float32 and row sums have `FLASH_ROWS` more positions for each
    (PyTorch 2.11, flash_api.cpp, mha_varlen_bwd).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
        observe("attention", [q, k, v, q])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        ctx.sequences = sequences
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        observe("attention_backward", [q, k, v, q, q, k, v, q])
        batch, length, heads, size = q.shape
        wide = [q.new_empty(q.shape, dtype=torch.float32)]
        if ctx.sequences:
            positions, size = batch * length + FLASH_ROWS * ctx.sequences, 256 if size > 192 else -(-size // 32) * 32
            wide = [q.new_empty(positions, heads, columns, dtype=torch.float32) for columns in (size, 1)]
        if k.shape[2] != heads:
            wide += [q.new_empty(q.shape) for _ in range(2)]
        return *(x.new_empty(x.shape) for x in (q, k, v)), None


class _Efficient(torch.autograd.Function):
    """Forward sums in float32 in memory for heads of over 128, whose sums do not fit into registers. Backward sums dq
    in float32, and dk and dv too for heads of over 64: the tiles of GPUs before Ampere have 64 rows.

    Source: PyTorch 2.11, mem_eff_attention/kernel_forward.h and kernel_backward.h. Not measured on such a GPU.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        observe("attention", [q, k, v, q])
        batch, length, heads, size = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        sums = q.new_empty(q.shape, dtype=torch.float32) if size > 128 else None
        rows = -(-length // LSE_ROWS) * LSE_ROWS
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(batch, heads, rows, dtype=torch.float32))
        del sums
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        observe("attention_backward", [q, k, v, q, q, k, v, q])
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        delta = q.new_empty(q.shape[:3], dtype=torch.float32)
        sums = q.new_empty(3 if q.shape[3] > 64 else 1, *q.shape, dtype=torch.float32)
        del delta, sums
        return *gradients, None
