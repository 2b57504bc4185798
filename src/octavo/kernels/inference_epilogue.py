"""What follows the sum of a matmul of inference: split sums added up, scale, bias, LoRA terms and residual.

Shared by the kernels with dots (inference.py) and without (inference_dotless.py). Legend as in kernels/inference.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.inference import BatchedLora
from octavo.ops.scheme import INT8_LEVELS

# With fusion a multiplication and the addition after it may become one instruction (FMA) with one rounding, but only in
# variants of a kernel with no operation between the two: adapters in the batch would change the bits of base rows.
EXACT = {"enable_fp_fusion": False}
ADD_WIDTH = 128  # outputs of a program of `_add_parts`: one a thread, so that loads of adapters overlap


class Epilogue(NamedTuple):
    """The arguments of an epilogue as kernels take them: tensors and sizes; constants (BIAS, R, RESIDUAL); LEVELS."""

    arguments: tuple[object, ...]
    has: tuple[object, ...]
    levels: int


def epilogue_of(
    x: Tensor, n: int, absmax: Tensor | None, bias: Tensor | None, bias_start: int, lora: BatchedLora | None,
    residual: Tensor | None,
) -> Epilogue:  # fmt: skip
    """x stands for tensors that are not given: a kernel does not read them."""
    assert lora is None or lora.adapter_ids.is_contiguous()
    assert lora is None or lora.b.numel() < 2**31  # offsets in B are 32-bit integers: 64-bit offsets spill registers
    arguments = (
        absmax if absmax is not None else x, bias if bias is not None else x, bias_start,
        bias_start + (bias.numel() if bias is not None else 0),
        *((lora.t, lora.b, lora.adapter_ids, lora.names) if lora is not None else (x,) * 4),
        residual if residual is not None else x, lora.t.shape[1] if lora is not None else 0,
        len(lora.b) if lora is not None else 0, n, residual.stride(0) if residual is not None else 0,
    )  # fmt: skip
    has = bias is not None, lora.b.shape[1] if lora is not None else 0, residual is not None
    return Epilogue(arguments, has, INT8_LEVELS if absmax is not None else 0)


def split(n: int, k: int, *, strip: int, width: int, programs: int) -> tuple[int, int]:
    """(number of partial sums, inputs of each) of a weight (n, k), in strips of outputs and tiles of `width` inputs.

    A function of the weight's shape alone; as many as give the GPU `programs` to run.
    """
    parts = max(1, min(programs // triton.cdiv(n, strip), k // (4 * width)))
    span = triton.cdiv(triton.cdiv(k, parts), width) * width
    return triton.cdiv(k, span), span


def add_parts(sums: Tensor, out: Tensor, after: Epilogue) -> None:
    """out (M, N) from partial sums (parts, M, N), in the order of the parts."""
    parts, m, n = sums.shape
    _add_parts[(m, triton.cdiv(n, ADD_WIDTH))](
        sums, out, *after.arguments, m, parts, *after.has, after.levels, ADD_WIDTH, num_warps=4, **EXACT
    )


@triton.jit
def finish(
    total, row, strip, sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names, residual,
    j, adapters, m, n, residual_stride,
    BIAS: tl.constexpr, R: tl.constexpr, RESIDUAL: tl.constexpr, PARTED: tl.constexpr, LEVELS: tl.constexpr,
    BETWEEN: tl.constexpr,
):  # fmt: skip
    # Stores a tile: a partial sum, or the result with scale, bias, adapters and residual.
    at = row[:, None].to(tl.int64) * n + strip[None, :]
    inside = (row[:, None] < m) & (strip[None, :] < n)
    if PARTED:
        tl.store(sums + tl.program_id(1).to(tl.int64) * m * n + at, total, mask=inside)
    else:
        total = _add_terms(
            total, row[:, None], strip[None, :], inside, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids,
            names, residual, j, adapters, m, n, residual_stride, BIAS, R, RESIDUAL, LEVELS, BETWEEN,
        )  # fmt: skip
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "j", "adapters", "parts", "bias_start", "bias_stop"])
def _add_parts(
    sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names, residual,
    j, adapters, n, residual_stride, m, parts,
    BIAS: tl.constexpr, R: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < n
    total = tl.zeros((1, WIDTH), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(sums + (part * m + row) * n + column, mask=inside, other=0)
    total = _add_terms(
        total, row, column, inside, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names,
        residual, j, adapters, m, n, residual_stride, BIAS, R, RESIDUAL, LEVELS, 0,
    )  # fmt: skip
    tl.store(out + row * n + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_terms(
    total, row, column, inside, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names, residual,
    j, adapters, m, n, residual_stride,
    BIAS: tl.constexpr, R: tl.constexpr, RESIDUAL: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    if LEVELS:
        total *= tl.load(absmax + column, mask=column < n, other=0) / LEVELS
    if BIAS:
        total += tl.load(bias + column - bias_start, mask=(column >= bias_start) & (column < bias_stop), other=0)
    if BETWEEN:
        total = _add_lora(total, row, column, lora_t, b, adapter_ids, names, j, adapters, m, n, R, BETWEEN)
    elif R:
        number = tl.load(adapter_ids + row, mask=row < m, other=0).to(tl.int32)
        name = tl.load(names + column, mask=column < n, other=0)
        live = inside & (number > 0)
        for start in range(0, R, 16):
            for step in tl.static_range(16):  # unrolled, so that the loads overlap
                r = start + step
                t = tl.load(lora_t + row * j + name * R + r, mask=live & (r < R), other=0)
                factor = tl.load(b + (number * R + r) * n + column, mask=live & (r < R), other=0)
                total += t * factor.to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual + row * residual_stride + column, mask=inside, other=0).to(tl.float32)
    return total


@triton.jit
def _add_lora(
    total, row, column, lora_t, b, adapter_ids, names, j, adapters, m, n, R: tl.constexpr, BETWEEN: tl.constexpr
):  # fmt: skip
    # One low-rank GEMM for each adapter of the tile's rows, with zeros in the rows of other adapters.
    line = tl.arange(0, BETWEEN)
    number = tl.load(adapter_ids + row, mask=row < m, other=0).to(tl.int32)
    t = tl.load(lora_t + row * j + line[None, :], mask=(row < m) & (line[None, :] < j), other=0)
    reads = (line[:, None] // R == tl.load(names + column, mask=column < n, other=-1)) & (column < n)
    lowest = tl.min(tl.min(tl.where(number > 0, number, adapters), axis=1), axis=0)  # 0 is the base
    highest = tl.max(tl.max(number, axis=1), axis=0)
    for adapter in range(lowest, highest + 1):
        through = number == adapter
        if tl.max(tl.max(through.to(tl.int32), axis=1), axis=0) > 0:
            factor = tl.load(b + (adapter * R + line[:, None] % R) * n + column, mask=reads, other=0)
            part = tl.where(through, t, 0).to(factor.dtype)
            # 0 * inf is NaN: an adapter with values that are not finite must not change rows of other adapters.
            total = tl.where(through, tl.dot(part, factor, total, input_precision="ieee"), total)
    return total
