"""Norms and activations coded in the pass that makes them; a program holds a row. Definition: ops/coding.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.eight import LONGEST_ROW, _store_codes, code_rows_into
from octavo.kernels.pointwise import _gate, _normed, _sigmoid, _warps, gelu_into, norm_into, swiglu_into
from octavo.ops.eight import Coded
from octavo.ops.quantize import INT8_LEVELS

TINY = torch.finfo(torch.float32).tiny


def norm_coded_into(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, codes: Coded) -> None:
    m, d = x.shape
    width = triton.next_power_of_2(d)
    if width > LONGEST_ROW:
        norm_into(x, weight, bias, eps, out)
        code_rows_into(out, *codes, None)
        return
    _norm_coded[(m,)](
        x, weight, bias if bias is not None else weight, out, *codes, d, x.stride(0), out.stride(0),
        codes.codes.stride(0), eps, bias is not None, INT8_LEVELS, TINY, width, num_warps=_warps(width),
        enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _norm_coded(
    x, weight, bias, out, codes, scale, d, x_stride, out_stride, codes_stride, eps, CENTRED: tl.constexpr,
    LEVELS: tl.constexpr, TINY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    y = _normed(x + row * x_stride, weight, bias, d, eps, CENTRED, WIDTH).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, y, mask=column < d)
    _code_row(y, codes + row * codes_stride + column, scale + row, column < d, LEVELS, TINY)


def gelu_coded_into(x: Tensor, out: Tensor, codes: Coded) -> None:
    if triton.next_power_of_2(out.shape[1]) > LONGEST_ROW:
        gelu_into(x, out)
        code_rows_into(out, *codes, None)
    else:
        _activate(x, out, codes, gated=False)


def swiglu_coded_into(x: Tensor, out: Tensor, codes: Coded) -> None:
    if triton.next_power_of_2(out.shape[1]) > LONGEST_ROW:
        swiglu_into(x, out)
        code_rows_into(out, *codes, None)
    else:
        _activate(x, out, codes, gated=True)


def _activate(x: Tensor, out: Tensor, codes: Coded, *, gated: bool) -> None:
    m, f = out.shape
    width = triton.next_power_of_2(f)
    _activation_coded[(m,)](
        x, out, *codes, f, x.stride(0), out.stride(0), codes.codes.stride(0), gated, INT8_LEVELS, TINY, width,
        num_warps=_warps(width), enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit
def _activation_coded(
    x, out, codes, scale, f, x_stride, out_stride, codes_stride, GATED: tl.constexpr, LEVELS: tl.constexpr,
    TINY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < f
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if GATED:
        y = value * _sigmoid(value) * tl.load(x + row * x_stride + f + column, mask=inside, other=0).to(tl.float32)
    else:
        y = value * _sigmoid(_gate(value))
    y = y.to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, y, mask=inside)
    _code_row(y, codes + row * codes_stride + column, scale + row, inside, LEVELS, TINY)


@triton.jit
def _code_row(y, codes, scale, inside, LEVELS: tl.constexpr, TINY: tl.constexpr):
    """As kernels/eight.py codes a row."""
    value = y.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(value)), TINY * LEVELS)
    tl.store(scale, top / LEVELS + tl.sum(value * 0.0))  # NaN if anything is not finite; a maximum forgets NaN
    _store_codes(codes, value * tl.div_rn(LEVELS, top), inside, True)
