"""Attention over a key/value cache, batch-invariant. Reference: ops/cached_attention.py.

Decode splits the positions of a slot into spans, one program each; a second kernel combines the spans in order (as
FlashDecoding). Prefill iterates over the positions of a slot in tiles from the first position on, so a query has the
same tiles in the same order wherever its chunk begins. Neither depends on the number of rows or slots. With a window,
spans and tiles before it are left out. A tile in which a query sees nothing adds exact zeros to its sums, so queries
that are computed together do not change each other's bits.

Legend as in the reference. `*_stride` is the stride of a row, slot or position in elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.hardware.capabilities import Capabilities, capabilities_of
from octavo.ops.attention import PLAIN, AttentionSpec

SPAN, DECODE_TILE = 32, 32  # positions of a span (one decode program), and of a tile in registers
CHUNK = 16  # spans of a slot that `_join` loads at once


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int,
    spec: AttentionSpec = PLAIN,
) -> Tensor:  # fmt: skip
    (m, h, d), (held, g) = q.shape, keys.shape[1:3]
    out = q.new_empty(m, h, d)
    window = spec.window or 0
    # The spans that a query may see: of all positions held, or of a window, which begins anywhere in its first span.
    spans = triton.cdiv(held, SPAN) if not window else min(triton.cdiv(held, SPAN), triton.cdiv(window - 1, SPAN)) + 1
    partial = q.new_empty(m, h, spans, d, dtype=torch.float32)  # sums of exp(score - maximum) * value
    weights = q.new_empty(m, h, spans, 2, dtype=torch.float32)  # maximum score, sum of exp(score - maximum)
    width = triton.next_power_of_2(d)
    _attend[(m, h, spans)](
        q, k, v, keys, values, lengths, partial, weights, spec.scale_of(d), spec.softcap or 0.0, window, held, h // g,
        d, spans, q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1),
        bool(window), spec.softcap is not None, SPAN, DECODE_TILE, width, num_warps=decode_warps(q),
    )  # fmt: skip
    _join[(m, h)](partial, weights, lengths, out, window, d, spans, bool(window), SPAN, CHUNK, width, num_warps=4)
    return out


def decode_warps(q: Tensor) -> int:
    """The warps of `_attend`. Compiled for GPUs below 8.0, heads of 256 spill registers with two."""
    return 4 if q.shape[2] > 128 and not capabilities_of(q.device).triton_dots else 2


@triton.jit
def _first_span(length, window, WINDOW: tl.constexpr, SPAN: tl.constexpr):
    """The first span of which the query at position `length` sees a position."""
    return tl.maximum(length + 1 - window, 0) // SPAN if WINDOW else 0


@triton.jit
def _capped(score, softcap):
    """softcap * tanh(score / softcap), with tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    x = tl.minimum(score / softcap, 40.0)  # tanh is 1 there; exp(2 x) overflows float32 beyond 44
    return softcap * (1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _attend(
    q, k, v, keys, values, lengths, partial, weights, scale, softcap, window, held, shared, d, spans,
    q_stride, k_stride, v_stride, slot_stride, position_stride,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slot, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + slot)
    first = (span + _first_span(length, window, WINDOW, SPAN)) * SPAN
    if first > length:  # the length of an idle slot is -1
        return
    group = head // shared  # the key/value head of a query head (GQA)
    column = tl.arange(0, WIDTH)
    wide = column < d
    query = tl.load(q + slot * q_stride + head * d + column, mask=wide, other=0).to(tl.float32) * scale
    new_key = tl.load(k + slot * k_stride + group * d + column, mask=wide, other=0)
    new_value = tl.load(v + slot * v_stride + group * d + column, mask=wide, other=0)
    place = slot * slot_stride + group * d
    # Online softmax (FlashAttention, arXiv 2205.14135): when the maximum rises, earlier sums are scaled down.
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mix = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + SPAN, length + 1), TILE):
        position = start + tl.arange(0, TILE)
        cell = position % held if WINDOW else position  # without a window all positions are held
        at = place + cell[:, None] * position_stride + column[None, :]
        cached = (position[:, None] < length) & wide[None, :]
        key, value = tl.load(keys + at, mask=cached, other=0), tl.load(values + at, mask=cached, other=0)
        is_new = position[:, None] == length  # the new token: another program may not have stored it in the cache yet
        key = tl.where(is_new, new_key[None, :], key).to(tl.float32)
        value = tl.where(is_new, new_value[None, :], value).to(tl.float32)
        score = tl.sum(key * query[None, :], axis=1)  # (TILE,)
        if SOFTCAP:
            score = _capped(score, softcap)
        seen = position <= length
        if WINDOW:
            seen = seen & (position > length - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=0))
        share = tl.exp(score - higher)
        decay = tl.exp(highest - higher)
        mix = mix * decay + tl.sum(share[:, None] * value, axis=0)
        total = total * decay + tl.sum(share, axis=0)
        highest = higher
    part = (slot * tl.num_programs(1) + head) * spans + span  # of (m, h, spans)
    tl.store(partial + part * d + column, mix, mask=wide)
    one = tl.arange(0, 1)  # `highest` and `total` are (1,), and so must be their addresses
    tl.store(weights + part * 2 + one, highest)
    tl.store(weights + part * 2 + 1 + one, total)
    if (length < first + SPAN) & (head % shared == 0):  # exactly one program for each key head stores it
        there = place + (length % held if WINDOW else length) * position_stride + column
        tl.store(keys + there, new_key, mask=wide)
        tl.store(values + there, new_value, mask=wide)


@triton.jit
def _join(
    partial, weights, lengths, out, window, d, spans,
    WINDOW: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + slot)
    cell = (slot * tl.num_programs(1) + head) * spans
    column = tl.arange(0, WIDTH)
    wide = column < d
    live = length // SPAN + 1 - _first_span(length, window, WINDOW, SPAN)  # spans that `_attend` has written
    highest = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    mix = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, tl.where(length < 0, 0, live), CHUNK):
        span = start + tl.arange(0, CHUNK)
        there = span < live
        score = tl.load(weights + (cell + span) * 2, mask=there, other=float("-inf"))
        sums = tl.load(weights + (cell + span) * 2 + 1, mask=there, other=0)
        part = tl.load(
            partial + (cell + span[:, None]) * d + column[None, :], mask=there[:, None] & wide[None, :], other=0
        )
        higher = tl.maximum(highest, tl.max(score, axis=0))
        share, decay = tl.exp(score - higher), tl.exp(highest - higher)
        mix = mix * decay + tl.sum(share[:, None] * part, axis=0)
        total = total * decay + tl.sum(share * sums, axis=0)
        highest = higher
    mix = tl.where(length >= 0, mix / tl.where(length >= 0, total, 1.0), 0.0)  # an idle slot: zeros
    tl.store(out + (slot * tl.num_programs(1) + head) * d + column, mix.to(out.dtype.element_ty), mask=wide)


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, slots: Tensor | None = None, spec: AttentionSpec = PLAIN
) -> Tensor:
    (b, t, h, d), (held, g) = q.shape, keys.shape[1:3]
    out = q.new_empty(b, t, h, d)
    tile = prefill_tile(d, q.dtype, capabilities_of(q.device))
    _prefill[(triton.cdiv(t, tile.rows), h, b)](
        q, keys, values, starts, slots if slots is not None else starts, out, spec.scale_of(d), spec.softcap or 0.0,
        spec.window or 0, held, h // g, d, t,
        starts.stride(0), slots.stride(0) if slots is not None else 0, q.stride(0), q.stride(1),
        out.stride(0), out.stride(1), keys.stride(0), keys.stride(1),
        slots is not None, spec.window is not None, spec.softcap is not None,
        tile.rows, tile.positions, triton.next_power_of_2(max(16, d)),
        num_warps=tile.warps, num_stages=2, enable_fp_fusion=False,
    )  # fmt: skip
    return out


class PrefillTile(NamedTuple):
    """Tile sizes of a program: queries and positions of the cache."""

    rows: int
    positions: int
    warps: int


def prefill_tile(head_size: int, dtype: torch.dtype, capabilities: Capabilities) -> PrefillTile:
    """The tile for a head size, such that queries, keys, values and sums fit into registers and shared memory.

    Other GPUs than Hopper and B200 hold operands of dots in registers too: heads of 256 would spill with 4 warps.
    """
    if dtype == torch.float32:
        return PrefillTile(16, 16, 4)
    if head_size <= 128:
        return PrefillTile(64, 64, 4)
    return PrefillTile(64, 32, 4 if capabilities.shared_operands else 8)


@triton.jit
def _prefill(
    q, keys, values, starts, slots, out, scale, softcap, window, held, shared, d, length,
    starts_stride, slots_stride, q_stride, q_position_stride,
    out_stride, out_position_stride, slot_stride, position_stride,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, each = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(starts + each * starts_stride)
    slot = tl.load(slots + each * slots_stride).to(tl.int64) if SLOTS else each
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    wide = column < d
    inside = (row[:, None] < length) & wide[None, :]
    at = row[:, None].to(tl.int64)
    query = tl.load(q + each * q_stride + at * q_position_stride + head * d + column[None, :], mask=inside, other=0)
    end = start + tl.minimum(tl.program_id(0) * ROWS + ROWS, length)  # of the positions that the last query sees
    place = slot * slot_stride + (head // shared) * d
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    mix = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    # The tile of the first position that the first query sees; tiles are at the same positions for all queries.
    begin = tl.maximum(start + tl.program_id(0) * ROWS + 1 - window, 0) // TILE * TILE if WINDOW else 0
    for first in range(begin, end, TILE):
        position = first + tl.arange(0, TILE)
        cached = position < end
        cell = position % held if WINDOW else position  # without a window all positions are held
        pitch = cell.to(tl.int64) * position_stride  # int64: a cache may have more than 2^31 elements
        key = tl.load(keys + place + pitch[None, :] + column[:, None], mask=cached[None, :] & wide[:, None], other=0)
        score = tl.dot(query, key, input_precision="ieee") * scale  # (ROWS, TILE)
        if SOFTCAP:
            score = _capped(score, softcap)
        seen = position[None, :] <= start + row[:, None]
        if WINDOW:
            seen = seen & (position[None, :] > start + row[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        # A query that has seen nothing yet, since its window begins later: exp(-inf - 0) is 0, exp(-inf + inf) is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher) if WINDOW else higher
        share, decay = tl.exp(score - base[:, None]), tl.exp(highest - base)
        value = tl.load(
            values + place + pitch[:, None] + column[None, :], mask=cached[:, None] & wide[None, :], other=0
        )
        mix = tl.dot(share.to(value.dtype), value, mix * decay[:, None], input_precision="ieee")  # (ROWS, WIDTH)
        total = total * decay + tl.sum(share, axis=1)
        highest = higher
    mix = mix / total[:, None]
    target = out + each * out_stride + at * out_position_stride + head * d + column[None, :]
    tl.store(target, mix.to(out.dtype.element_ty), mask=inside)
