"""One new token of a few requests: products straight from 8-bit codes, attention over slots.

Definitions: ops/decode.py.

A product's program takes a strip of outputs, a span of inputs and, in float32, a block of rows; where outputs alone
would leave multiprocessors idle, several programs share the inputs of a strip, and a second kernel adds up what they
found, always in the same order. A slot's attention is parted into spans of positions in the same way.

Legend as there. `*_stride` is a row's pitch in numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.decode import Thin
from octavo.ops.quantize import INT8_LEVELS

PROGRAMS = 256  # that keep a card busy: two for each multiprocessor of an H100
CHUNK = 16  # spans of a slot's attention that are joined at once


def int8_rows(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    *,
    bias: Tensor | None = None,
    bias_start: int = 0,
    thin: Thin | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    (m, k), n = x.shape, len(codes)
    out = x.new_empty(m, n)
    tile = tile_for(m, x.dtype, adapters=thin is not None)
    strips, blocks = triton.cdiv(n, tile.strip), triton.cdiv(m, tile.rows)
    parts = max(1, min(PROGRAMS // (strips * blocks), k // (4 * tile.width)))
    span = triton.cdiv(triton.cdiv(k, parts), tile.width) * tile.width
    sums = x.new_empty(parts, m, n, dtype=torch.float32) if parts > 1 else out
    after = (
        absmax, bias if bias is not None else absmax, bias_start,
        bias_start + (bias.numel() if bias is not None else 0),
        *((thin.inner, thin.b, thin.numbers, thin.names) if thin is not None else (absmax,) * 4),
        onto if onto is not None else x, thin.inner.shape[1] if thin is not None else 0,
        len(thin.b) if thin is not None else 0, n, onto.stride(0) if onto is not None else 0,
    )  # fmt: skip
    assert thin is None or thin.b.numel() < 2**31  # places in it are 32-bit numbers: with 64 bits registers spill
    between = triton.next_power_of_2(max(16, thin.inner.shape[1])) if thin is not None and tile.rows > 1 else 0
    has = bias is not None, thin.b.shape[1] if thin is not None else 0, onto is not None
    _int8_rows[(strips, parts, blocks)](
        x, codes, sums, out, *after, m, k, span, x.stride(0), codes.stride(0),
        *has, parts > 1, INT8_LEVELS, tile.rows, tile.strip, tile.width, between,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        width = 1024
        _add_parts[(m, triton.cdiv(n, width))](sums, out, *after, m, parts, *has, INT8_LEVELS, width, num_warps=4)
    return out


class Tile(NamedTuple):
    """What a program of a product holds at once: rows, outputs (a strip) and inputs."""

    rows: int
    strip: int
    width: int
    warps: int
    stages: int


def tile_for(m: int, dtype: torch.dtype, *, adapters: bool) -> Tile:
    """The tile for so many rows: the fastest of some 80 on GPT-J's shapes in bfloat16 (one H100, docs/log.md).

    float32, which tensor cores do not multiply, takes rows by 16: a tile of 64 rows is 64,000 instructions, which
    take 10 s to compile, for each shape.
    """
    if m == 1:
        return Tile(1, 4, 1024, 4, 2)
    if dtype == torch.float32:
        return Tile(16, 32, 128, 4, 3)
    if m <= 16:
        return Tile(16, 32, 256, 4, 3)
    if m > 64:
        return Tile(128, 64, 64, 8, 3) if adapters else Tile(128, 128, 64, 4, 3)
    rows = triton.next_power_of_2(m)
    return Tile(rows, 64 if adapters and rows == 64 else 128, 128, 4, 3)  # more would not fit into registers


@triton.jit(do_not_specialize=["m", "j", "adapters", "bias_start", "bias_stop"])
def _int8_rows(
    x, codes, sums, out, absmax, bias, bias_start, bias_stop, inner, b, numbers, names, onto,
    j, adapters, n, onto_stride, m, k, span, x_stride, codes_stride,
    BIAS: tl.constexpr, R: tl.constexpr, ONTO: tl.constexpr, PARTED: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, k)
    place = codes + strip[:, None].to(tl.int64) * codes_stride
    if ROWS == 1:
        products = tl.zeros((STRIP, WIDTH), dtype=tl.float32)
        for start in range(first, last, WIDTH):
            column = start + tl.arange(0, WIDTH)
            code = tl.load(place + column[None, :], mask=(strip[:, None] < n) & (column[None, :] < last), other=0)
            own = tl.load(x + column, mask=column < last, other=0).to(tl.float32)
            # 0x4B400000 is 12582912 as a float; a code added to its bits is added to its value.
            value = (code.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
            products += value * own[None, :]
        total = tl.sum(products, axis=1)[None, :]
    else:
        total = tl.zeros((ROWS, STRIP), dtype=tl.float32)
        for start in range(first, last, WIDTH):
            column = start + tl.arange(0, WIDTH)
            code = tl.load(place + column[None, :], mask=(strip[:, None] < n) & (column[None, :] < last), other=0)
            there = (row[:, None] < m) & (column[None, :] < last)
            own = tl.load(x + row[:, None] * x_stride + column[None, :], mask=there, other=0)
            total = tl.dot(own, tl.trans(code.to(own.dtype)), total, input_precision="ieee")
    at = row[:, None].to(tl.int64) * n + strip[None, :]
    inside = (row[:, None] < m) & (strip[None, :] < n)
    if PARTED:
        tl.store(sums + tl.program_id(1).to(tl.int64) * m * n + at, total, mask=inside)
    else:
        total = _finished(
            total, row[:, None], strip[None, :], inside, absmax, bias, bias_start, bias_stop, inner, b, numbers, names,
            onto, j, adapters, m, n, onto_stride, BIAS, R, ONTO, LEVELS, BETWEEN,
        )  # fmt: skip
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "j", "adapters", "parts", "bias_start", "bias_stop"])
def _add_parts(
    sums, out, absmax, bias, bias_start, bias_stop, inner, b, numbers, names, onto,
    j, adapters, n, onto_stride, m, parts,
    BIAS: tl.constexpr, R: tl.constexpr, ONTO: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < n
    total = tl.zeros((1, WIDTH), dtype=tl.float32)
    for part in range(parts):
        total += tl.load(sums + (part * m + row) * n + column, mask=inside, other=0)
    total = _finished(
        total, row, column, inside, absmax, bias, bias_start, bias_stop, inner, b, numbers, names,
        onto, j, adapters, m, n, onto_stride, BIAS, R, ONTO, LEVELS, 0,
    )  # fmt: skip
    tl.store(out + row * n + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finished(
    total, row, column, inside, absmax, bias, bias_start, bias_stop, inner, b, numbers, names, onto,
    j, adapters, m, n, onto_stride,
    BIAS: tl.constexpr, R: tl.constexpr, ONTO: tl.constexpr, LEVELS: tl.constexpr, BETWEEN: tl.constexpr,
):  # fmt: skip
    total *= tl.load(absmax + column, mask=column < n, other=0) / LEVELS
    if BIAS:
        total += tl.load(bias + column - bias_start, mask=(column >= bias_start) & (column < bias_stop), other=0)
    if BETWEEN:
        total = _routed(total, row, column, inner, b, numbers, names, j, adapters, m, n, R, BETWEEN)
    elif R:
        number = tl.load(numbers + row, mask=row < m, other=0).to(tl.int32)
        name = tl.load(names + column, mask=column < n, other=0)
        live = inside & (number > 0)
        for r in range(R):
            factor = tl.load(inner + row * j + name * R + r, mask=live, other=0)
            total += factor * tl.load(b + (number * R + r) * n + column, mask=live, other=0).to(tl.float32)
    if ONTO:
        total += tl.load(onto + row * onto_stride + column, mask=inside, other=0).to(tl.float32)
    return total


def shrink(x: Tensor, a: Tensor, numbers: Tensor) -> Tensor:
    (m, k), j = x.shape, a.shape[1]
    out = x.new_empty(m, j, dtype=torch.float32)
    block, width = (1, 4096) if m * j < 1024 else (4, 1024)  # few lines need a program each
    _shrink[(m, triton.cdiv(j, block))](x, a, numbers, out, j, k, x.stride(0), block, width, num_warps=8)
    return out


@triton.jit
def _routed(
    total, row, column, inner, b, numbers, names, j, adapters, m, n, R: tl.constexpr, BETWEEN: tl.constexpr
):  # fmt: skip
    # Many rows: one product for each adapter that any of them goes through, with zeros for the other rows.
    line = tl.arange(0, BETWEEN)
    number = tl.load(numbers + row, mask=row < m, other=0).to(tl.int32)
    own = tl.load(inner + row * j + line[None, :], mask=(row < m) & (line[None, :] < j), other=0)
    reads = (line[:, None] // R == tl.load(names + column, mask=column < n, other=-1)) & (column < n)
    for adapter in range(1, adapters):  # 0 is the base
        through = number == adapter
        if tl.max(tl.max(through.to(tl.int32), axis=1), axis=0) > 0:
            factor = tl.load(b + (adapter * R + line[:, None] % R) * n + column, mask=reads, other=0)
            part = tl.where(through, own, 0).to(factor.dtype)
            # Zeros times what is not finite are NaN, and other rows' answers are not to suffer from this adapter.
            total = tl.where(through, tl.dot(part, factor, total, input_precision="ieee"), total)
    return total


@triton.jit
def _shrink(x, a, numbers, out, j, k, x_stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(numbers + row).to(tl.int64)
    products = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
    if number > 0:  # 0 is the base
        for start in range(0, k, WIDTH):
            column = start + tl.arange(0, WIDTH)
            own = tl.load(x + row * x_stride + column, mask=column < k, other=0).to(tl.float32)
            inside = (line[:, None] < j) & (column[None, :] < k)
            factor = tl.load(a + (number * j + line[:, None]) * k + column[None, :], mask=inside, other=0)
            products += factor.to(tl.float32) * own[None, :]
    tl.store(out + row * j + line, tl.sum(products, axis=1), mask=line < j)


class Cut(NamedTuple):
    """How a slot's attention is parted: positions that a program takes, and how many it holds at once."""

    span: int
    tile: int
    warps: int


def cut_for(pairs: int) -> Cut:
    """The cut for so many pairs of a slot and a head: few of them need many programs each."""
    return Cut(32 if pairs <= 64 else 64 if pairs <= 256 else 128, 32, 2)


def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int
) -> Tensor:
    (m, h, d), (room, g) = q.shape, keys.shape[1:3]
    out = q.new_empty(m, h, d)
    cut = cut_for(m * h)
    spans = triton.cdiv(room, cut.span)
    found = q.new_empty(m, h, spans, d, dtype=torch.float32)
    weights = q.new_empty(m, h, spans, 2, dtype=torch.float32)  # the largest score, the sum of exponentials over it
    width = triton.next_power_of_2(d)
    _attend[(m, h, spans)](
        q, k, v, keys, values, lengths, found, weights, d**-0.5, h // g, d, spans,
        q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), cut.span, cut.tile, width,
        num_warps=cut.warps,
    )  # fmt: skip
    _join[(m, h)](found, weights, lengths, out, d, spans, cut.span, CHUNK, width, num_warps=4)
    return out


@triton.jit
def _attend(
    q, k, v, keys, values, lengths, found, weights, scale, shared, d, spans,
    q_stride, k_stride, v_stride, slot_stride, position_stride,
    SPAN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slot, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + slot)
    first = span * SPAN
    if first > length:  # an idle slot's is -1
        return
    group = head // shared
    column = tl.arange(0, WIDTH)
    wide = column < d
    query = tl.load(q + slot * q_stride + head * d + column, mask=wide, other=0).to(tl.float32) * scale
    new_key = tl.load(k + slot * k_stride + group * d + column, mask=wide, other=0)
    new_value = tl.load(v + slot * v_stride + group * d + column, mask=wide, other=0)
    place = slot * slot_stride + group * d
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mix = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + SPAN, length + 1), TILE):
        position = start + tl.arange(0, TILE)
        at = place + position[:, None] * position_stride + column[None, :]
        held = (position[:, None] < length) & wide[None, :]
        key, value = tl.load(keys + at, mask=held, other=0), tl.load(values + at, mask=held, other=0)
        fresh = position[:, None] == length  # what no other program can be sure to read from the cache yet
        key = tl.where(fresh, new_key[None, :], key).to(tl.float32)
        value = tl.where(fresh, new_value[None, :], value).to(tl.float32)
        score = tl.sum(key * query[None, :], axis=1)
        score = tl.where(position <= length, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=0))
        share = tl.exp(score - higher)
        fade = tl.exp(highest - higher)
        mix = mix * fade + tl.sum(share[:, None] * value, axis=0)
        total = total * fade + tl.sum(share, axis=0)
        highest = higher
    cell = (slot * tl.num_programs(1) + head) * spans + span
    tl.store(found + cell * d + column, mix, mask=wide)
    pair = tl.arange(0, 1)
    tl.store(weights + cell * 2 + pair, highest)
    tl.store(weights + cell * 2 + 1 + pair, total)
    if (length < first + SPAN) & (head % shared == 0):  # one program of each key head
        there = place + length * position_stride + column
        tl.store(keys + there, new_key, mask=wide)
        tl.store(values + there, new_value, mask=wide)


@triton.jit
def _join(
    found, weights, lengths, out, d, spans, SPAN: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + slot)
    cell = (slot * tl.num_programs(1) + head) * spans
    column = tl.arange(0, WIDTH)
    wide = column < d
    live = length // SPAN + 1
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mix = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, tl.where(length < 0, 0, live), CHUNK):
        span = start + tl.arange(0, CHUNK)
        there = span < live
        score = tl.load(weights + (cell + span) * 2, mask=there, other=float("-inf"))
        sums = tl.load(weights + (cell + span) * 2 + 1, mask=there, other=0)
        part = tl.load(
            found + (cell + span[:, None]) * d + column[None, :], mask=there[:, None] & wide[None, :], other=0
        )
        higher = tl.maximum(highest, tl.max(score, axis=0))
        share, fade = tl.exp(score - higher), tl.exp(highest - higher)
        mix = mix * fade + tl.sum(share[:, None] * part, axis=0)
        total = total * fade + tl.sum(share * sums, axis=0)
        highest = higher
    mix = tl.where(length >= 0, mix / tl.where(length >= 0, total, 1.0), 0.0)
    tl.store(out + (slot * tl.num_programs(1) + head) * d + column, mix.to(out.dtype.element_ty), mask=wide)
