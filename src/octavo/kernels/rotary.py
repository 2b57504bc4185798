"""Rotary position embeddings (RoPE, arXiv 2104.09864), alone or after an RMSNorm. Reference: ops/rotary.py.

Legend: one program for some heads of a row (all heads, if one norm is of all of them); `*_stride` is the stride of a
row in elements. With a norm the two elements of each rotated pair are two tiles (heads, pairs), which are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.pointwise import _factors

HEADS = 8  # heads that one program rotates
NORM_ELEMENTS = 2048  # elements of x that one program normalizes and rotates, unless one norm is of more


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


def norm_rotate_into(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, head_size: int, form: str, out: Tensor, *,
    zero_centred_weight: bool = False,
) -> None:  # fmt: skip
    grid, table, sizes, constants, warps = _norm_launch(x, weight, cos, sin, head_size, form, zero_centred_weight)
    _norm_rotate[grid](x, weight, *table, out, *sizes, x.stride(0), out.stride(0), eps, *constants, num_warps=warps)


def norm_rotate_backward_into(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, head_size: int, form: str, dy: Tensor, out: Tensor,
    *, zero_centred_weight: bool = False,
) -> None:  # fmt: skip
    grid, table, sizes, constants, warps = _norm_launch(x, weight, cos, sin, head_size, form, zero_centred_weight)
    strides = x.stride(0), dy.stride(0), out.stride(0)
    _norm_rotate_backward[grid](x, weight, *table, dy, out, *sizes, *strides, eps, *constants, num_warps=warps)


def _norm_launch(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, head_size: int, form: str, zero_centred_weight: bool
) -> tuple[tuple[int, int], tuple[Tensor, Tensor], tuple[int, ...], tuple[bool | int, ...], int]:
    """(grid, table, sizes, constants, warps) of both kernels."""
    assert 2 * cos.shape[-1] == head_size
    cos, sin = cos.flatten(0, 2).contiguous(), sin.flatten(0, 2).contiguous()  # (positions, D/2)
    heads, pairs, of_all = x.shape[1] // head_size, cos.shape[1], weight.numel() != head_size
    width, together = triton.next_power_of_2(pairs), triton.next_power_of_2(heads)
    if not of_all:
        together = min(together, max(1, NORM_ELEMENTS // (2 * width)))
    # 4 pairs a thread: with more, Triton 3.7 moves the values of the table from one thread to another.
    warps = max(1, min(16, together * width // 128))
    constants = form == "interleaved", zero_centred_weight, of_all, together, width
    return (len(x), triton.cdiv(heads, together)), (cos, sin), (len(cos), heads, head_size, pairs), constants, warps


@triton.jit
def _columns(heads, head_size, pairs, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """(first elements of pairs in a head (1, PAIRS) and which exist, in a row (HEADS, PAIRS) and which exist)."""
    pair = tl.arange(0, PAIRS)[None, :]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    first = 2 * pair if INTERLEAVED else pair
    return first, pair < pairs, head * head_size + first, (head < heads) & (pair < pairs)


@triton.jit
def _table(cos, sin, positions, pairs, PAIRS: tl.constexpr):
    """(cos, sin), (1, PAIRS) each, of this program's row."""
    pair = tl.arange(0, PAIRS)[None, :]
    at = (tl.program_id(0).to(tl.int64) % positions) * pairs + pair
    return tl.load(cos + at, mask=pair < pairs), tl.load(sin + at, mask=pair < pairs)


@triton.jit
def _mean(values, count, OF_ALL: tl.constexpr):
    """The mean over the elements of each norm, from the sums of both elements of pairs (HEADS, PAIRS)."""
    return tl.sum(values) / count if OF_ALL else tl.sum(values, axis=1)[:, None] / count


@triton.jit
def _norm_rotate(
    x, weight, cos, sin, out, positions, heads, head_size, pairs, x_stride, out_stride, eps,
    INTERLEAVED: tl.constexpr, ZERO_CENTRED_WEIGHT: tl.constexpr, OF_ALL: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, exist, column, inside = _columns(heads, head_size, pairs, INTERLEAVED, HEADS, PAIRS)
    apart = 1 if INTERLEAVED else pairs  # from the first element of a pair to the second
    source, target = x + row * x_stride + column, out + row * out_stride + column
    a = tl.load(source, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + apart, mask=inside, other=0).to(tl.float32)
    inverse = tl.rsqrt(_mean(a * a + b * b, heads * head_size if OF_ALL else head_size, OF_ALL) + eps)
    factor, needed = (column, inside) if OF_ALL else (first, exist)
    a = a * inverse * _factors(weight, factor, needed, x.dtype.element_ty, ZERO_CENTRED_WEIGHT)
    b = b * inverse * _factors(weight + apart, factor, needed, x.dtype.element_ty, ZERO_CENTRED_WEIGHT)
    a = a.to(x.dtype.element_ty).to(tl.float32)  # rounded, as a norm whose output is rotated
    b = b.to(x.dtype.element_ty).to(tl.float32)
    c, s = _table(cos, sin, positions, pairs, PAIRS)
    tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + apart, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate_backward(
    x, weight, cos, sin, dy, out, positions, heads, head_size, pairs, x_stride, dy_stride, out_stride, eps,
    INTERLEAVED: tl.constexpr, ZERO_CENTRED_WEIGHT: tl.constexpr, OF_ALL: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, exist, column, inside = _columns(heads, head_size, pairs, INTERLEAVED, HEADS, PAIRS)
    apart = 1 if INTERLEAVED else pairs
    source, gradient = x + row * x_stride + column, dy + row * dy_stride + column
    a = tl.load(source, mask=inside, other=0).to(tl.float32)
    b = tl.load(source + apart, mask=inside, other=0).to(tl.float32)
    da = tl.load(gradient, mask=inside, other=0).to(tl.float32)
    db = tl.load(gradient + apart, mask=inside, other=0).to(tl.float32)
    c, s = _table(cos, sin, positions, pairs, PAIRS)
    # The transposed rotation; rounded, as a rotation whose output is the gradient of a norm.
    ga = (da * c + db * s).to(dy.dtype.element_ty).to(tl.float32)
    gb = (db * c - da * s).to(dy.dtype.element_ty).to(tl.float32)
    # Then the formula of kernels/pointwise._norm_backward.
    count = heads * head_size if OF_ALL else head_size
    inverse = tl.rsqrt(_mean(a * a + b * b, count, OF_ALL) + eps)
    a, b = a * inverse, b * inverse
    factor, needed = (column, inside) if OF_ALL else (first, exist)
    ga *= _factors(weight, factor, needed, x.dtype.element_ty, ZERO_CENTRED_WEIGHT)
    gb *= _factors(weight + apart, factor, needed, x.dtype.element_ty, ZERO_CENTRED_WEIGHT)
    mean = _mean(ga * a + gb * b, count, OF_ALL)
    target = out + row * out_stride + column
    tl.debug_barrier()  # out may be x: the thread of a store may not be that of the load from the same address
    tl.store(target, ((ga - a * mean) * inverse).to(out.dtype.element_ty), mask=inside)
    tl.store(target + apart, ((gb - b * mean) * inverse).to(out.dtype.element_ty), mask=inside)
