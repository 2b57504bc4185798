"""Dequantization of weights to a 2-byte dtype, at memory bandwidth. Reference: ops/quantize.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.quantize import DYNAMIC8_BLOCK, INT8_LEVELS, NF4_BLOCK, NF4_CODE

TINY = torch.finfo(torch.float32).tiny
WIDTH = 4096  # columns that one program writes


def int8_into(weight: Tensor, absmax: Tensor, out: Tensor) -> None:
    n, k = out.shape
    scale = absmax / INT8_LEVELS
    _int8[(n, triton.cdiv(k, WIDTH))](weight, scale, out, k, weight.stride(0), out.stride(0), WIDTH, num_warps=8)


@triton.jit
def _int8(weight, scale, out, k, weight_stride, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < k
    value = tl.load(weight + row * weight_stride + column, mask=inside, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def int8_values_into(weight: Tensor, step: float, out: Tensor) -> None:
    n, k = out.shape
    _int8_values[(n, triton.cdiv(k, WIDTH))](weight, step, out, k, weight.stride(0), out.stride(0), WIDTH, num_warps=8)


@triton.jit(do_not_specialize=["step"])
def _int8_values(weight, step, out, k, weight_stride, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < k
    value = tl.load(weight + row * weight_stride + column, mask=inside, other=0).to(tl.float32) * step
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def dynamic8_into(codes: Tensor, absmax: Tensor, code: Tensor, out: Tensor) -> None:
    n, k = out.shape
    grid = (n, triton.cdiv(k, WIDTH))
    _dynamic8[grid](codes, absmax, code, out, k, out.stride(0), DYNAMIC8_BLOCK, WIDTH, num_warps=8)


@triton.jit
def _dynamic8(codes, absmax, code, out, k, out_stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < k
    flat = row * k + column
    byte = tl.load(codes + flat, mask=inside, other=0).to(tl.int32)
    value = tl.load(code + byte, mask=inside) * tl.load(absmax + flat // BLOCK, mask=inside)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def nf4_into(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    n, k = out.shape
    grid = (n, triton.cdiv(k, WIDTH))
    _nf4[grid](codes, absmax, _code(codes.device), out, k, out.stride(0), k % 2 == 0, NF4_BLOCK, WIDTH, num_warps=8)


@triton.jit
def _nf4(codes, absmax, code, out, k, out_stride, EVEN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < k
    if EVEN:
        value = _pairs(codes, absmax, code, row, k, BLOCK, WIDTH)
    else:  # rows may start within a byte: each byte is loaded twice, the second time from cache
        flat = row * k + column
        byte = tl.load(codes + (flat >> 1), mask=inside, other=0).to(tl.int32)
        level = tl.where((flat & 1) == 0, byte >> 4, byte & 15)
        value = tl.load(code + level, mask=inside) * tl.load(absmax + flat // BLOCK, mask=inside)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pairs(codes, absmax, code, row, k, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    # Dequantizes WIDTH columns of a row that starts at a byte: each byte is loaded once and gives two values.
    pair = (tl.program_id(1) * WIDTH) // 2 + tl.arange(0, WIDTH // 2)
    inside = pair < k // 2
    flat = row * (k // 2) + pair
    byte = tl.load(codes + flat, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + flat // (BLOCK // 2), mask=inside, other=0)
    return tl.interleave(tl.load(code + (byte >> 4)) * scale, tl.load(code + (byte & 15)) * scale)


def nf4_as_int8_into(codes: Tensor, absmax: Tensor, row_absmax: Tensor, out: Tensor) -> None:
    n, k = out.shape
    grid = (n, triton.cdiv(k, WIDTH))
    _nf4_as_int8[grid](
        codes, absmax, row_absmax, _code(codes.device), out, k, out.stride(0), NF4_BLOCK, INT8_LEVELS, TINY, WIDTH,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _nf4_as_int8(
    codes, absmax, row_absmax, code, out, k, out_stride, BLOCK: tl.constexpr, LEVELS: tl.constexpr,
    TINY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    levels: tl.constexpr = LEVELS * 1.0
    value = _pairs(codes, absmax, code, row, k, BLOCK, WIDTH)
    value *= tl.div_rn(levels, tl.maximum(tl.load(row_absmax + row), TINY))
    value = (value + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, ties to even
    tl.store(out + row * out_stride + column, value.to(tl.int8), mask=column < k)


_code_tables: dict[torch.device, Tensor] = {}


def _code(device: torch.device) -> Tensor:
    if device not in _code_tables:
        _code_tables[device] = torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
    return _code_tables[device]
