"""The backward of an activation with the LoRA gradients of the layers before and after it, in one pass.

Reference: ops/lora_backward.py. The kernel is warp-specialized. One warp loads tiles into a ring of stages in shared
memory with the copy engine (TMA). Eight warps write dx and y over the tiles, multiply them with the low-rank matrices
from shared memory, and store dx over x.

Legend as in the reference (M rows, F columns of the activation's output, r and q the ranks of the LoRA before and after
it); a program has BN columns and a part of the rows, BM at a time; R and Q are r and q rounded up to a power of two.
PARTS is 1 for GELU, whose input x is (M, F), and 2 for SwiGLU and GEGLU, whose input is [gate | up] (M, 2F); `_up` is
the second half. FUNCTION is the function of the activation (kernels/pointwise.py).
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from octavo.kernels.lora_tiles import ROWS, PartialSums, Tile
from octavo.kernels.matmul8 import readable
from octavo.kernels.pointwise import _factor, _gelu_slope
from octavo.ops.lora_backward import LoraOperands

WIDE = gl.NVMMASharedLayout(128, 16, 2)


def lora_backward_into(
    x: Tensor, dy: Tensor, operands: LoraOperands, sums: PartialSums, tile: Tile, function: str
) -> None:
    """Writes partial sums and, over x, dx: of a gated activation if x (M, 2F) is twice as wide as dy (M, F)."""
    columns, stages = tile
    (m, f), parts = dy.shape, x.shape[1] // dy.shape[1]
    rank, rank_after, splits = operands.t.shape[1] // parts, operands.after.shape[1], len(sums.b)
    each = triton.cdiv(triton.cdiv(m, splits), ROWS) * ROWS  # rows of a program, whole tiles
    r, q = (max(16, triton.next_power_of_2(n)) for n in (rank, rank_after))  # 16: the depth of a wgmma
    xs = [_tiles(part, columns, WIDE) for part in x.chunk(parts, dim=1)]
    ts = [_tiles(readable(part), r, rank_layout(r)) for part in operands.t.chunk(parts, dim=1)]
    bs = ts  # not read by the kernel, which needs an argument
    if operands.b is not None:
        bs = [_tiles(readable(part), r, rank_layout(r), columns) for part in operands.b.chunk(parts)]
    after = _tiles(readable(operands.after), q, rank_layout(q))
    _lora_backward[(triton.cdiv(f, columns), splits)](
        xs[0], xs[-1], _tiles(dy, columns, WIDE), ts[0], ts[-1], bs[0], bs[-1],
        after, sums.b if sums.t is None else sums.t, sums.b, sums.a, m, f, each,
        rank, rank_after, parts, function, sums.t is not None, stages, num_warps=8,
    )  # fmt: skip


def rank_layout(rank: int) -> gl.NVMMASharedLayout:
    """The shared-memory layout of tiles with `rank` columns."""
    return gl.NVMMASharedLayout(min(128, 2 * rank), 16, 2)


def _tiles(x: Tensor, wide: int, layout: gl.NVMMASharedLayout, high: int = ROWS) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [high, wide], layout)


@gluon.jit
def _lora_backward(
    x, x_up, dy, t, t_up, b, b_up, after, sum_t, sum_b, sum_a, m, f, each, rank, rank_after,
    PARTS: gl.constexpr, FUNCTION: gl.constexpr, TO_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BM: gl.constexpr = x.block_type.shape[0]
    BN: gl.constexpr = x.block_type.shape[1]
    R: gl.constexpr = t.block_type.shape[1]
    Q: gl.constexpr = after.block_type.shape[1]
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * PARTS, BM, BN], x.layout)
    dys = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BN], dy.layout)
    ts = gl.allocate_shared_memory(x.dtype, [STAGES * PARTS, BM, R], t.layout)
    afters = gl.allocate_shared_memory(x.dtype, [STAGES, BM, Q], after.layout)
    bs = gl.allocate_shared_memory(x.dtype, [PARTS, BN, R], t.layout)
    # full: the tiles of a stage have arrived, and at index STAGES those of B, which are loaded once.
    # empty: the computing warps have released a stage.
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=1)
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(full.index(stage), count=1)
    rows = gl.program_id(1) * each, gl.minimum((gl.program_id(1) + 1) * each, m)
    ring = (xs, dys, ts, afters, bs, full, empty)
    # One more warp loads, with 24 registers a thread: the computing warps get the rest of the register file.
    gl.warp_specialize([
        (_compute, (ring, rows, x, x_up, sum_t, sum_b, sum_a, m, f, rank, rank_after, PARTS, FUNCTION, TO_T, STAGES)),
        (_load, (ring, rows, x, x_up, dy, t, t_up, b, b_up, after, PARTS, TO_T, STAGES)),
    ], [1], [24])  # fmt: skip


@gluon.jit
def _load(
    ring, rows, x, x_up, dy, t, t_up, b, b_up, after,
    PARTS: gl.constexpr, TO_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: loads the next tiles whenever a stage is empty."""
    xs, dys, ts, afters, bs, full, empty = ring
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = xs.shape[2]
    R: gl.constexpr = ts.shape[2]
    column = gl.program_id(0) * BN
    if TO_T:
        mbarrier.expect(full.index(STAGES), PARTS * BN * R * 2)
        tma.async_copy_global_to_shared(b, [column, 0], full.index(STAGES), bs.index(0))
        if PARTS == 2:
            tma.async_copy_global_to_shared(b_up, [column, 0], full.index(STAGES), bs.index(1))
    step = 0
    for row in range(rows[0], rows[1], BM):
        stage = step % STAGES
        # A barrier's phase alternates with each turn of the ring. The first turn waits for the phase before the first
        # one, which counts as complete: all stages start empty.
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), ((PARTS + 1) * BN + PARTS * R + afters.shape[2]) * BM * 2)  # bytes
        tma.async_copy_global_to_shared(x, [row, column], full.index(stage), xs.index(stage * PARTS))
        tma.async_copy_global_to_shared(t, [row, 0], full.index(stage), ts.index(stage * PARTS))
        if PARTS == 2:
            tma.async_copy_global_to_shared(x_up, [row, column], full.index(stage), xs.index(stage * PARTS + 1))
            tma.async_copy_global_to_shared(t_up, [row, 0], full.index(stage), ts.index(stage * PARTS + 1))
        tma.async_copy_global_to_shared(dy, [row, column], full.index(stage), dys.index(stage))
        tma.async_copy_global_to_shared(after, [row, 0], full.index(stage), afters.index(stage))
        step += 1  # noqa: SIM113  (Gluon has no enumerate)


@gluon.jit
def _compute(
    ring, rows, x, x_up, sum_t, sum_b, sum_a, m, f, rank, rank_after,
    PARTS: gl.constexpr, FUNCTION: gl.constexpr, TO_T: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The computing warps: dx and y over the tiles, and the sums of the LoRA gradients."""
    xs, dys, ts, afters, bs, full, empty = ring
    BM: gl.constexpr = xs.shape[1]
    BN: gl.constexpr = xs.shape[2]
    R: gl.constexpr = ts.shape[2]
    Q: gl.constexpr = afters.shape[2]
    of_b: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, R, 16])
    of_a: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, Q, 16])
    of_t: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, R // 2, 16])
    column = gl.program_id(0) * BN
    sum_t += gl.program_id(0).to(gl.int64) * m * (PARTS * rank)
    # Sums over the rows of this program: dB = dx^T t of each part, (BN, R), and dA = y^T dt of the LoRA after, (BN, Q).
    grad_b, grad_b_up = gl.zeros((BN, R), gl.float32, of_b), gl.zeros((BN, R), gl.float32, of_b)
    grad_a = gl.zeros((BN, Q), gl.float32, of_a)
    if TO_T:
        mbarrier.wait(full.index(STAGES), 0)
    step = 0
    for row in range(rows[0], rows[1], BM):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        x_tile, y = xs.index(stage * PARTS), dys.index(stage)  # (BM, BN) each
        up = xs.index(stage * PARTS + PARTS - 1)  # (BM, BN); x_tile again if there is one part
        _backward_(x_tile, up, y, PARTS, FUNCTION)
        fence_async_shared()  # wgmma and TMA read shared memory through another proxy than the stores above
        grad_b = warpgroup_mma(x_tile.permute((1, 0)), ts.index(stage * PARTS), grad_b, is_async=True)
        grad_a = warpgroup_mma(y.permute((1, 0)), afters.index(stage), grad_a, is_async=True)
        tma.async_copy_shared_to_global(x, [row, column], x_tile)
        if PARTS == 2:
            grad_b_up = warpgroup_mma(up.permute((1, 0)), ts.index(stage * PARTS + 1), grad_b_up, is_async=True)
            tma.async_copy_shared_to_global(x_up, [row, column], up)
        if TO_T:
            # dt = dx B of these columns: the programs of all columns are added up afterwards (lora_tiles.sum_parts).
            zero = gl.zeros((BM, R), gl.float32, of_t)
            _store(warpgroup_mma(x_tile, bs.index(0), zero), sum_t, row, m, PARTS * rank, 1, rank)
            if PARTS == 2:
                _store(warpgroup_mma(up, bs.index(1), zero), sum_t + rank, row, m, PARTS * rank, 1, rank)
        grad_b, grad_a = warpgroup_mma_wait(0, deps=(grad_b, grad_a))
        if PARTS == 2:
            grad_b_up = warpgroup_mma_wait(0, deps=(grad_b_up,))
        if STAGES > 2:  # the store of this stage overlaps with the computation of the next one
            tma.store_wait(PARTS)
            if step > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        else:
            tma.store_wait(0)
            mbarrier.arrive(empty.index(stage), count=1)
        step += 1  # noqa: SIM113  (Gluon has no enumerate)
    tma.store_wait(0)
    sum_b += gl.program_id(1).to(gl.int64) * (PARTS * f * rank)
    _store(grad_b, sum_b, column, f, rank, 1, rank)
    if PARTS == 2:
        _store(grad_b_up, sum_b + f * rank, column, f, rank, 1, rank)
    _store(grad_a, sum_a + gl.program_id(1).to(gl.int64) * (f * rank_after), column, f, 1, f, rank_after)


@gluon.jit
def _backward_(x_tile, up, y, PARTS: gl.constexpr, FUNCTION: gl.constexpr):
    """Writes dx over the tiles of x, and y over the tile of dy; a quarter of the rows at a time is in registers."""
    HIGH: gl.constexpr = x_tile.shape[0] // 4
    kind: gl.constexpr = x_tile.dtype
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    for quarter in gl.static_range(4):
        x_part, y_part = x_tile.slice(quarter * HIGH, HIGH), y.slice(quarter * HIGH, HIGH)
        value, g = x_part.load(layout).to(gl.float32), y_part.load(layout).to(gl.float32)
        s = _factor(value, FUNCTION)  # f(x) = x s
        if PARTS == 2:
            up_part = up.slice(quarter * HIGH, HIGH)
            other = up_part.load(layout).to(gl.float32)
            if FUNCTION == "silu":  # silu'(gate) = s (1 + gate (1 - s))
                x_part.store((g * other * s * (1 + value * (1 - s))).to(kind))
            else:
                x_part.store((g * other * _gelu_slope(value, s, FUNCTION)).to(kind))
            up_part.store((g * value * s).to(kind))
            y_part.store((value * s * other).to(kind))
        else:
            x_part.store((g * _gelu_slope(value, s, FUNCTION)).to(kind))
            y_part.store((value * s).to(kind))


@gluon.jit
def _store(sums, to, row, rows, row_stride, column_stride, columns):
    """Stores sums into columns of a matrix, masked to its rows and columns."""
    HIGH: gl.constexpr = sums.shape[0]
    WIDE: gl.constexpr = sums.shape[1]
    r = row + gl.arange(0, HIGH, gl.SliceLayout(1, sums.type.layout))
    c = gl.arange(0, WIDE, gl.SliceLayout(0, sums.type.layout))
    at = to + r[:, None].to(gl.int64) * row_stride + c[None, :] * column_stride
    gl.store(at, sums, mask=(r[:, None] < rows) & (c[None, :] < columns))
