"""The 8-bit matmul of forward by cuBLAS, for Turing: its tensor cores multiply int8, but Triton has no dots for them.

cuBLAS writes the int32 sums, which a kernel scales and adds to the low-rank term, the bias and the residual. A piece of
the rows at a time, so that the sums take little memory and are partly read from cache.

Legend as in ops/matmul8.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from octavo.hardware.capabilities import Capabilities
from octavo.ops.matmul8 import LowRankTerm
from octavo.ops.scheme import INT8_LEVELS

PIECE = 2**23  # int32 sums at a time: 32 MiB
LEAST_ROWS = 17  # that `torch._int_mm` accepts on a GPU
WIDTH = 1024  # columns of a program


def fits(capabilities: Capabilities, quantized: Tensor, scale: Tensor) -> bool:
    """Whether cuBLAS computes this matmul: not with a scale for each group, nor without int8 tensor cores."""
    return capabilities.matmul_8bit and quantized.dtype == torch.int8 and scale.ndim == 1


def matmul_8bit_into(
    quantized: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None,
    bias: Tensor | None,
    bias_start: int,
    low_rank: LowRankTerm | None,
    residual: Tensor | None,
) -> None:
    added = residual
    if low_rank is not None:  # rounded to the dtype of `out` once more than the reference rounds
        b = low_rank.b.T  # (C, N)
        added = torch.mm(low_rank.t, b, out=out) if added is None else torch.addmm(added, low_rank.t, b, out=out)
    n = len(weight)
    rows = max(LEAST_ROWS, PIECE // n)
    for start in range(0, len(out), rows):
        piece = slice(start, start + rows)
        sums, target = _sums(quantized[piece], weight), out[piece]
        more = added[piece] if added is not None else target
        _finish[(len(target), triton.cdiv(n, WIDTH))](
            sums, scale[piece], absmax if absmax is not None else scale, bias if bias is not None else scale,
            bias_start, bias_start + (bias.numel() if bias is not None else 0), more, target, n, target.stride(0),
            more.stride(0), absmax is not None, bias is not None, added is not None, INT8_LEVELS, WIDTH,
        )  # fmt: skip


def _sums(quantized: Tensor, weight: Tensor) -> Tensor:
    """quantized (M, K) weight (N, K)^T in int32, (M, N) or with more rows."""
    missing = LEAST_ROWS - len(quantized)
    return torch._int_mm(F.pad(quantized, (0, 0, 0, missing)) if missing > 0 else quantized, weight.T)


@triton.jit
def _finish(
    sums, scale, absmax, bias, bias_start, bias_stop, added, out, n, out_stride, added_stride,
    SCALED: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < n
    y = tl.load(sums + row * n + column, mask=inside, other=0).to(tl.float32) * tl.load(scale + row)
    if SCALED:
        y *= tl.load(absmax + column, mask=inside, other=0) / LEVELS
    if BIAS:
        there = (column >= bias_start) & (column < bias_stop)
        y += tl.load(bias + column - bias_start, mask=there, other=0)
    if ADDED:  # may be `out`: an element is written by the thread that has read it
        y += tl.load(added + row * added_stride + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=inside)
