"""Rotary positions in place. Definition: ops/attention.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # heads that one program turns


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, head_size: int, form: str) -> None:
    m, heads = len(x), x.shape[1] // head_size
    cos, sin = cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous()  # (positions, R/2)
    pairs = cos.shape[1]
    step, apart = (2, 1) if form == "interleaved" else (1, pairs)
    _rotate[(m, triton.cdiv(heads, HEADS))](
        x, cos, sin, len(cos), heads, head_size, pairs, x.stride(0), step, apart,
        HEADS, triton.next_power_of_2(pairs), num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate(
    x, cos, sin, positions, heads, head_size, pairs, x_stride, step, apart, HEADS: tl.constexpr, PAIRS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < pairs)
    first = x + row * x_stride + head * head_size + pair * step
    a = tl.load(first, mask=inside).to(tl.float32)
    b = tl.load(first + apart, mask=inside).to(tl.float32)
    at = (row % positions) * pairs + pair
    c, s = tl.load(cos + at, mask=pair < pairs), tl.load(sin + at, mask=pair < pairs)
    kind = x.dtype.element_ty
    tl.store(first, (a * c - b * s).to(kind), mask=inside)
    tl.store(first + apart, (b * c + a * s).to(kind), mask=inside)
