"""Rotary positions and causal attention, over packed documents or over a key/value cache.

Legend: B rows of a batch, T positions, S cached positions, H query heads, G key/value heads (G divides H),
D the size of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_table(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (B, T, 1, R/2) float32, of positions (B, T) times R/2 frequencies (RoFormer, 2104.09864)."""
    angles = positions.float()[..., None] * frequencies.float()
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate_interleaved(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first R numbers of each head in pairs (2i, 2i+1), GPT-J's form. x is (B, T, H, D)."""
    cos, sin = table
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotate_half(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates each head in pairs (i, i + D/2), Llama's form. x is (B, T, H, D)."""
    cos, sin = table
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def document_mask(document: Tensor | None) -> Tensor | None:
    """(B, 1, T, T), true where a position may look: itself and what precedes it in its own document.

    `document` (B, T) numbers the documents packed into each row, -1 on padding. None where each row holds one
    document, which needs no mask beyond the causal one.
    """
    if document is None or bool((document == document[:, :1]).all()):
        return None
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def cache_mask(start: int, length: int, device: torch.device) -> Tensor | None:
    """(1, 1, length, start + length) for new positions after `start` cached ones; None if one mask-free call does."""
    if length == 1 or start == 0:
        return None
    new = torch.arange(start, start + length, device=device)
    return (torch.arange(start + length, device=device)[None, :] <= new[:, None])[None, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, T, H, D), each position looking at itself and before.

    q is (B, T, H, D), k and v are (B, S, G, D). Without a mask S is T and the whole row is one document, or T
    is 1 and the position sees all of the cache. `mask` comes from `document_mask` or `cache_mask`.
    """
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    causal = mask is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)
