"""The key/value cache of generation: room for a known number of positions, taken once.

A cache is asked for the next T positions of its rows and gives a `Pass`: where they stand, and attention over what
is held and what is new.

Legend: L blocks, B rows of a batch, T new positions, S positions of room, H query heads, G key/value heads, D the
size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.ops.cached_attention import decode_attention, prefill_attention
from octavo.ops.tiles import Phase


class CacheView(Protocol):
    """New positions on their way through the blocks."""

    @property
    def phase(self) -> Phase:
        """Whether they are positions of prompts, or one new token of each row."""
        ...

    @property
    def positions(self) -> Tensor:
        """(B, T)."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v (B, T, G, D) of one block; q (B, T, H, D) looks at all up to itself. Returns q's shape."""
        ...

    def finish(self) -> None:
        """Counts the positions as held, once all blocks have stored theirs."""
        ...


class Cache(Protocol):
    """What a model reads over."""

    def next(self, count: int) -> CacheView: ...


class KeyValueCache:
    """Rows of one length: keys and values of every block, (L, B, S, G, D) each. `length` positions are filled."""

    def __init__(self, layers: int, *, batch: int, max_len: int, **shape: Any) -> None:
        self.keys, self.values = _empty_cache(torch.empty, layers, batch, max_len, **shape)
        self.max_len = max_len
        self.length = 0

    def next(self, count: int) -> CacheView:
        phase = Phase.DECODE if self.length and count == 1 else Phase.PREFILL
        return AppendView(self.keys, self.values, self.length, count, self._filled, phase)

    def _filled(self, length: int) -> None:
        self.length = length


class SlotCache:
    """Many requests at once: a slot of `max_len` positions for each, (L, slots, S, G, D), taken once.

    `lengths` are the filled positions of each slot. A prompt is read through `slot`, several short ones at once
    through `prompts`, single tokens of the first slots through `step`.
    """

    def __init__(self, layers: int, *, slots: int, max_len: int, **shape: Any) -> None:
        # Masked places are multiplied by 0, so nothing there may be NaN.
        self.keys, self.values = _empty_cache(torch.zeros, layers, slots, max_len, **shape)
        self.max_len = max_len
        self.lengths = [0] * slots

    def slot(self, number: int) -> Slot:
        """One slot as the cache of a batch of one row."""
        return Slot(self, number)

    def prompts(self, slots: Tensor, counts: Tensor) -> PrefillView:
        """Empty slots (B,), for a prompt of `counts` (B,) tokens each; both int64 on the cache's device."""
        return PrefillView(self, slots, counts)

    def step(self, lengths: Tensor, longest: int, phase: Phase = Phase.DECODE) -> DecodeView:
        """The first slots, for one new token each: `lengths` (B,) int64 on the cache's device, -1 for an idle one."""
        return DecodeView(self, lengths, longest, phase)

    def copy_(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot into another, which then has that length."""
        if source != target:
            self.keys[:, target, :length] = self.keys[:, source, :length]
            self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length

    def keys_finite(self, slot: int, count: int) -> Tensor:
        """Whether the last `count` keys of a slot are finite: attention without a mask may make zeros of NaN keys."""
        held = self.lengths[slot]
        return self.keys[:, slot, held - count : held].isfinite().all()

    def clear_(self, slot: int) -> None:
        """Empties a slot and writes zeros over all of it."""
        self.keys[:, slot], self.values[:, slot] = 0, 0
        self.lengths[slot] = 0


class Slot:
    """One slot, to read any number of tokens into."""

    def __init__(self, cache: SlotCache, number: int) -> None:
        self.cache, self.number = cache, number

    def next(self, count: int) -> CacheView:
        own = slice(self.number, self.number + 1)
        held = self.cache.lengths[self.number]
        return AppendView(self.cache.keys[:, own], self.cache.values[:, own], held, count, self._filled, Phase.PREFILL)

    def _filled(self, length: int) -> None:
        self.cache.lengths[self.number] = length


class PrefillView:
    """Whole prompts, each into an empty slot, filled up behind its end to the T positions that all of them take.

    All that differs from call to call is in tensors, as in `Step`. `finite` (B,) tells whether every block's keys of
    a prompt are: a kernel may make zeros of NaN keys. Behind a prompt's end zeros are stored.
    """

    phase = Phase.PREFILL

    def __init__(self, cache: SlotCache, slots: Tensor, counts: Tensor) -> None:
        self.cache, self.slots, self.counts = cache, slots, counts
        self.finite = torch.ones_like(slots, dtype=torch.bool)
        self._starts = torch.zeros_like(slots)

    def next(self, count: int) -> CacheView:
        self.positions = torch.arange(count, device=self.slots.device)[None]
        self._behind = (self.positions >= self.counts[:, None])[:, :, None, None]
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for store, new in ((self.cache.keys, k), (self.cache.values, v)):
            store[layer, :, : new.shape[1]].index_copy_(0, self.slots, new.masked_fill(self._behind, 0))
        self.finite &= (k.isfinite() | self._behind).flatten(1).all(dim=1)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return prefill_attention(q, keys, values, self._starts, self.slots)

    def finish(self) -> None:
        return


class DecodeView:
    """One new token for each of the first slots, each at a length of its own.

    All that differs from step to step is in tensors, so that a step can be one CUDA graph; whoever takes the step
    counts up the cache's own lengths.
    """

    def __init__(self, cache: SlotCache, lengths: Tensor, longest: int, phase: Phase) -> None:
        self.cache, self.lengths, self.longest, self.phase = cache, lengths, longest, phase

    def next(self, count: int) -> CacheView:
        assert count == 1
        return self

    @property
    def positions(self) -> Tensor:
        return self.lengths.clamp_min(0)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = len(self.lengths)
        held = self.cache.keys[layer, :rows], self.cache.values[layer, :rows]
        return decode_attention(q[:, 0], k[:, 0], v[:, 0], *held, self.lengths, self.longest)[:, None]

    def finish(self) -> None:
        return


class AppendView:
    """`count` new positions behind `start` held ones, the same for all rows."""

    def __init__(
        self, keys: Tensor, values: Tensor, start: int, count: int, filled: Callable[[int], None], phase: Phase
    ) -> None:
        self.end = start + count
        assert self.end <= keys.shape[2], f"{self.end} positions in a cache with room for {keys.shape[2]}"
        self.keys, self.values, self.start, self.filled, self.phase = keys, values, start, filled, phase
        self.positions = torch.arange(start, self.end, device=keys.device)[None]
        self._starts = torch.full((keys.shape[1],), start, device=keys.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if self.phase is Phase.DECODE:
            return decode_attention(q[:, 0], k[:, 0], v[:, 0], keys, values, self._starts, self.start)[:, None]
        keys[:, self.start : self.end] = k
        values[:, self.start : self.end] = v
        return prefill_attention(q, keys, values, self._starts)

    def finish(self) -> None:
        self.filled(self.end)


def _empty_cache(
    make: Callable[..., Tensor], layers: int, rows: int, max_len: int, *,
    heads: int, head_size: int, dtype: torch.dtype, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (layers, rows, max_len, heads, head_size)
    return make(shape, dtype=dtype, device=device), make(shape, dtype=dtype, device=device)
