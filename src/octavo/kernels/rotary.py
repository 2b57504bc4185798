"""Rotary position embeddings (RoPE, arXiv 2104.09864). Reference: ops/rotary.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # heads that one program rotates


def rotate_into(
    x: Tensor, cos: Tensor, sin: Tensor, head_size: int, form: str, out: Tensor, *, back: bool = False
) -> None:
    m, heads = len(x), x.shape[1] // head_size
    cos, sin = cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous()  # (positions, R/2)
    pairs = cos.shape[1]
    # Elements of a head without rotation are copied if out is not x.
    rest = head_size - 2 * pairs if x.data_ptr() != out.data_ptr() else 0
    _rotate[(m, triton.cdiv(heads, HEADS))](
        x, cos, sin, out, len(cos), heads, head_size, pairs, x.stride(0), out.stride(0), form == "interleaved", back,
        HEADS, triton.next_power_of_2(pairs), triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip


@triton.jit
def _rotate(
    x, cos, sin, out, positions, heads, head_size, pairs, x_stride, out_stride,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    at = (row % positions) * pairs + pair
    c, s = tl.load(cos + at, mask=pair < pairs), tl.load(sin + at, mask=pair < pairs)
    s = -s if BACK else s
    source, target = x + row * x_stride, out + row * out_stride
    if INTERLEAVED:  # the two elements of a rotated pair are adjacent: one contiguous load
        rotary = tl.arange(0, 2 * PAIRS)[None, :]
        place, inside = head * head_size + rotary, (head < heads) & (rotary < 2 * pairs)
        value = tl.load(source + place, mask=inside).to(tl.float32)
        a, b = tl.split(tl.reshape(value, (HEADS, PAIRS, 2)))
        value = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, 2 * PAIRS))
        tl.store(target + place, value.to(out.dtype.element_ty), mask=inside)
    else:
        place, inside = head * head_size + pair, (head < heads) & (pair < pairs)
        a = tl.load(source + place, mask=inside).to(tl.float32)
        b = tl.load(source + place + pairs, mask=inside).to(tl.float32)
        tl.store(target + place, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
        tl.store(target + place + pairs, (b * c + a * s).to(out.dtype.element_ty), mask=inside)
    if REST:
        column = 2 * pairs + tl.arange(0, REST)[None, :]
        place, inside = head * head_size + column, (head < heads) & (column < head_size)
        tl.store(target + place, tl.load(source + place, mask=inside), mask=inside)
