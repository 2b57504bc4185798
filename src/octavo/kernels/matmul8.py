"""8-bit matmuls on tensor cores, and the quantization and transposition around them. Reference: ops/matmul8.py.

The matmul is a persistent kernel: a program computes several tiles, and the copy engine (TMA) loads the next inputs
while the tensor cores work. Low-rank term, scales, bias and residual are added before a tile is rounded, so no (M, N)
tensor is read or written twice. GPUs without TMA load by address, which Triton pipelines as well. Hopper has
a separate kernel, hopper/matmul8.py; Turing multiplies by cuBLAS, matmul8_cublas.py.

Legend as in the reference; a tile is (BM, BN) of the result, with BK inputs a stage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.hardware.capabilities import Capabilities, capabilities_of
from octavo.kernels import matmul8_cublas
from octavo.ops.matmul8 import FP8_LARGEST, GROUP_SIZE, LowRankTerm
from octavo.ops.scheme import INT8_LEVELS
from octavo.runtime.dispatch import KERNELS, hopper_kernels_run_on


class Tile(NamedTuple):
    """Tile sizes of a matmul program: rows, columns, and inputs of each stage."""

    rows: int
    columns: int
    inputs: int
    warps: int
    stages: int


SHORT = Tile(128, 256, 128, 8, 3)  # 2-byte results: the fastest of 14 on GPT-J's shapes (one H100, docs/log.md)
# 2-byte results with a scale for each group, which needs two accumulators; and all GPUs but Hopper, for which it is
# compiled in tests, but was not measured. It takes 96 KiB of the 99 of shared memory that a program of RTX 30 to 50
# has. For B200 Triton 3.7.1 compiles SHORT with fp8 into nothing but a trap, and with int8 registers spill.
LITTLE = Tile(128, 128, 128, 8, 3)
LONG = Tile(64, 64, 128, 4, 3)  # float32 results, which only tests use
LOW_RANK_BYTES = 128  # bytes of a row of the low-rank term in shared memory, in addition to three stages of the matmul
GROUP_M = 8  # consecutive tiles of one column, so that they read the same weights from cache
LONGEST_ROW = 16384  # elements of a row in registers; GPT-J's 28,672: 0.72 ms that way, 0.55 read twice (H100, fp8)
PIECE = 4096  # elements of a longer row in registers at once
SIDE = 128  # rows and columns that one program transposes
TINY = torch.finfo(torch.float32).tiny


def matmul_8bit_into(
    quantized: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None = None,
    bias: Tensor | None = None,
    bias_start: int = 0,
    low_rank: LowRankTerm | None = None,
    residual: Tensor | None = None,
) -> None:
    if low_rank is not None:
        low_rank = LowRankTerm(*map(readable, low_rank))
    if hopper_kernels_run_on(out):
        from octavo.kernels.hopper import matmul8

        if matmul8.fits(out, scale):
            matmul8.matmul_8bit_into(quantized, scale, weight, out, absmax, bias, bias_start, low_rank, residual)
            return
    capabilities = capabilities_of(out.device)
    if not capabilities.triton_dots:
        arguments = quantized, scale, weight, out, absmax, bias, bias_start, low_rank, residual
        if matmul8_cublas.fits(capabilities, quantized, scale):
            matmul8_cublas.matmul_8bit_into(*arguments)
        else:
            KERNELS["matmul8.matmul_8bit_into"](*arguments)
        return
    (m, k), n = quantized.shape, len(weight)
    groups = scale.ndim == 2
    tile, tma = tile_for(capabilities, out.itemsize, groups=groups), capabilities.tma
    # The last two matrices are placeholders without a low-rank term.
    read, count, width = [quantized, weight, quantized, weight], 0, tile.inputs
    if low_rank is not None:
        count = low_rank.t.shape[1]
        width = min(LOW_RANK_BYTES // out.itemsize, max(16, triton.next_power_of_2(count)))
        read[2:] = low_rank
    shapes = [(high, wide) for wide in (tile.inputs, width) for high in (tile.rows, tile.columns)]
    sources = [
        TensorDescriptor.from_tensor(x, list(shape)) if tma else x for x, shape in zip(read, shapes, strict=True)
    ]
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    programs = min(tiles, capabilities.processors)
    _matmul_8bit[(programs,)](
        *sources, *(x.stride(0) for x in read), out,
        scale, absmax if absmax is not None else scale, bias if bias is not None else scale, bias_start,
        bias_start + (bias.numel() if bias is not None else 0), residual if residual is not None else out,
        m, n, k, out.stride(0), residual.stride(0) if residual is not None else 0, scale.stride(0), programs,
        tma, quantized.dtype == torch.int8, GROUP_SIZE if groups else 0, absmax is not None, bias is not None, count,
        width, residual is not None, INT8_LEVELS, *tile[:3], GROUP_M, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def readable(x: Tensor) -> Tensor:
    """x (.., C) for TMA: a copy if its rows do not start at multiples of 16 bytes."""
    multiple = 16 // x.itemsize  # elements
    if x.data_ptr() % 16 == 0 and x.stride(0) % multiple == 0 and x.stride(1) == 1:
        return x
    copied = x.new_empty(len(x), -(-x.shape[1] // multiple) * multiple)[:, : x.shape[1]]
    return copied.copy_(x)


def tile_for(capabilities: Capabilities, itemsize: int, *, groups: bool) -> Tile:
    """The tile for results of so many bytes an element; `groups`: rows have a scale for each group."""
    if itemsize > 2:
        return LONG
    return SHORT if capabilities.hopper_kernels and not groups else LITTLE


@triton.jit
def _matmul_8bit(
    inputs, weights, t, b, inputs_stride, weights_stride, t_stride, b_stride,
    out, scale, absmax, bias, bias_start, bias_stop, residual, m, n, k, out_stride, residual_stride, scale_stride,
    programs,
    TMA: tl.constexpr, INT8: tl.constexpr, GROUP_SIZE: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr, RANK_WIDTH: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    high, wide = tl.cdiv(m, BM), tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), high * wide, programs, flatten=True):
        band = tile // (GROUP_M * wide) * GROUP_M
        tall = tl.minimum(high - band, GROUP_M)
        top = (band + tile % (GROUP_M * wide) % tall) * BM
        left = tile % (GROUP_M * wide) // tall * BN
        row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
        if GROUP_SIZE:
            y = tl.zeros((BM, BN), dtype=tl.float32)
            for start in range(0, k, BK):
                x = _read(inputs, inputs_stride, top, start, m, k, TMA, BM, BK)
                weight = _read(weights, weights_stride, left, start, n, k, TMA, BN, BK)
                part = tl.dot(x, weight.T, out_dtype=tl.int32).to(tl.float32)
                y += part * tl.load(scale + row * scale_stride + start // GROUP_SIZE, mask=row < m, other=0)[:, None]
        else:
            total = tl.zeros((BM, BN), dtype=tl.int32 if INT8 else tl.float32)
            for start in range(0, k, BK):
                x = _read(inputs, inputs_stride, top, start, m, k, TMA, BM, BK)
                weight = _read(weights, weights_stride, left, start, n, k, TMA, BN, BK)
                total = tl.dot(x, weight.T, total, out_dtype=tl.int32 if INT8 else tl.float32)
            y = total.to(tl.float32) * tl.load(scale + row, mask=row < m, other=0)[:, None]
        if SCALED:
            y *= (tl.load(absmax + column, mask=column < n, other=0) / LEVELS)[None, :]
        if BIAS:
            there = (column >= bias_start) & (column < bias_stop)
            y += tl.load(bias + column - bias_start, mask=there, other=0)[None, :]
        if LOW_RANK:
            for first in tl.range(0, LOW_RANK, RANK_WIDTH, num_stages=1):
                t_tile = _read(t, t_stride, top, first, m, LOW_RANK, TMA, BM, RANK_WIDTH)
                b_tile = _read(b, b_stride, left, first, n, LOW_RANK, TMA, BN, RANK_WIDTH)
                y = tl.dot(t_tile, b_tile.T, y, input_precision="ieee")
        inside = (row[:, None] < m) & (column[None, :] < n)
        if RESIDUAL:
            at = residual + row[:, None].to(tl.int64) * residual_stride + column[None, :]
            y += tl.load(at, mask=inside, other=0).to(tl.float32)
        # A plain store: a TMA store needs shared memory, which would cost a stage or half of the tile.
        at = out + row[:, None].to(tl.int64) * out_stride + column[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _read(source, stride, top, left, rows, columns, TMA: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """A tile (HIGH, WIDE) of a matrix, zeros outside of the matrix."""
    if TMA:
        tile = source.load([top, left])
    else:
        row, column = top + tl.arange(0, HIGH)[:, None], left + tl.arange(0, WIDE)[None, :]
        inside = (row < rows) & (column < columns)
        tile = tl.load(source + row.to(tl.int64) * stride + column, mask=inside, other=0.0)
    return tile


def quantize_rows_into(x: Tensor, quantized: Tensor, scale: Tensor, prescale: Tensor | None) -> None:
    m, k = x.shape
    groups = scale.shape[1] if scale.ndim == 2 else 0
    scaled = prescale is not None
    factor = prescale if prescale is not None else scale
    width = triton.next_power_of_2(groups * GROUP_SIZE or k)
    if width > LONGEST_ROW and not groups:
        _quantize_long_rows[(m,)](
            x, quantized, scale, factor, k, x.stride(0), quantized.stride(0), scaled,
            quantized.dtype == torch.int8, INT8_LEVELS, FP8_LARGEST, TINY, PIECE, num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
        return
    _quantize_rows[(m,)](
        x, quantized, scale, factor, k, groups, x.stride(0), quantized.stride(0), scaled,
        quantized.dtype == torch.int8, INT8_LEVELS, FP8_LARGEST, TINY, width, GROUP_SIZE if groups else 0,
        num_warps=4 if width <= 2048 else 8 if width <= 8192 else 16, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _quantize_rows(
    x, quantized, scale, prescale, k, groups, x_stride, quantized_stride, PRESCALE: tl.constexpr, INT8: tl.constexpr,
    LEVELS: tl.constexpr, FP8_LARGEST: tl.constexpr, TINY: tl.constexpr, WIDTH: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < k
    value = _prescaled(x + row * x_stride, prescale, 0, k, PRESCALE, LEVELS, WIDTH)
    largest: tl.constexpr = LEVELS if INT8 else FP8_LARGEST
    if GROUP_SIZE:
        parts = tl.reshape(value, (WIDTH // GROUP_SIZE, GROUP_SIZE))
        top = tl.maximum(tl.max(tl.abs(parts), axis=1), TINY * largest)
        span = tl.arange(0, WIDTH // GROUP_SIZE)
        tl.store(scale + row * groups + span, top / largest + tl.sum(parts * 0.0, axis=1), mask=span < groups)
        code = tl.reshape(parts * tl.div_rn(largest, top)[:, None], (WIDTH,))
    else:
        top = tl.maximum(tl.max(tl.abs(value)), TINY * largest)
        finite = tl.sum(value * 0.0)  # NaN if any value is not finite: the maximum ignores NaN
        tl.store(scale + row, top / largest + finite)
        code = value * tl.div_rn(largest, top)
    _store_quantized(quantized + row * quantized_stride + column, code, inside, INT8)


@triton.jit
def _store_quantized(to, code, inside, INT8: tl.constexpr):
    if INT8:
        code = (code + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
    tl.store(to, code.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_long_rows(
    x, quantized, scale, prescale, k, x_stride, quantized_stride, PRESCALE: tl.constexpr, INT8: tl.constexpr,
    LEVELS: tl.constexpr,
    FP8_LARGEST: tl.constexpr, TINY: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    # Reads a row twice, the second time from cache: with a whole row in registers one program fills a multiprocessor.
    row = tl.program_id(0).to(tl.int64)
    largest: tl.constexpr = LEVELS if INT8 else FP8_LARGEST
    tops, finite = tl.zeros((PIECE,), dtype=tl.float32), tl.zeros((PIECE,), dtype=tl.float32)
    for start in range(0, k, PIECE):
        value = _prescaled(x + row * x_stride, prescale, start, k, PRESCALE, LEVELS, PIECE)
        tops, finite = tl.maximum(tops, tl.abs(value)), finite + value * 0.0
    top = tl.maximum(tl.max(tops), TINY * largest)
    tl.store(scale + row, top / largest + tl.sum(finite))
    for start in range(0, k, PIECE):
        code = _prescaled(x + row * x_stride, prescale, start, k, PRESCALE, LEVELS, PIECE) * tl.div_rn(largest, top)
        column = start + tl.arange(0, PIECE)
        _store_quantized(quantized + row * quantized_stride + column, code, column < k, INT8)


@triton.jit
def _prescaled(x, prescale, start, k, PRESCALE: tl.constexpr, LEVELS: tl.constexpr, PIECE: tl.constexpr):
    """PIECE elements of a row from `start` on in float32, times the prescale."""
    column = start + tl.arange(0, PIECE)
    value = tl.load(x + column, mask=column < k, other=0).to(tl.float32)
    if PRESCALE:
        value *= tl.load(prescale + column, mask=column < k, other=0) / LEVELS
    return value


def transpose_into(weight: Tensor, out: Tensor) -> None:
    n, k = weight.shape
    _transpose[(triton.cdiv(n, SIDE), triton.cdiv(k, SIDE))](
        weight, out, n, k, weight.stride(0), out.stride(0), SIDE, num_warps=8
    )


@triton.jit
def _transpose(weight, out, n, k, weight_stride, out_stride, SIDE: tl.constexpr):
    row, column = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row[:, None] < n) & (column[None, :] < k)
    code = tl.load(weight + row[:, None].to(tl.int64) * weight_stride + column[None, :], mask=inside, other=0)
    value = tl.trans(code).to(tl.float32).to(out.dtype.element_ty)
    place = out + column[:, None].to(tl.int64) * out_stride + row[None, :]
    tl.store(place, value, mask=tl.trans(inside))
