"""Attention over a key/value cache, batch-invariant (ops/tiles.py).

Legend: B rows of a batch, T new positions of each, S positions of a slot of the cache, H query heads, G key/value
heads, D the size of a head.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.hardware.capabilities import capabilities_of
from octavo.ops import tiles
from octavo.runtime.dispatch import kernel


@kernel
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int
) -> Tensor:
    """Stores k and v (B, G, D) of one new token a slot, then attends from q (B, H, D) to all positions of the slot.

    keys and values are (B, S, G, D); the first lengths[b] positions of slot b are filled, at most `longest`. A slot
    with the length -1 is idle: nothing is stored, its result is 0. Returns (B, H, D).
    """
    out = torch.zeros_like(q)
    for row, length in enumerate(lengths.tolist()):  # one call a slot: its shape depends on no other slot
        if length < 0:
            continue
        keys[row, length], values[row, length] = k[row], v[row]
        # Query heads that share a key head are queries of one head: no key is repeated.
        queries = q[row].unflatten(0, (keys.shape[2], -1))  # (G, H / G, D)
        out[row] = _attend(queries, keys[row, : length + 1], values[row, : length + 1]).flatten(0, 1)
    return out


@kernel
def prefill_attention(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, slots: Tensor | None = None) -> Tensor:
    """Causal attention of T new positions of each row. Their keys and values are already in the cache.

    q is (B, T, H, D); row b reads slot slots[b] (b if left out) of keys and values (n, S, G, D), and its first new
    position is starts[b]. Returns (B, T, H, D).
    """
    shared = q.shape[2] // keys.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row, start in enumerate(starts.tolist()):
        slot = row if slots is None else int(slots[row])
        for first in range(0, q.shape[1], tiles.PREFILL_TILE):
            tile = q[row, first : first + tiles.PREFILL_TILE].transpose(0, 1)  # (H, t, D)
            end = start + first + tile.shape[1]
            seen = torch.ones(tile.shape[1], end, dtype=torch.bool, device=q.device).tril(start + first)
            result = _attend(tile, keys[slot, :end], values[slot, :end], mask=seen, repeat=shared)
            out[row, first : first + tiles.PREFILL_TILE] = result.transpose(0, 1)
    return out


def _attend(q: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None, repeat: int = 1) -> Tensor:
    """q (H, t, D) over keys and values (L, H / repeat, D) of one slot."""
    k, v = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    # On an H100 PyTorch's memory-efficient kernel with a mask failed with misaligned addresses.
    with sdpa_kernel(SDPBackend.MATH) if capabilities_of(q.device).is_gpu else nullcontext():
        return F.scaled_dot_product_attention(q[None], k, v, attn_mask=mask)[0]
