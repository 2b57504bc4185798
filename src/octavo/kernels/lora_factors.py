"""Packs all B of a GEMM into one matrix, with one launch instead of one for each B and one for the zeros.

Reference: ops/lora_factors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.linear import LoraSlice

SIZE = 4096  # elements that one program writes


def pack_b_into(out: Tensor, loras: Sequence[LoraSlice]) -> None:
    if not loras:
        out.zero_()
        return
    n, c = out.shape
    width = triton.next_power_of_2(c)
    high = max(1, SIZE // width)
    ranks = [len(lora.a) for lora in loras]
    _pack_b[(triton.cdiv(n, high),)](
        out, tuple(lora.b.detach().contiguous() for lora in loras), tuple(lora.start for lora in loras),
        tuple(lora.stop for lora in loras), tuple(accumulate(ranks[:-1], initial=0)), tuple(ranks),
        tuple(float(lora.b_scaling) for lora in loras), n, c, out.stride(0), high, width, num_warps=4,
    )  # fmt: skip


@triton.jit
def _pack_b(
    out, factors, starts, stops, columns, ranks, scalings, n, c, out_stride, HIGH: tl.constexpr, WIDTH: tl.constexpr
):
    row = (tl.program_id(0) * HIGH + tl.arange(0, HIGH))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    value = tl.zeros((HIGH, WIDTH), dtype=tl.float32)
    for i in tl.static_range(len(factors)):
        local_row, local_column = row - starts[i], column - columns[i]
        inside = (local_row >= 0) & (row < stops[i]) & (local_column >= 0) & (local_column < ranks[i])
        part = tl.load(factors[i] + local_row * ranks[i] + local_column, mask=inside, other=0).to(tl.float32)
        value += part * scalings[i]
    place = out + row.to(tl.int64) * out_stride + column
    tl.store(place, value.to(out.dtype.element_ty), mask=(row < n) & (column < c))
