"""The key/value cache of inference, allocated once for a fixed number of positions.

A forward pass over T new positions calls `view = cache.next(T)` once. Each block then calls `view.attend`, which stores
the block's new keys and values and attends over all of them, and at the end the pass calls `view.finish`. There are
three views, for three kinds of passes: AppendView (any number of tokens after equally many in every row), PrefillView
(entire prompts into empty slots) and DecodeView (one token in each of several slots of different lengths).

Legend: L blocks, B rows of a batch, T new positions, S positions allocated (max_len), H query heads, G key/value heads,
D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.ops.attention import PLAIN, AttentionSpec
from octavo.ops.cached_attention import decode_attention, prefill_attention
from octavo.ops.tiles import Phase


class CacheView(Protocol):
    """A forward pass over T new positions of each row of a cache."""

    @property
    def phase(self) -> Phase:
        """Prefill, or decode of one new token for each row: it selects the tiles of all matmuls (ops/tiles.py)."""
        ...

    @property
    def positions(self) -> Tensor:
        """(B, T) int64, or (1, T) if they are the same in all rows; the rotary embedding needs them."""
        ...

    @property
    def max_len(self) -> int:
        """The greatest number of positions of a row."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        """Stores k and v (B, T, G, D) of one block. Returns (B, T, H, D): causal attention of q (B, T, H, D) over the
        stored and the new positions of its row."""
        ...

    def finish(self) -> None:
        """Adds T to the length of the cache, after all blocks. No effect if the caller counts lengths itself."""
        ...


class Cache(Protocol):
    """What `Decoder.hidden` needs of a cache."""

    def next(self, count: int) -> CacheView: ...


class KeyValueCache:
    """Rows of equal length; keys and values of every block. The first `length` positions of each row are stored."""

    def __init__(self, layers: int, *, batch: int, max_len: int, **shape: Any) -> None:
        self.keys, self.values = _empty_cache(torch.empty, layers, batch, max_len, **shape)  # (L, B, S, G, D) each
        self.max_len = max_len
        self.length = 0

    def next(self, count: int) -> CacheView:
        phase = Phase.DECODE if self.length and count == 1 else Phase.PREFILL
        return AppendView(self.keys, self.values, self.length, count, self._set_length, phase)

    def _set_length(self, length: int) -> None:
        self.length = length


class SlotCache:
    """Many requests at once: a slot of `max_len` positions for each. `lengths` are the stored positions of each slot.

    It is no `Cache` itself: `slot`, `prefill` and `decode` give one for a forward pass over one slot, over several
    prompts in empty slots, or over one token in each of the first slots.
    """

    def __init__(self, layers: int, *, slots: int, max_len: int, **shape: Any) -> None:
        # Attention multiplies masked values by 0, so none may be NaN.
        self.keys, self.values = _empty_cache(torch.zeros, layers, slots, max_len, **shape)  # (L, slots, S, G, D) each
        self.max_len = max_len
        self.lengths = [0] * slots

    def slot(self, number: int) -> Slot:
        """One slot as the cache of a batch of one row."""
        return Slot(self, number)

    def prefill(self, slots: Tensor, lengths: Tensor) -> PrefillView:
        """Prompts of `lengths` (B,) tokens in the empty slots `slots` (B,); both int64 on the cache's device."""
        return PrefillView(self, slots, lengths)

    def decode(self, lengths: Tensor, longest: int, phase: Phase = Phase.DECODE) -> DecodeView:
        """One new token in each of the first B slots. `lengths` (B,) int64 on the cache's device; -1: the slot is idle.

        `longest` is an upper bound of the lengths: known on the CPU, so that kernels need not wait for `lengths`.
        """
        return DecodeView(self, lengths, longest, phase)

    def copy_(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another and sets its length."""
        if source != target:
            self.keys[:, target, :length] = self.keys[:, source, :length]
            self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length

    def keys_finite(self, slot: int, count: int) -> Tensor:
        """() bool: whether the last `count` keys of a slot are finite.

        The output of attention does not show that: it may be finite although a key is NaN.
        """
        end = self.lengths[slot]
        return self.keys[:, slot, end - count : end].isfinite().all()

    def clear_(self, slot: int) -> None:
        """Empties a slot and overwrites it with zeros."""
        self.keys[:, slot], self.values[:, slot] = 0, 0
        self.lengths[slot] = 0


class Slot:
    """One slot as a `Cache` of one row, for any number of new tokens."""

    def __init__(self, cache: SlotCache, number: int) -> None:
        self.cache, self.number = cache, number

    def next(self, count: int) -> CacheView:
        row = slice(self.number, self.number + 1)
        keys, values = self.cache.keys[:, row], self.cache.values[:, row]  # (L, 1, S, G, D)
        return AppendView(keys, values, self.cache.lengths[self.number], count, self._set_length, Phase.PREFILL)

    def _set_length(self, length: int) -> None:
        self.cache.lengths[self.number] = length


class PrefillView:
    """Entire prompts in empty slots, padded at their end to T positions. It is the `Cache` of this pass and its view.

    The padding is stored as zeros: attention multiplies masked values by 0, so none may be NaN. A pass can be one CUDA
    graph, since all that changes from call to call is in tensors; the caller sets `SlotCache.lengths`. After the pass
    `finite` (B,) says whether all keys of a prompt are finite.
    """

    phase = Phase.PREFILL

    def __init__(self, cache: SlotCache, slots: Tensor, lengths: Tensor) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths
        self.max_len = cache.max_len
        self.finite = torch.ones_like(slots, dtype=torch.bool)  # (B,)
        self._starts = torch.zeros_like(slots)  # (B,): the slots are empty

    def next(self, count: int) -> CacheView:
        self.positions = torch.arange(count, device=self.slots.device)[None]  # (1, T)
        self._padding = (self.positions >= self.lengths[:, None])[:, :, None, None]  # (B, T, 1, 1)
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        for store, new in ((self.cache.keys, k), (self.cache.values, v)):
            padded = new.masked_fill(self._padding, 0)  # (B, T, G, D)
            store[layer, :, : new.shape[1]].index_copy_(0, self.slots, padded)
        self.finite &= (k.isfinite() | self._padding).flatten(1).all(dim=1)
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (slots, S, G, D) each
        return prefill_attention(q, keys, values, self._starts, self.slots, spec)

    def finish(self) -> None:
        return


class DecodeView:
    """One new token for each of the first slots, which have different lengths. It is the `Cache` of this step too.

    A step can be one CUDA graph, since all that changes from step to step is in tensors; the caller increments
    `SlotCache.lengths`.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor, longest: int, phase: Phase) -> None:
        self.cache, self.lengths, self.longest, self.phase = cache, lengths, longest, phase
        self.max_len = cache.max_len

    def next(self, count: int) -> CacheView:
        assert count == 1
        return self

    @property
    def positions(self) -> Tensor:
        return self.lengths.clamp_min(0)[:, None]  # (B, 1); an idle slot needs a valid position

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        rows = len(self.lengths)
        stored = self.cache.keys[layer, :rows], self.cache.values[layer, :rows]  # (B, S, G, D) each
        return decode_attention(q[:, 0], k[:, 0], v[:, 0], *stored, self.lengths, self.longest, spec)[:, None]

    def finish(self) -> None:
        return


class AppendView:
    """`count` new positions after `start` stored ones; both are the same for all rows."""

    def __init__(
        self, keys: Tensor, values: Tensor, start: int, count: int, set_length: Callable[[int], None], phase: Phase
    ) -> None:
        self.end = start + count
        assert self.end <= keys.shape[2], f"{self.end} positions in a cache of {keys.shape[2]}"
        self.keys, self.values, self.start, self.phase = keys, values, start, phase
        self.max_len = keys.shape[2]
        self._set_length = set_length
        self.positions = torch.arange(start, self.end, device=keys.device)[None]  # (1, T)
        self._starts = torch.full((keys.shape[1],), start, device=keys.device)  # (B,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]  # (B, S, G, D) each
        if self.phase is Phase.DECODE:
            return decode_attention(q[:, 0], k[:, 0], v[:, 0], keys, values, self._starts, self.start, spec)[:, None]
        keys[:, self.start : self.end] = k  # (B, T, G, D)
        values[:, self.start : self.end] = v
        return prefill_attention(q, keys, values, self._starts, spec=spec)

    def finish(self) -> None:
        self._set_length(self.end)


def _empty_cache(
    make: Callable[..., Tensor], layers: int, rows: int, max_len: int, *,
    heads: int, head_size: int, dtype: torch.dtype, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (layers, rows, max_len, heads, head_size)  # (L, rows, S, G, D)
    return make(shape, dtype=dtype, device=device), make(shape, dtype=dtype, device=device)
