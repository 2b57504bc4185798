"""Dequantization of 4-bit weights, at memory bandwidth. Reference: ops/quantize4.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.quantize4 import NESTED_BLOCK, NF4_BLOCK, NF4_CODE
from octavo.ops.scheme import INT8_LEVELS

TINY = torch.finfo(torch.float32).tiny
WIDTH = 4096  # columns that one program writes


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


def nf4_double_into(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor, code: Tensor, out: Tensor
) -> None:
    n, k = out.shape
    grid = (n, triton.cdiv(k, WIDTH))
    _nf4_double[grid](
        codes, absmax, nested_absmax, nested_offset, code, _code(codes.device), out, k, out.stride(0),
        k % NF4_BLOCK == 0, NF4_BLOCK, NESTED_BLOCK, WIDTH, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _nf4_double(
    codes, absmax, nested_absmax, nested_offset, code, levels, out, k, out_stride, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if WHOLE:  # rows are whole blocks: each scale is dequantized once, each byte is loaded once
        block = tl.program_id(1) * (WIDTH // BLOCK) + tl.arange(0, WIDTH // BLOCK)  # (WIDTH / 64,)
        inside = block < k // BLOCK
        flat = row * (k // BLOCK) + block
        scale = _double_scale(absmax, nested_absmax, nested_offset, code, flat, inside, NESTED)[:, None]
        pair = flat[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]  # (WIDTH / 64, 32)
        byte = tl.load(codes + pair, mask=inside[:, None], other=0).to(tl.int32)
        value = tl.interleave(tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale)
        column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # (WIDTH / 64, 64)
        tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = column < k
        flat = row * k + column
        byte = tl.load(codes + (flat >> 1), mask=inside, other=0).to(tl.int32)
        level = tl.where((flat & 1) == 0, byte >> 4, byte & 15)
        scale = _double_scale(absmax, nested_absmax, nested_offset, code, flat // BLOCK, inside, NESTED)
        value = tl.load(levels + level, mask=inside) * scale
        tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _double_scale(absmax, nested_absmax, nested_offset, code, block, inside, NESTED: tl.constexpr):
    # The float32 scales of nf4 of some blocks of 64. Two roundings, as in bitsandbytes.
    quantized = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
    nested = tl.load(nested_absmax + block // NESTED, mask=inside, other=0)
    return tl.load(code + quantized) * nested + tl.load(nested_offset + block // NESTED, mask=inside, other=0)


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
