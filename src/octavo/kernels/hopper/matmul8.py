"""The 8-bit matmul with warp specialization. Reference: ops/matmul8.py.

One warp fills a ring of stages in shared memory with the copy engine (TMA). Two warp groups of four warps multiply
them, each for half of the rows of a tile, with one wgmma in flight while the next is issued. Loads continue while a
tile is scaled and stored. The low-rank term is one more stage: the same bytes hold half as many columns of a 2-byte
dtype.

Legend as in the reference; a stage has (BM, BK) inputs and (BN, BK) weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.hardware.capabilities import capabilities_of
from octavo.ops.matmul8 import LowRankTerm
from octavo.ops.scheme import INT8_LEVELS

ROWS, INPUTS = 128, 128  # rows of a tile (BM), inputs of a stage (BK)


class Shape(NamedTuple):
    """Columns of a tile, stages of the ring, and parts in which results are stored; they fill shared memory."""

    columns: int
    stages: int
    cuts: int


# Four stages and results in two parts are up to 13 % faster with int8 than three stages and results in one part, and up
# to 5 % slower with fp8. Fewer columns take longer for the same work, but give more programs (one H100, docs/log.md).
SHAPES = {
    torch.int8: (Shape(256, 4, 2), Shape(128, 6, 1), Shape(64, 8, 1)),
    torch.float8_e4m3fn: (Shape(256, 3, 1), Shape(128, 6, 1), Shape(64, 8, 1)),
}
BUSY = 0.75  # minimum fraction of multiprocessors with a tile; below it narrower tiles are used
GROUP_M = 16  # consecutive tiles of one column; 8 was up to 8 % slower on 16,384 rows (one H100)
BYTES = gl.NVMMASharedLayout(128, 8, 2)
SHORTS = gl.NVMMASharedLayout(128, 16, 2)


def fits(out: Tensor, scale: Tensor) -> bool:
    """Whether this kernel supports a call: one scale a row, and 2-byte results at an alignment that TMA can store."""
    aligned = out.data_ptr() % 16 == 0 and out.stride(0) % 8 == 0 and out.stride(1) == 1
    return out.itemsize == 2 and scale.ndim == 1 and aligned


def matmul_8bit_into(
    quantized: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None,
    bias: Tensor | None,
    bias_start: int,
    low_rank: LowRankTerm | None,
    residual: Tensor | None,
) -> None:
    (m, k), n = quantized.shape, len(weight)
    t, b = (out, out) if low_rank is None else low_rank
    processors = capabilities_of(quantized.device).processors
    columns, stages, cuts = shape_of(m, n, quantized.dtype, processors)
    programs = min(_tiles(m, n, columns), processors)
    read = [
        TensorDescriptor.from_tensor(x, [high, wide], layout)
        for x, high, wide, layout in (
            (quantized, ROWS, INPUTS, BYTES), (weight, columns, INPUTS, BYTES), (t, ROWS, INPUTS // 2, SHORTS),
            (b, columns, INPUTS // 2, SHORTS), (out, ROWS // 2, columns // cuts, SHORTS),
        )
    ]  # fmt: skip
    _matmul_8bit[(programs,)](
        *read, scale, absmax if absmax is not None else scale, bias if bias is not None else scale, bias_start,
        bias_start + (bias.numel() if bias is not None else 0), residual if residual is not None else out,
        residual.stride(0) if residual is not None else 0, m, n, k, programs, quantized.dtype == torch.int8,
        absmax is not None, bias is not None, t.shape[1] if low_rank is not None else 0, residual is not None,
        INT8_LEVELS, ROWS, columns, INPUTS, GROUP_M, stages, cuts, num_warps=4,
    )  # fmt: skip


def shape_of(m: int, n: int, kind: torch.dtype, processors: int) -> Shape:
    """The widest tile that occupies BUSY of the multiprocessors with a result (m, n)."""
    shapes = SHAPES[kind]
    return next((shape for shape in shapes if _tiles(m, n, shape.columns) >= BUSY * processors), shapes[-1])


def _tiles(m: int, n: int, columns: int) -> int:
    return -(-m // ROWS) * -(-n // columns)


@gluon.jit
def _matmul_8bit(
    inputs, weights, t, b, out, scale, absmax, bias, bias_start, bias_stop, residual, residual_stride, m, n, k,
    programs, INT8: gl.constexpr, SCALED: gl.constexpr, BIAS: gl.constexpr, LOW_RANK: gl.constexpr,
    RESIDUAL: gl.constexpr, LEVELS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, CUTS: gl.constexpr,
):  # fmt: skip
    x_stages = gl.allocate_shared_memory(inputs.dtype, [STAGES, BM, BK], inputs.layout)
    w_stages = gl.allocate_shared_memory(weights.dtype, [STAGES, BN, BK], weights.layout)
    results = gl.allocate_shared_memory(out.dtype, [2, BM // 2, BN // CUTS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)  # both warp groups release a stage
    # full: the tiles of a stage have arrived. empty: both warp groups have multiplied them.
    ring, sizes = (x_stages, w_stages, full, empty), (m, n, k, programs)
    epilogue = (scale, absmax, bias, bias_start, bias_stop, residual, residual_stride)
    gl.warp_specialize(
        [
            (
                _multiply,
                (0, ring, results, t, out, epilogue, sizes, INT8, SCALED, BIAS, LOW_RANK, RESIDUAL, LEVELS, GROUP_M),
            ),
            (
                _multiply,
                (1, ring, results, t, out, epilogue, sizes, INT8, SCALED, BIAS, LOW_RANK, RESIDUAL, LEVELS, GROUP_M),
            ),
            (_load, (ring, inputs, weights, t, b, sizes, LOW_RANK, GROUP_M)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip  (warps of the second group and of the loading partition; registers of a thread)


@gluon.jit
def _place(tile, m, n, BM: gl.constexpr, BN: gl.constexpr, GROUP_M: gl.constexpr):
    """(the first row, the first column) of a tile."""
    # GROUP_M tiles of one column, then those of the next: tiles that run at once share inputs and weights in L2.
    high, wide = gl.cdiv(m, BM), gl.cdiv(n, BN)  # tiles of a column, of a row
    band = tile // (GROUP_M * wide) * GROUP_M  # the first row of tiles of the group
    tall = gl.minimum(high - band, GROUP_M)  # the last group may have fewer rows
    return (band + tile % (GROUP_M * wide) % tall) * BM, tile % (GROUP_M * wide) // tall * BN


@gluon.jit
def _load(ring, inputs, weights, t, b, sizes, LOW_RANK: gl.constexpr, GROUP_M: gl.constexpr):
    """The loading warp: loads the next inputs and weights whenever a stage is empty."""
    x_stages, w_stages, full, empty = ring
    m, n, k, programs = sizes
    STAGES: gl.constexpr = x_stages.shape[0]
    BM: gl.constexpr = x_stages.shape[1]
    BN: gl.constexpr = w_stages.shape[1]
    BK: gl.constexpr = x_stages.shape[2]
    HALF_INPUTS: gl.constexpr = BK // 2
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(m, BM) * gl.cdiv(n, BN), programs):
        top, left = _place(tile, m, n, BM, BN, GROUP_M)
        for start in range(0, k, BK):
            stage = step % STAGES
            # A barrier's phase alternates with each turn of the ring; all stages start empty.
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BM + BN) * BK)  # bytes
            tma.async_copy_global_to_shared(inputs, [top, start], full.index(stage), x_stages.index(stage))
            tma.async_copy_global_to_shared(weights, [left, start], full.index(stage), w_stages.index(stage))
            step += 1
        for start in gl.static_range(0, LOW_RANK, HALF_INPUTS):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (BM + BN) * BK)
            t_tile = x_stages.index(stage)._reinterpret(t.dtype, [BM, HALF_INPUTS], t.layout)
            b_tile = w_stages.index(stage)._reinterpret(b.dtype, [BN, HALF_INPUTS], b.layout)
            tma.async_copy_global_to_shared(t, [top, start], full.index(stage), t_tile)
            tma.async_copy_global_to_shared(b, [left, start], full.index(stage), b_tile)
            step += 1


@gluon.jit
def _multiply(
    PART: gl.constexpr, ring, results, t, out, epilogue, sizes, INT8: gl.constexpr, SCALED: gl.constexpr,
    BIAS: gl.constexpr, LOW_RANK: gl.constexpr, RESIDUAL: gl.constexpr, LEVELS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """A computing warp group: half of the rows of each tile."""
    x_stages, w_stages, full, empty = ring
    residual, residual_stride = epilogue[5], epilogue[6]
    m, n, k, programs = sizes
    STAGES: gl.constexpr = x_stages.shape[0]
    BM: gl.constexpr = x_stages.shape[1]
    BN: gl.constexpr = w_stages.shape[1]
    BK: gl.constexpr = x_stages.shape[2]
    HALF: gl.constexpr = BM // 2
    HALF_INPUTS: gl.constexpr = BK // 2
    # Columns of an instruction: Triton has none with 256 for int8.
    WIDE: gl.constexpr = 128 if INT8 and BN > 128 else BN
    # The accumulators of 8-bit and of 2-byte instructions have the same layout in registers under two names.
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 32])
    slim: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    results_part = results.index(PART)
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(m, BM) * gl.cdiv(n, BN), programs):
        top, left = _place(tile, m, n, BM, BN, GROUP_M)
        total = warpgroup_mma_init(gl.zeros((HALF, BN), gl.int32 if INT8 else gl.float32, whole))
        for start in range(0, k, BK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            rows = x_stages.index(stage).slice(PART * HALF, HALF)  # (BM / 2, BK)
            total = warpgroup_mma(rows, w_stages.index(stage).permute((1, 0)), total, is_async=True)
            # At most one wgmma is in flight, so the previous one is complete and its stage can be filled again.
            total = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(total,)))
            if start > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        y = gl.convert_layout(total, slim, assert_trivial=True).to(gl.float32)  # (BM / 2, BN)
        row = top + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, slim))
        column = left + gl.arange(0, BN, gl.SliceLayout(0, slim))
        y = _scaled(y, row, column, m, n, epilogue, SCALED, BIAS, LEVELS)
        for _ in gl.static_range(0, LOW_RANK, HALF_INPUTS):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            rows = x_stages.index(stage)._reinterpret(t.dtype, [BM, HALF_INPUTS], t.layout).slice(PART * HALF, HALF)
            columns = w_stages.index(stage)._reinterpret(t.dtype, [BN, HALF_INPUTS], t.layout)
            y = warpgroup_mma(rows, columns.permute((1, 0)), y)
            mbarrier.arrive(empty.index(stage), count=1)
            step += 1
        if RESIDUAL:
            inside = (row[:, None] < m) & (column[None, :] < n)
            at = residual + row[:, None].to(gl.int64) * residual_stride + column[None, :]
            y += gl.load(at, mask=inside, other=0).to(gl.float32)
        short = y.to(out.dtype)  # rounded once, after all terms
        if results_part.shape[1] == BN:
            _store(short, results_part, out, top + PART * HALF, left)
        else:
            # Half of the columns at a time: the buffer of a whole tile would take the place of a stage.
            lower, upper = gl.split(short.reshape((HALF, 2, BN // 2)).permute((0, 2, 1)))
            _store(gl.convert_layout(lower, slim), results_part, out, top + PART * HALF, left)
            _store(gl.convert_layout(upper, slim), results_part, out, top + PART * HALF, left + BN // 2)
    tma.store_wait(0)


@gluon.jit
def _scaled(y, row, column, m, n, epilogue, SCALED: gl.constexpr, BIAS: gl.constexpr, LEVELS: gl.constexpr):
    """y (BM / 2, BN) times the scales of its rows and columns, plus the bias."""
    scale, absmax, bias, bias_start, bias_stop = epilogue[0], epilogue[1], epilogue[2], epilogue[3], epilogue[4]
    y *= gl.load(scale + row, mask=row < m, other=0)[:, None]
    if SCALED:
        y *= (gl.load(absmax + column, mask=column < n, other=0) / LEVELS)[None, :]
    if BIAS:
        has_bias = (column >= bias_start) & (column < bias_stop)
        y += gl.load(bias + column - bias_start, mask=has_bias, other=0)[None, :]
    return y


@gluon.jit
def _store(results, through, out, row, column):
    """Stores results with TMA, after the previous store from the same buffer has completed."""
    tma.store_wait(0)
    through.store(results)
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, column], through)
