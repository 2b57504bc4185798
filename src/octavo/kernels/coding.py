"""An activation coded in the pass that makes it. Definition: ops/coding.py.

A program takes BM rows, which is what tensor cores multiply at least, and goes over them twice, BC columns at a time:
the second time backwards, as what was read last is still in cache. Legend as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.eight import _store_codes
from octavo.kernels.pointwise import _gate, _sigmoid
from octavo.ops.quantize import INT8_LEVELS
from octavo.ops.room import Coding

BM, BC, WARPS, STAGES = 16, 512, 8, 3
TINY = torch.finfo(torch.float32).tiny


def gelu_coded_into(x: Tensor, to: Coding) -> None:
    _launch(x, to, gated=False)


def swiglu_coded_into(x: Tensor, to: Coding) -> None:
    _launch(x, to, gated=True)


def _launch(x: Tensor, to: Coding, *, gated: bool) -> None:
    codes, scale, a, t = to
    m, f = codes.shape
    rank = 0 if a is None else len(a)
    a = x if a is None else a
    t = x if t is None else t
    _coded[(triton.cdiv(m, BM),)](
        x, a, codes, scale, t, m, f, rank, x.stride(0), a.stride(0), codes.stride(0), t.stride(0), gated, rank > 0,
        INT8_LEVELS, TINY, max(16, triton.next_power_of_2(rank)), BM, BC, WARPS, STAGES, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _coded(
    x, a, codes, scale, t, m, f, rank, x_stride, a_stride, codes_stride, t_stride, GATED: tl.constexpr,
    THIN: tl.constexpr, LEVELS: tl.constexpr, TINY: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = row < m
    own = x + row.to(tl.int64)[:, None] * x_stride
    tops = tl.zeros((BM, BC), dtype=tl.float32)
    r = tl.arange(0, R)
    # Each warp multiplies a piece of the columns: all of them would make the same small product otherwise.
    sums = tl.zeros((WARPS, BM, R), dtype=tl.float32)
    for start in tl.range(0, f, BC, num_stages=STAGES):
        y = _activated(own, there, start, f, GATED, BC)
        tops = tl.maximum(tops, tl.abs(y.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
        if THIN:
            column = start + tl.arange(0, BC)
            factor = tl.load(
                a + r[None, :] * a_stride + column[:, None], mask=(r[None, :] < rank) & (column[:, None] < f), other=0
            )
            left = tl.permute(tl.reshape(y, (BM, WARPS, BC // WARPS)), (1, 0, 2))
            right = tl.reshape(factor, (WARPS, BC // WARPS, R))
            sums = tl.dot(left, right, sums, input_precision="ieee")
    if THIN:
        at = t + row.to(tl.int64)[:, None] * t_stride + r[None, :]
        tl.store(at, tl.sum(sums, axis=0).to(t.dtype.element_ty), mask=there[:, None] & (r[None, :] < rank))
    top = tl.maximum(tl.reduce(tops, 1, _larger), TINY * LEVELS, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale + row, top / LEVELS + top * 0.0, mask=there)  # NaN if anything is not finite
    by = tl.div_rn(tl.full((BM,), LEVELS, tl.float32), top)[:, None]
    last = (f - 1) // BC * BC
    for back in tl.range(0, f, BC, num_stages=STAGES):
        start = last - back
        column = start + tl.arange(0, BC)
        code = _activated(own, there, start, f, GATED, BC).to(tl.float32) * by
        to = codes + row.to(tl.int64)[:, None] * codes_stride + column[None, :]
        _store_codes(to, code, there[:, None] & (column[None, :] < f), True)


@triton.jit
def _activated(own, there, start, f, GATED: tl.constexpr, BC: tl.constexpr):
    """So many columns of the output from `start` on, in the type of x."""
    column = start + tl.arange(0, BC)[None, :]
    inside = there[:, None] & (column < f)
    value = tl.load(own + column, mask=inside, other=0).to(tl.float32)
    if GATED:
        y = value * _sigmoid(value) * tl.load(own + f + column, mask=inside, other=0).to(tl.float32)
    else:
        y = value * _sigmoid(_gate(value))
    return y.to(own.dtype.element_ty)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
