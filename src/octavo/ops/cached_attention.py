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
from octavo.ops.attention import PLAIN, AttentionSpec
from octavo.ops.softcap import softcapped_weights
from octavo.runtime.dispatch import kernel

# Where keys before a window are left out, the first key that is read is at a multiple of this: PyTorch's CPU attention
# sums in blocks of as many keys, and the bits of a query must not depend on the chunk that it is in.
KEY_BLOCK = 512


@kernel
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int,
    spec: AttentionSpec = PLAIN,
) -> Tensor:  # fmt: skip
    """Stores k and v (B, G, D) of one new token a slot, then attends from q (B, H, D) to the positions that it sees.

    keys and values are (B, S, G, D) and hold position p of a slot at p mod S; S is at least the window of `spec`. The
    first lengths[b] positions of slot b were stored before, at most `longest`; without a window they are all held. A
    slot with the length -1 is idle: nothing is stored, its result is 0. Returns (B, H, D).
    """
    out, held = torch.zeros_like(q), keys.shape[1]
    for row, length in enumerate(lengths.tolist()):  # one call a slot: its shape depends on no other slot
        if length < 0:
            continue
        keys[row, length % held], values[row, length % held] = k[row], v[row]
        first = 0 if spec.window is None else max(0, length + 1 - spec.window)
        cells = ring_cells(first, length + 1, held, q.device)
        # Query heads that share a key head are queries of one head: no key is repeated.
        queries = q[row].unflatten(0, (keys.shape[2], -1))  # (G, H / G, D)
        out[row] = _attend(queries, keys[row, cells], values[row, cells], spec).flatten(0, 1)
    return out


@kernel(dots=True)
def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, slots: Tensor | None = None, spec: AttentionSpec = PLAIN
) -> Tensor:
    """Causal attention of T new positions of each row. Their keys and values are already in the cache.

    q is (B, T, H, D); row b reads slot slots[b] (b if left out) of keys and values (n, S, G, D), and its first new
    position is starts[b]. Position p is held at p mod S; with a window w, S is at least w + T or holds all positions.
    Returns (B, T, H, D).
    """
    shared, held = q.shape[2] // keys.shape[2], keys.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for row, start in enumerate(starts.tolist()):
        slot = row if slots is None else int(slots[row])
        for begin in range(0, q.shape[1], tiles.PREFILL_TILE):
            tile = q[row, begin : begin + tiles.PREFILL_TILE].transpose(0, 1)  # (H, t, D)
            end = start + begin + tile.shape[1]
            low = 0 if spec.window is None else max(0, start + begin + 1 - spec.window) // KEY_BLOCK * KEY_BLOCK
            seen = torch.ones(tile.shape[1], end - low, dtype=torch.bool, device=q.device).tril(start + begin - low)
            if spec.window is not None:
                seen = seen.triu(start + begin - low + 1 - spec.window)
            cells = ring_cells(low, end, held, q.device)
            result = _attend(tile, keys[slot, cells], values[slot, cells], spec, mask=seen, repeat=shared)
            out[row, begin : begin + tiles.PREFILL_TILE] = result.transpose(0, 1)
    return out


def ring_cells(first: int, end: int, held: int, device: torch.device) -> slice | Tensor:
    """Where `held` cells hold the positions from `first` to before `end`: a slice, or int64 if they wrap around."""
    if end <= held:
        return slice(first, end)
    return torch.arange(first, end, device=device) % held


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, *, mask: Tensor | None = None, repeat: int = 1
) -> Tensor:
    """q (H, t, D) over keys and values (L, H / repeat, D) of one slot."""
    k, v = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if spec.softcap is not None:
        seen = mask if mask is not None else torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
        weights, _ = softcapped_weights(q[None], k, seen, spec.scale_of(q.shape[-1]), spec.softcap)
        return (weights.to(v.dtype) @ v)[0]
    # On an H100 PyTorch's memory-efficient kernel with a mask failed with misaligned addresses.
    with sdpa_kernel(SDPBackend.MATH) if capabilities_of(q.device).is_gpu else nullcontext():
        return F.scaled_dot_product_attention(q[None], k, v, attn_mask=mask, scale=spec.scale)[0]
