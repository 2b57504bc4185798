"""Attention with soft-capped scores, as FlashAttention (arXiv 2205.14135, 2307.08691). Reference: ops/softcap.py.

The forward pass has a program for some queries of a head, which iterates over blocks of the keys that they see and
saves lse. The backward has no atomic additions, so its results are deterministic: a pass for dq over blocks of keys,
which also saves delta = sum(g o), and one or two passes for dk and dv over blocks of the queries of all heads that
share a key head. A pass visits only blocks with a query that sees a key: a query's first key `oldest` and a key's last
query `newest` never decrease along a row, so the first and the last of a block bound those between. Only blocks in
which some query does not see some key have a mask.

Loops count blocks. With a loop over positions ptxas 12.8 found that the matmuls of Hopper overlap nothing ("wgmma
instructions are serialized").

Exponents are powers of 2: scores are multiplied by log2(e). Legend as in the reference; a program has BM queries, BN
keys; `*_row`, `*_position` and `*_head` are strides in elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.hardware.capabilities import capabilities_of
from octavo.kernels.softcap_tiles import Tiles, kv_passes, tiles_for, width_of
from octavo.ops.softcap import CappedSpec, Extents
from octavo.runtime.dispatch import KERNELS, observe

LOG2E = 1.4426950408889634


def softcapped_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: CappedSpec, extents: Extents | None
) -> tuple[Tensor, Tensor]:
    (b, t, h, d), g = q.shape, k.shape[2]
    out, lse = q.new_empty(b, t, h, d), q.new_empty(b, h, t, dtype=torch.float32)
    if q.is_meta:
        observe("attention", [q, k, v, out, lse])
        return out, lse
    if (tiles := _tiles(q)) is None:
        results: tuple[Tensor, Tensor] = KERNELS["softcap.softcapped_forward"](q, k, v, spec, extents)
        return results
    tile = tiles.forward
    _forward[(triton.cdiv(t, tile.queries), h, b)](
        q, k, v, out, lse, extents.start if extents is not None else lse,
        *_numbers(spec), t, h // g, *_strides(q, k, v, out),
        extents is not None, spec.window is not None, q.dtype == torch.float32, d, width_of(d), tile.queries, tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def softcapped_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, spec: CappedSpec, extents: Extents | None
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = _tiles(q)
    if tiles is None and not q.is_meta:
        results: tuple[Tensor, Tensor, Tensor] = KERNELS["softcap.softcapped_backward"](
            q, k, v, out, lse, grad, spec, extents
        )
        return results
    (b, t, h, d), g = q.shape, k.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)  # (B, H, T)
    if q.is_meta or tiles is None:
        observe("attention_backward", [q, k, v, q, k, v, out, grad, grad, lse, lse, delta, delta, dq, dk, dv])
        return dq, dk, dv
    flags = extents is not None, spec.window is not None, q.dtype == torch.float32, d, width_of(d)
    tile = tiles.dq
    _backward_q[(triton.cdiv(t, tile.queries), h, b)](
        q, k, v, out, grad, dq, lse, delta, extents.start if extents is not None else lse,
        *_numbers(spec), t, h // g, *_strides(q, k, v, out, grad, dq), *flags, tile.queries, tile.keys,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    for tile, outputs in kv_passes(tiles):
        _backward_kv[(triton.cdiv(t, tile.keys), g, b)](
            q, k, v, grad, dk, dv, lse, delta, extents.stop if extents is not None else lse,
            *_numbers(spec), t, h // g, *_strides(q, k, v, grad, dk, dv), *flags, tile.queries, tile.keys, **outputs,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dq, dk, dv


def _tiles(q: Tensor) -> Tiles | None:
    return tiles_for(capabilities_of(q.device).shared_memory_bytes, q.shape[3], q.itemsize)


def _numbers(spec: CappedSpec) -> tuple[float, float, float, int]:
    """scale; 2 log2(e) scale / c, which times q k^T is the argument of `_tanh`; log2(e) c; the window."""
    return spec.scale, 2 * LOG2E * spec.scale / spec.softcap, LOG2E * spec.softcap, spec.window or 0


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@triton.jit
def _tanh(z, PRECISE: tl.constexpr):
    """tanh(x) for z = 2 log2(e) x. PRECISE: with a relative error, where a difference has an absolute one."""
    z = tl.minimum(z, 120.0)  # tanh is 1 there; 2^z overflows float32 beyond 128
    y = 1 - 2 / (tl.exp2(z) + 1)
    if PRECISE:
        x = tl.maximum(z, -120.0) * 0.34657359027997264  # ln(2) / 2
        x2 = x * x
        series = 62 / 2835 - x2 * (1382 / 155925)  # next term: 4e-9 of the result at 0.3
        series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * series))))
        y = tl.where(tl.abs(x) < 0.3, series, y)
    return y


@triton.jit
def _load(x, first, stride, length, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, WIDTH) of positions from `first` on, 0 outside; x is the address of position 0 of a head."""
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (first + row < length)[:, None]
    if D < WIDTH:
        inside = inside & (column < D)[None, :]
    return tl.load(
        x + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :], mask=inside, other=0
    )


@triton.jit
def _store(x, value, first, stride, length, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = (first + row < length)[:, None]
    if D < WIDTH:
        inside = inside & (column < D)[None, :]
    at = x + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _oldest(starts, position, window, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """The first position that the query at `position` sees."""
    oldest = position * 0
    if DOCUMENTS:
        oldest = tl.load(starts + position)
    if WINDOW:
        oldest = tl.maximum(oldest, position - window + 1)
    return oldest


@triton.jit
def _newest(stops, position, window, length, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """The last position whose query sees the key at `position`."""
    newest = position * 0 + length - 1
    if DOCUMENTS:
        newest = tl.load(stops + position) - 1
    if WINDOW:
        newest = tl.minimum(newest, position + window - 1)
    return newest


@triton.jit
def _visible_keys(
    starts, first, window, length, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """(begin, full, masked, end) of the blocks of keys for BM queries: all see all keys of those in [full, masked)."""
    last = tl.minimum(first + BM, length) - 1
    begin = _oldest(starts, first, window, DOCUMENTS, WINDOW) // BN * BN
    full = tl.minimum(tl.cdiv(_oldest(starts, last, window, DOCUMENTS, WINDOW), BN) * BN, last + 1)
    return begin, full, tl.maximum((first + 1) // BN * BN, full), last + 1


@triton.jit
def _attend(
    query, k, v, mix, total, highest, row, oldest, begin, end, factor, ceiling, length, k_position, v_position,
    MASKED: tl.constexpr, PRECISE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds the keys of [begin, end) to the sums of the online softmax: when the maximum rises, they are scaled down."""
    for index in range(tl.cdiv(end - begin, BN)):
        first = begin + index * BN
        key = _load(k, first, k_position, length, D, WIDTH, BN)
        score = _tanh(tl.dot(query, tl.trans(key), input_precision="ieee") * factor, PRECISE) * ceiling  # (BM, BN)
        if MASKED:
            at = first + tl.arange(0, BN)
            score = tl.where((at[None, :] <= row[:, None]) & (at[None, :] >= oldest[:, None]), score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, axis=1))
        # A query that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        share, decay = tl.exp2(score - base[:, None]), tl.exp2(highest - base)
        value = _load(v, first, v_position, length, D, WIDTH, BN)
        mix = tl.dot(share.to(value.dtype), value, mix * decay[:, None], input_precision="ieee")  # (BM, WIDTH)
        total = total * decay + tl.sum(share, axis=1)
        highest = higher
    return mix, total, highest


@triton.jit
def _forward(
    q, k, v, out, lse, starts, scale, factor, ceiling, window, length, shared,
    q_row, q_position, q_head, k_row, k_position, k_head, v_row, v_position, v_head, out_row, out_position, out_head,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, PRECISE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # The last queries see most keys, so their programs start first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // shared  # the key/value head of a query head (GQA)
    q, k, v = q + batch * q_row + head * q_head, k + batch * k_row + group * k_head, v + batch * v_row + group * v_head
    starts += batch * length
    row = first + tl.arange(0, BM)
    oldest = _oldest(starts, tl.minimum(row, length - 1), window, DOCUMENTS, WINDOW)
    query = _load(q, first, q_position, length, D, WIDTH, BM)
    highest = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    mix = tl.zeros((BM, WIDTH), dtype=tl.float32)
    begin, full, masked, end = _visible_keys(starts, first, window, length, DOCUMENTS, WINDOW, BM, BN)
    if DOCUMENTS or WINDOW:
        mix, total, highest = _attend(
            query, k, v, mix, total, highest, row, oldest, begin, full, factor, ceiling, length,
            k_position, v_position, True, PRECISE, D, WIDTH, BN,
        )  # fmt: skip
    mix, total, highest = _attend(
        query, k, v, mix, total, highest, row, oldest, full, masked, factor, ceiling, length,
        k_position, v_position, False, PRECISE, D, WIDTH, BN,
    )  # fmt: skip
    mix, total, highest = _attend(
        query, k, v, mix, total, highest, row, oldest, masked, end, factor, ceiling, length,
        k_position, v_position, True, PRECISE, D, WIDTH, BN,
    )  # fmt: skip
    _store(out + batch * out_row + head * out_head, mix / total[:, None], first, out_position, length, D, WIDTH, BM)
    sums = (highest + tl.log2(total)) * 0.6931471805599453  # ln(2)
    tl.store(lse + (batch * tl.num_programs(1) + head) * length + row, sums, mask=row < length)


@triton.jit
def _add_dq(
    query, g, k, v, dq, row, oldest, log_sum, delta, begin, end, factor, ceiling, length, k_position, v_position,
    MASKED: tl.constexpr, PRECISE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq / scale with the terms of the keys of [begin, end)."""
    for index in range(tl.cdiv(end - begin, BN)):
        first = begin + index * BN
        key = _load(k, first, k_position, length, D, WIDTH, BN)
        value = _load(v, first, v_position, length, D, WIDTH, BN)
        capped = _tanh(tl.dot(query, tl.trans(key), input_precision="ieee") * factor, PRECISE)  # (BM, BN)
        p = tl.exp2(capped * ceiling - log_sum[:, None])
        if MASKED:
            at = first + tl.arange(0, BN)
            p = tl.where((at[None, :] <= row[:, None]) & (at[None, :] >= oldest[:, None]), p, 0.0)
        dp = tl.dot(g, tl.trans(value), input_precision="ieee")
        da = p * (dp - delta[:, None]) * (1 - capped * capped)
        dq = tl.dot(da.to(key.dtype), key, dq, input_precision="ieee")  # (BM, WIDTH)
    return dq


@triton.jit
def _backward_q(
    q, k, v, out, grad, dq, lse, delta, starts, scale, factor, ceiling, window, length, shared,
    q_row, q_position, q_head, k_row, k_position, k_head, v_row, v_position, v_head, out_row, out_position, out_head,
    grad_row, grad_position, grad_head, dq_row, dq_position, dq_head,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, PRECISE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // shared
    q, k, v = q + batch * q_row + head * q_head, k + batch * k_row + group * k_head, v + batch * v_row + group * v_head
    starts += batch * length
    row = first + tl.arange(0, BM)
    oldest = _oldest(starts, tl.minimum(row, length - 1), window, DOCUMENTS, WINDOW)
    g = _load(grad + batch * grad_row + head * grad_head, first, grad_position, length, D, WIDTH, BM)
    o = _load(out + batch * out_row + head * out_head, first, out_position, length, D, WIDTH, BM)
    dot = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)  # sum(dp p) of a query
    at = (batch * tl.num_programs(1) + head) * length + row
    tl.store(delta + at, dot, mask=row < length)
    log_sum = tl.load(lse + at, mask=row < length, other=0) * 1.4426950408889634  # log2(e)
    query = _load(q, first, q_position, length, D, WIDTH, BM)
    sums = tl.zeros((BM, WIDTH), dtype=tl.float32)
    begin, full, masked, end = _visible_keys(starts, first, window, length, DOCUMENTS, WINDOW, BM, BN)
    if DOCUMENTS or WINDOW:
        sums = _add_dq(
            query, g, k, v, sums, row, oldest, log_sum, dot, begin, full, factor, ceiling, length,
            k_position, v_position, True, PRECISE, D, WIDTH, BN,
        )  # fmt: skip
    sums = _add_dq(
        query, g, k, v, sums, row, oldest, log_sum, dot, full, masked, factor, ceiling, length,
        k_position, v_position, False, PRECISE, D, WIDTH, BN,
    )  # fmt: skip
    sums = _add_dq(
        query, g, k, v, sums, row, oldest, log_sum, dot, masked, end, factor, ceiling, length,
        k_position, v_position, True, PRECISE, D, WIDTH, BN,
    )  # fmt: skip
    _store(dq + batch * dq_row + head * dq_head, sums * scale, first, dq_position, length, D, WIDTH, BM)


@triton.jit
def _add_dkv(
    key, value, q, grad, lse, delta, dk, dv, at, newest, begin, end, factor, ceiling, length, shared,
    q_position, q_head, grad_position, grad_head,
    MASKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PRECISE: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(dk / scale, dv) with the terms of the queries of [begin, end) of all heads that share the key head."""
    blocks = tl.cdiv(end - begin, BM)
    for index in range(shared * blocks):  # one loop: loads of the next head begin in the last block of a head
        head, first = index // blocks, begin + index % blocks * BM
        row = first + tl.arange(0, BM)
        query = _load(q + head * q_head, first, q_position, length, D, WIDTH, BM)
        g = _load(grad + head * grad_head, first, grad_position, length, D, WIDTH, BM)
        log_sum = tl.load(lse + head * length + row, mask=row < length, other=0) * 1.4426950408889634  # log2(e)
        capped = _tanh(tl.dot(key, tl.trans(query), input_precision="ieee") * factor, PRECISE)  # (BN, BM)
        p = tl.exp2(capped * ceiling - log_sum[None, :])
        if MASKED:
            p = tl.where((at[:, None] <= row[None, :]) & (newest[:, None] >= row[None, :]), p, 0.0)
        if DV:
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")  # (BN, WIDTH)
        if DK:
            dot = tl.load(delta + head * length + row, mask=row < length, other=0)
            dp = tl.dot(value, tl.trans(g), input_precision="ieee")
            da = p * (dp - dot[None, :]) * (1 - capped * capped)
            dk = tl.dot(da.to(query.dtype), query, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _backward_kv(
    q, k, v, grad, dk, dv, lse, delta, stops, scale, factor, ceiling, window, length, shared,
    q_row, q_position, q_head, k_row, k_position, k_head, v_row, v_position, v_head,
    grad_row, grad_position, grad_head, dk_row, dk_position, dk_head, dv_row, dv_position, dv_head,
    DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, PRECISE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stops += batch * length
    at = first + tl.arange(0, BN)
    newest = _newest(stops, tl.minimum(at, length - 1), window, length, DOCUMENTS, WINDOW)
    key = _load(k + batch * k_row + group * k_head, first, k_position, length, D, WIDTH, BN)
    value = key
    if DK:
        value = _load(v + batch * v_row + group * v_head, first, v_position, length, D, WIDTH, BN)
    dkey, dvalue = tl.zeros((BN, WIDTH), dtype=tl.float32), tl.zeros((BN, WIDTH), dtype=tl.float32)
    # Blocks of queries: [begin, full) have some before the last key, [full, masked) see all keys, up to `end` some.
    last = tl.minimum(first + BN, length) - 1
    end = _newest(stops, last, window, length, DOCUMENTS, WINDOW) + 1
    begin = first // BM * BM
    full = tl.cdiv(last, BM) * BM
    masked = end
    if DOCUMENTS or WINDOW:
        masked = tl.maximum((_newest(stops, first, window, length, DOCUMENTS, WINDOW) + 1) // BM * BM, full)
    head = group * shared  # the first of those that share the key head
    q, grad = q + batch * q_row + head * q_head, grad + batch * grad_row + head * grad_head
    sums = (batch * tl.num_programs(1) * shared + head) * length
    lse, delta = lse + sums, delta + sums
    dkey, dvalue = _add_dkv(
        key, value, q, grad, lse, delta, dkey, dvalue, at, newest, begin, full, factor, ceiling, length, shared,
        q_position, q_head, grad_position, grad_head, True, DK, DV, PRECISE, D, WIDTH, BM,
    )  # fmt: skip
    dkey, dvalue = _add_dkv(
        key, value, q, grad, lse, delta, dkey, dvalue, at, newest, full, masked, factor, ceiling, length, shared,
        q_position, q_head, grad_position, grad_head, False, DK, DV, PRECISE, D, WIDTH, BM,
    )  # fmt: skip
    if DOCUMENTS or WINDOW:
        dkey, dvalue = _add_dkv(
            key, value, q, grad, lse, delta, dkey, dvalue, at, newest, masked, end, factor, ceiling, length, shared,
            q_position, q_head, grad_position, grad_head, True, DK, DV, PRECISE, D, WIDTH, BM,
        )  # fmt: skip
    if DK:
        _store(dk + batch * dk_row + group * dk_head, dkey * scale, first, dk_position, length, D, WIDTH, BN)
    if DV:
        _store(dv + batch * dv_row + group * dv_head, dvalue, first, dv_position, length, D, WIDTH, BN)
