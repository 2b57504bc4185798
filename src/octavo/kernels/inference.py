"""Matmuls of inference, batch-invariant: the sums of a row have one order for any number of rows.

Reference: ops/inference.py; reasons: docs/design/batch-invariance.md. A program computes a strip of outputs for a tile
of rows. If strips alone would leave multiprocessors idle, several programs split the sum of a strip (split-K), and a
second kernel adds their partial sums in one order; their number depends on the weight's shape alone. Hopper has two
matmul instructions, whose sums differ in the last bits. Decode uses `mma`, in dots of up to 32 rows, for any number of
rows, since it is the faster one for few rows. Prefill uses `wgmma`, and so does decode of many rows if its
sums may have any order (DECODE_ANY_ORDER). Within one instruction the tile size does not change the order of sums.

Legend as in the reference. `*_stride` is the stride of a row in elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.hardware.capabilities import capabilities_of
from octavo.kernels import inference_dotless
from octavo.kernels.inference_epilogue import EXACT, add_parts, epilogue_of, finish, split
from octavo.ops.inference import BatchedLora
from octavo.ops.tiles import Phase

PROGRAMS = 256  # programs that occupy a GPU: two for each multiprocessor of an H100
STRIP, WIDTH = 64, 128  # outputs and inputs of a tile of the weight
WGMMA_FROM = 33  # rows from which `wgmma` is the faster one (one H200)
SHRINK_ROWS, SHRINK_WIDTH = 2, 2048  # tile of A in a program of `shrink`


def matmul(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None = None,
    *,
    phase: Phase,
    bias: Tensor | None = None,
    bias_start: int = 0,
    lora: BatchedLora | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not capabilities_of(x.device).triton_dots:
        return inference_dotless.matmul(x, weight, absmax, phase, bias, bias_start, lora, residual, dtype)
    (m, k), n = x.shape, len(weight)
    out = x.new_empty(m, n, dtype=dtype or x.dtype)
    tile = tile_for(m, x.dtype, phase, lora=lora is not None)
    if _any_order(m, phase) and tile.rows == 128 and not capabilities_of(x.device).shared_operands:
        # Fewer sums a thread: with `mma` the operands are in registers too, and would spill.
        tile = tile._replace(rows=64) if lora is not None else tile._replace(warps=8)
    parts, span = parts_for(n, k, tile.strip if _any_order(m, phase) else STRIP)
    sums = x.new_empty(parts, m, n, dtype=torch.float32) if parts > 1 else out
    after = epilogue_of(x, n, absmax, bias, bias_start, lora, residual)
    between = triton.next_power_of_2(max(16, lora.t.shape[1])) if lora is not None else 0
    _matmul[(triton.cdiv(n, tile.strip), parts, triton.cdiv(m, tile.rows * tile.halves))](
        x, weight, sums, out, *after.arguments, m, k, span, x.stride(0), weight.stride(0),
        *after.has, parts > 1, after.levels, tile.rows, tile.halves, tile.strip, tile.width, between,
        num_warps=tile.warps, num_stages=tile.stages, **EXACT,
    )  # fmt: skip
    if parts > 1:
        add_parts(sums, out, after)
    return out


def _any_order(m: int, phase: Phase) -> bool:
    """Whether m rows are computed with `wgmma`, in another order of sums than fewer rows."""
    return phase is Phase.DECODE_ANY_ORDER and m >= WGMMA_FROM


def parts_for(n: int, k: int, strip: int = STRIP) -> tuple[int, int]:
    """(number of partial sums, inputs of each) for a weight (n, k): a function of the weight's shape alone."""
    return split(n, k, strip=strip, width=WIDTH, programs=PROGRAMS)


class Tile(NamedTuple):
    """Tile sizes of a matmul program: rows, outputs (strip) and inputs (width).

    With two halves a program has twice the rows, in two dots with the same weights.
    """

    rows: int
    strip: int
    width: int
    warps: int
    stages: int
    halves: int = 1


def tile_for(m: int, dtype: torch.dtype, phase: Phase, *, lora: bool) -> Tile:
    """The tile for m rows: the fastest of those that keep the bits of a row (one H200, docs/log.md).

    float32 has no tensor cores and uses tiles of 16 rows: a tile of 64 rows is 64,000 instructions, which take 10 s to
    compile for each shape.
    """
    if dtype == torch.float32:
        return Tile(16, 32, 128, 4, 3)
    if phase is Phase.PREFILL:
        return Tile(64, 128, 64, 4, 4) if m <= 64 else Tile(128, 128, 64, 8, 3)
    if _any_order(m, phase):
        if m <= 64:
            return Tile(64, 64 if lora else 128, 128, 4, 3)  # a larger tile does not fit into registers
        return Tile(128, 64, 64, 8, 3) if lora else Tile(128, 128, 64, 4, 3)
    if m <= 16:
        return Tile(16, 64, 128, 4, 4)
    return Tile(16, 64, 128, 2, 4, halves=2) if m <= 32 else Tile(32, 128, 64, 4, 4, halves=2)


@triton.jit(do_not_specialize=["m", "j", "adapters", "bias_start", "bias_stop"])
def _matmul(
    x, weight, sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names, residual,
    j, adapters, n, residual_stride, m, k, span, x_stride, weight_stride,
    BIAS: tl.constexpr, R: tl.constexpr, RESIDUAL: tl.constexpr, PARTED: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, HALVES: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    row = tl.program_id(2) * ROWS * HALVES + tl.arange(0, ROWS)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, k)
    place = weight + strip[None, :].to(tl.int64) * weight_stride
    total = tl.zeros((ROWS, STRIP), dtype=tl.float32)
    lower = tl.zeros((ROWS, STRIP), dtype=tl.float32)
    for start in range(first, last, WIDTH):
        column = start + tl.arange(0, WIDTH)
        value = tl.load(place + column[:, None], mask=(strip[None, :] < n) & (column[:, None] < last), other=0)
        there = (row[:, None] < m) & (column[None, :] < last)
        source = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
        inputs = tl.load(source, mask=there, other=0)
        value = value.to(inputs.dtype)
        total = tl.dot(inputs, value, total, input_precision="ieee")
        if HALVES == 2:  # a second `mma` with the same weights, for the next ROWS rows
            there = (row[:, None] + ROWS < m) & (column[None, :] < last)
            inputs = tl.load(source + ROWS * x_stride, mask=there, other=0)
            lower = tl.dot(inputs, value, lower, input_precision="ieee")
    finish(
        total, row, strip, sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names, residual,
        j, adapters, m, n, residual_stride, BIAS, R, RESIDUAL, PARTED, LEVELS, BETWEEN,
    )  # fmt: skip
    if HALVES == 2:
        finish(
            lower, row + ROWS, strip, sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids,
            names, residual, j, adapters, m, n, residual_stride, BIAS, R, RESIDUAL, PARTED, LEVELS, BETWEEN,
        )  # fmt: skip


def shrink(x: Tensor, a: Tensor, adapter_ids: Tensor, phase: Phase) -> Tensor:
    (m, k), j = x.shape, a.shape[1]
    assert adapter_ids.is_contiguous()
    out = x.new_empty(m, j, dtype=torch.float32)
    _shrink[(m, triton.cdiv(j, SHRINK_ROWS))](
        x, a, adapter_ids, out, j, k, x.stride(0), SHRINK_ROWS, SHRINK_WIDTH, num_warps=8
    )
    return out


@triton.jit
def _shrink(x, a, adapter_ids, out, j, k, x_stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(adapter_ids + row).to(tl.int64)
    partial = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    if number > 0:  # 0 is the base
        for start in range(0, k, WIDTH):
            column = start + tl.arange(0, WIDTH)
            inputs = tl.load(x + row * x_stride + column, mask=column < k, other=0).to(tl.float32)
            inside = (line[:, None] < j) & (column[None, :] < k)
            factor = tl.load(a + (number * j + line[:, None]) * k + column[None, :], mask=inside, other=0)
            partial += factor.to(tl.float32) * inputs[None, :]
    tl.store(out + row * j + line, tl.sum(partial, axis=1), mask=line < j)
