"""One step of Adam with 8-bit moments; all operands are read and written once. Reference: ops/adam.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.adam import BLOCK, TINY, Moments, Rates
from octavo.ops.dynamic import LOWEST, SHIFT, ZERO, levels

ROWS, WARPS = 2, 4  # quantization blocks and warps of a program: the fastest of ten (one H100)


def adam8_(values: Tensor, gradient: Tensor, moments: Moments, factor: Tensor, rates: Rates) -> None:
    signed, unsigned = (levels(values.device, signed=sign) for sign in (True, False))
    n = values.numel()
    _adam8[(triton.cdiv(n, ROWS * BLOCK),)](
        values, gradient, *moments, factor, *signed, *unsigned, n, len(signed.starts) - 1,
        rates.beta_1, 1 - rates.beta_1, rates.beta_2, 1 - rates.beta_2, rates.eps, rates.keep, rates.size, rates.root,
        BLOCK, ROWS, TINY, SHIFT, LOWEST, ZERO, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "last"])
def _adam8(
    values, gradient, first, second, first_absmax, second_absmax, factor,
    signed, signed_edges, signed_starts, unsigned, unsigned_edges, unsigned_starts, n, last,
    beta_1, fresh_1, beta_2, fresh_2, eps, keep, size, root,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TINY: tl.constexpr,
    SHIFT: tl.constexpr, LOWEST: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = tl.minimum(n - start, ROWS * BLOCK).to(tl.int32)  # elements of this program
    row = tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, blocks = at < left, row * BLOCK < left
    values, gradient, first, second = values + start, gradient + start, first + start, second + start
    first_absmax, second_absmax = first_absmax + start // BLOCK, second_absmax + start // BLOCK
    grad = tl.load(gradient + at, mask=inside, other=0) * tl.load(factor)
    m = _dequantized(first + at, first_absmax + row, signed, inside, blocks) * beta_1 + grad * fresh_1
    v = _dequantized(second + at, second_absmax + row, unsigned, inside, blocks) * beta_2 + grad * grad * fresh_2
    value = tl.load(values + at, mask=inside, other=0) * keep - size * m / (tl.sqrt(v) / root + eps)
    tl.store(values + at, value, mask=inside)
    level = _nearest(m, first_absmax + row, signed_edges, signed_starts, blocks, last, TINY, SHIFT, LOWEST)
    quantized = tl.maximum(tl.where(m < 0, ZERO - level, ZERO + level), 0)
    tl.store(first + at, quantized.to(tl.uint8), mask=inside)
    level = _nearest(v, second_absmax + row, unsigned_edges, unsigned_starts, blocks, last, TINY, SHIFT, LOWEST)
    tl.store(second + at, tl.maximum(level, (v > 0).to(tl.int32)).to(tl.uint8), mask=inside)


@triton.jit
def _dequantized(quantized, absmax, values, inside, blocks):
    # A quantized 0 has a nonzero value in the signed data type, so `inside` masks the result too.
    index = tl.load(quantized, mask=inside, other=0).to(tl.int32)
    return tl.where(inside, tl.load(values + index) * tl.load(absmax, mask=blocks, other=0)[:, None], 0)


@triton.jit
def _nearest(
    moment, absmax, edges, starts, blocks, last, TINY: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr
):  # fmt: skip
    # The index of the nearest quantized magnitude for each element; stores the absmax of its block.
    magnitude = tl.abs(moment)
    largest = tl.max(magnitude, axis=1)
    tl.store(absmax, largest, mask=blocks)
    share = magnitude * tl.div_rn(1.0, tl.maximum(largest, TINY))[:, None]
    alike = tl.minimum(tl.maximum((share.to(tl.int32, bitcast=True) >> SHIFT) - LOWEST, 0), last)
    level = tl.load(starts + alike).to(tl.int32)
    return level + (share > tl.load(edges + level)).to(tl.int32)
