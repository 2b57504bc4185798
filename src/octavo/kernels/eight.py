"""Products in 8 bits on the tensor cores, and the passes over memory around them. Definitions: ops/eight.py.

A program of the product goes from tile to tile; the copy engine brings the next inputs while the tensor cores work.
Thin product, scales, bias and what is added onto join before a tile is rounded, so that nothing of (M, N) is read or
written twice. On cards without a copy engine Triton makes ordinary loads of the descriptors.

Legend as there; a tile is (BM, BN) of the result.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.ops.eight import FP8_LARGEST, Beside
from octavo.ops.quantize import INT8_LEVELS

BM, BN, BK = 128, 128, 128
GROUP = 8  # tiles of a column that follow each other, so that they find the same weights in cache
SIDE = 128  # of the square that one program transposes
TINY = torch.finfo(torch.float32).tiny


def product_into(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None = None,
    bias: Tensor | None = None,
    bias_start: int = 0,
    beside: Beside | None = None,
    onto: Tensor | None = None,
) -> None:
    (m, k), n = codes.shape, len(weight)
    inputs, weights = _described(codes, BM, BK), _described(weight, BN, BK)
    thin, width = (inputs, weights), 0
    if beside is not None:
        width = max(16, triton.next_power_of_2(beside.t.shape[1]))
        thin = tuple(_described(_readable(x), rows, width) for x, rows in zip(beside, (BM, BN), strict=True))
    tiles = triton.cdiv(m, BM) * triton.cdiv(n, BN)
    programs = min(tiles, _multiprocessors(codes.device))
    _product[(programs,)](
        inputs, weights, _described(out, BM, BN), *thin,
        scale, absmax if absmax is not None else scale, bias if bias is not None else scale, bias_start,
        bias_start + (bias.numel() if bias is not None else 0), onto if onto is not None else out,
        m, n, k, onto.stride(0) if onto is not None else 0, programs,
        codes.dtype == torch.int8, absmax is not None, bias is not None, width, onto is not None, INT8_LEVELS,
        BM, BN, BK, GROUP, num_warps=8, num_stages=4,
    )  # fmt: skip


def _described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, columns])


def _readable(x: Tensor) -> Tensor:
    """x (.., C), copied where its rows do not start at a multiple of 16 bytes."""
    each = 16 // x.itemsize
    if x.data_ptr() % 16 == 0 and x.stride(0) % each == 0 and x.stride(1) == 1:
        return x
    copied = x.new_empty(len(x), -(-x.shape[1] // each) * each)[:, : x.shape[1]]
    return copied.copy_(x)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _product(
    inputs, weights, out, t, b, scale, absmax, bias, bias_start, bias_stop, onto, m, n, k, onto_stride, programs,
    INT8: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BESIDE: tl.constexpr, ONTO: tl.constexpr,
    LEVELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(m, BM), tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        band = tile // (GROUP * wide) * GROUP
        tall = tl.minimum(high - band, GROUP)
        top = (band + tile % (GROUP * wide) % tall) * BM
        left = tile % (GROUP * wide) // tall * BN
        total = tl.zeros((BM, BN), dtype=tl.int32 if INT8 else tl.float32)
        for start in range(0, k, BK):
            own, weight = inputs.load([top, start]), weights.load([left, start])
            total = tl.dot(own, weight.T, total, out_dtype=tl.int32 if INT8 else tl.float32)
        row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
        y = total.to(tl.float32) * tl.load(scale + row, mask=row < m, other=0)[:, None]
        if SCALED:
            y *= (tl.load(absmax + column, mask=column < n, other=0) / LEVELS)[None, :]
        if BIAS:
            there = (column >= bias_start) & (column < bias_stop)
            y += tl.load(bias + column - bias_start, mask=there, other=0)[None, :]
        if BESIDE:
            y = tl.dot(t.load([top, 0]), b.load([left, 0]).T, y, input_precision="ieee")
        if ONTO:
            at = onto + row[:, None].to(tl.int64) * onto_stride + column[None, :]
            y += tl.load(at, mask=(row[:, None] < m) & (column[None, :] < n), other=0).to(tl.float32)
        out.store([top, left], y.to(out.dtype))


def code_rows_into(x: Tensor, codes: Tensor, scale: Tensor, fold: Tensor | None) -> None:
    m, k = x.shape
    width = triton.next_power_of_2(k)
    _code_rows[(m,)](
        x, codes, scale, fold if fold is not None else scale, k, x.stride(0), codes.stride(0), fold is not None,
        codes.dtype == torch.int8, INT8_LEVELS, FP8_LARGEST, TINY, width,
        num_warps=4 if width <= 2048 else 8 if width <= 8192 else 16,
    )  # fmt: skip


@triton.jit
def _code_rows(
    x, codes, scale, fold, k, x_stride, codes_stride, FOLD: tl.constexpr, INT8: tl.constexpr, LEVELS: tl.constexpr,
    FP8_LARGEST: tl.constexpr, TINY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < k
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if FOLD:
        value *= tl.load(fold + column, mask=inside, other=0) / LEVELS
    largest: tl.constexpr = LEVELS if INT8 else FP8_LARGEST
    top = tl.maximum(tl.max(tl.abs(value)), TINY * largest)
    finite = tl.sum(value * 0.0)  # NaN if anything is not finite; a maximum forgets NaN
    code = value * tl.div_rn(largest, top)
    if INT8:
        code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: the nearest whole number, halves to even
    tl.store(codes + row * codes_stride + column, code.to(codes.dtype.element_ty), mask=inside)
    tl.store(scale + row, top / largest + finite)


def transpose_into(codes: Tensor, out: Tensor) -> None:
    n, k = codes.shape
    _transpose[(triton.cdiv(n, SIDE), triton.cdiv(k, SIDE))](
        codes, out, n, k, codes.stride(0), out.stride(0), SIDE, num_warps=8
    )


@triton.jit
def _transpose(codes, out, n, k, codes_stride, out_stride, SIDE: tl.constexpr):
    row, column = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row[:, None] < n) & (column[None, :] < k)
    code = tl.load(codes + row[:, None].to(tl.int64) * codes_stride + column[None, :], mask=inside, other=0)
    value = tl.trans(code).to(tl.float32).to(out.dtype.element_ty)
    place = out + column[:, None].to(tl.int64) * out_stride + row[None, :]
    tl.store(place, value, mask=tl.trans(inside))
