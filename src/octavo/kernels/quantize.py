"""Dequantization of weights to a 2-byte dtype, at memory bandwidth. Reference: ops/quantize.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.quantize import DYNAMIC8_BLOCK
from octavo.ops.scheme import INT8_LEVELS

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
