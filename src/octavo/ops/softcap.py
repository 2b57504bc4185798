"""Attention with soft-capped scores, which no fused attention of PyTorch computes (Gemma 2, arXiv 2408.00118).

    a = scale q k^T,  s = c tanh(a / c),  p = softmax(s over the seen keys) = exp(s - lse),  o = p v

where lse = log(sum(exp(s))) of a query. The backward, with g the gradient of o:

    dv = p^T g,  dp = g v^T,  ds = p (dp - sum(dp p)),  da = ds (1 - (s / c)^2),  dq = scale da k,  dk = scale da^T q

A query sees its own position and those before it: in its document, and with a window w at most the last w with its own.
Forward and backward compute the scores of some queries at a time, so that no (T, T) matrix of them is stored.

Legend: B rows of a batch, T positions, H query heads, G key/value heads (G divides H), R = H / G, D the size of a head;
a chunk has C queries, which see S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.runtime.dispatch import kernel, observe

CHUNK = 256  # queries whose scores exist at a time


class CappedSpec(NamedTuple):
    """The scores of soft-capped attention; a query sees the last `window` positions, None: all."""

    scale: float
    softcap: float
    window: int | None = None


class Extents(NamedTuple):
    """Where the document of each position starts and ends in its row, (B, T) int32 each.

    Documents are in order and have no gaps: neither start nor stop decreases along a row. Padding is a document too.
    """

    start: Tensor  # the first position of the document
    stop: Tensor  # the position after its last one


def softcapped_attention(q: Tensor, k: Tensor, v: Tensor, spec: CappedSpec, extents: Extents | None = None) -> Tensor:
    """o (B, T, H, D) of q (B, T, H, D), k and v (B, T, G, D). Without `extents` a row is one document."""
    out: Tensor = _Softcapped.apply(q, k, v, spec, extents)  # type: ignore[no-untyped-call]
    return out


def softcapped_weights(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """(p, s / c), each (.., C, S) float32, of queries q (.., C, D) and keys k (.., S, D), `seen` (.., C, S)."""
    scores, capped = _scores(q, k, seen, scale, softcap)
    return scores.softmax(dim=-1), capped


class _Softcapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: CappedSpec, extents: Extents | None) -> Tensor:
        q, k, v = (_with_rows(x) for x in (q, k, v))
        out, lse = softcapped_forward(q, k, v, spec, extents)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec, ctx.extents = spec, extents
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *softcapped_backward(q, k, v, out, lse, _with_rows(grad), ctx.spec, ctx.extents), None, None


@kernel(on_meta="kernel", dots=True)
def softcapped_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: CappedSpec, extents: Extents | None
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, D), lse (B, H, T) float32)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if q.is_meta:
        observe("attention", [q, k, v, out])
    for chunk, visible in _chunks(q, spec.window):
        queries, keys, values = _by_group(q[:, chunk], k), k[:, visible].transpose(1, 2), v[:, visible].transpose(1, 2)
        scores, _ = _scores(queries, keys, _seen(chunk, visible, q, k, spec, extents), spec.scale, spec.softcap)
        sums = scores.logsumexp(dim=-1)  # (B, G, R C)
        weights = (scores - sums[..., None]).exp()
        out[:, chunk] = _by_head(weights.to(v.dtype) @ values, q)
        lse[:, :, chunk] = sums.unflatten(2, (q.shape[2] // k.shape[2], -1)).flatten(1, 2)  # (B, H, C)
    return out, lse


@kernel(on_meta="kernel", dots=True)
def softcapped_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, spec: CappedSpec, extents: Extents | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous; `grad` is that of the output."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    if q.is_meta:
        observe("attention_backward", [q, k, v, q, dq, dk, dv])
    for chunk, visible in _chunks(q, spec.window):
        keys, values = (x[:, visible].transpose(1, 2).float() for x in (k, v))  # (B, G, S, D)
        queries, g = (_by_group(x[:, chunk], k).float() for x in (q, grad))  # (B, G, R C, D)
        seen = _seen(chunk, visible, q, k, spec, extents)
        scores, capped = _scores(queries, keys, seen, spec.scale, spec.softcap)
        p = (scores - _by_group(lse[:, :, chunk].transpose(1, 2)[..., None], k)).exp()  # (B, G, R C, S)
        dv[:, visible] += (p.transpose(-1, -2) @ g).transpose(1, 2)
        dp = g @ values.transpose(-1, -2)
        da = p * (dp - (dp * p).sum(dim=-1, keepdim=True)) * (1 - capped.square()) * spec.scale
        dq[:, chunk] = _by_head(da @ keys, q)
        dk[:, visible] += (da.transpose(-1, -2) @ queries).transpose(1, 2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """(s, s / c), each (.., C, S) float32; s is -inf where a query does not see a key."""
    capped = torch.tanh(q.float() @ k.float().transpose(-1, -2) * (scale / softcap))
    return (softcap * capped).masked_fill(~seen, -torch.inf), capped


def _chunks(q: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries whose scores exist at a time, the keys that they may see).

    In a simulation of memory the last chunk represents all: the peak is its.
    """
    length = q.shape[1]
    for first in range(max(0, length - CHUNK) if q.is_meta else 0, length, CHUNK):
        last = min(first + CHUNK, length)
        yield slice(first, last), slice(0 if window is None else max(0, first + 1 - window), last)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """(B, C, H, ..) as (B, G, R C, ..): the queries of all heads that share a key head are rows of one matrix."""
    grouped: Tensor = x.unflatten(2, (k.shape[2], -1)).movedim(1, 3).flatten(2, 3)
    return grouped


def _by_head(x: Tensor, q: Tensor) -> Tensor:
    """(B, G, R C, D) as (B, C, H, D)."""
    heads: Tensor = x.unflatten(2, (q.shape[2] // x.shape[1], -1)).movedim(3, 1).flatten(2, 3)
    return heads


def _seen(queries: slice, keys: slice, q: Tensor, k: Tensor, spec: CappedSpec, extents: Extents | None) -> Tensor:
    """(B or 1, 1, R C, S), true where a query sees a key; the queries of R heads are rows."""
    position = torch.arange(q.shape[1], device=q.device)
    query, key = position[queries, None], position[keys]  # (C, 1), (S,)
    seen = (key <= query)[None]  # (1, C, S)
    if spec.window is not None:
        seen = seen & (key > query - spec.window)
    if extents is not None:
        seen = seen & (key >= extents.start[:, queries, None])
    return seen[:, None].repeat(1, 1, q.shape[2] // k.shape[2], 1)


def _with_rows(x: Tensor) -> Tensor:
    """x, or a copy if the values of a head are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()
