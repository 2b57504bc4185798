"""Attention with soft-capped scores, which no fused attention of PyTorch computes (Gemma 2, arXiv 2408.00118).

    a = scale q k^T,  s = c tanh(a / c),  p = softmax(s over the seen keys),  o = p v

The backward, with g the gradient of o:

    dv = p^T g,  dp = g v^T,  ds = p (dp - sum(dp p)),  da = ds (1 - (s / c)^2),  dq = scale da k,  dk = scale da^T q

Forward and backward compute the scores of some queries at a time, so that no (T, T) matrix of them is stored.

Legend: B rows of a batch, T positions, H heads, D the size of a head, C the queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.runtime.dispatch import observe

CHUNK = 256  # queries whose scores exist at a time


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor | None = None
) -> Tensor:
    """o (B, T, H, D) of q, k and v (B, T, H, D); `mask` (B or 1, 1, T, T) is true where a query sees a key.

    Without a mask attention is causal.
    """
    out: Tensor = _Softcapped.apply(q, k, v, scale, softcap, mask)  # type: ignore[no-untyped-call]
    return out


def softcapped_weights(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """(p, s / c), each (.., C, S) float32, of queries q (.., C, D) and keys k (.., S, D), `seen` (.., C, S)."""
    capped = torch.tanh(q.float() @ k.float().transpose(-1, -2) * (scale / softcap))  # (.., C, S)
    return (softcap * capped).masked_fill(~seen, -torch.inf).softmax(dim=-1), capped


class _Softcapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.spec, ctx.mask = (scale, softcap), mask
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if q.is_meta:
            observe("attention", [q, k, v, out])
        for chunk in _chunks(q):
            queries, keys, values = _heads(q[:, chunk]), _heads(k), _heads(v)
            weights, _ = softcapped_weights(queries, keys, _seen(mask, chunk, q), scale, softcap)
            out[:, chunk] = (weights.to(v.dtype) @ values).transpose(1, 2)  # (B, C, H, D)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        scale, softcap = ctx.spec
        dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        if q.is_meta:
            observe("attention_backward", [q, k, v, q, dq, dk, dv])
        keys, values = _heads(k).float(), _heads(v).float()  # (B, H, T, D)
        for chunk in _chunks(q):
            queries, g = _heads(q[:, chunk]).float(), _heads(grad[:, chunk]).float()  # (B, H, C, D)
            p, capped = softcapped_weights(queries, keys, _seen(ctx.mask, chunk, q), scale, softcap)
            dv += (p.transpose(-1, -2) @ g).transpose(1, 2)
            dp = g @ values.transpose(-1, -2)  # (B, H, C, T)
            da = p * (dp - (dp * p).sum(dim=-1, keepdim=True)) * (1 - capped.square()) * scale
            dq[:, chunk] = (da @ keys).transpose(1, 2)
            dk += (da.transpose(-1, -2) @ queries).transpose(1, 2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _chunks(q: Tensor) -> Iterator[slice]:
    """The queries whose scores exist at a time. In a simulation of memory one chunk represents all: the peak is its."""
    for first in range(0, min(q.shape[1], CHUNK) if q.is_meta else q.shape[1], CHUNK):
        yield slice(first, first + CHUNK)


def _heads(x: Tensor) -> Tensor:
    """(B, T, H, D) as (B, H, T, D)."""
    return x.transpose(1, 2)


def _seen(mask: Tensor | None, queries: slice, q: Tensor) -> Tensor:
    """(B or 1, 1, C, T), true where one of the queries sees a key."""
    if mask is not None:
        return mask[:, :, queries]
    position = torch.arange(q.shape[1], device=q.device)
    return (position <= position[queries, None])[None, None]
