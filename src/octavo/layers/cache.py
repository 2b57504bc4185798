"""The key/value cache of generation: room for a known number of positions, taken once.

Legend: B rows of a batch, S positions of room, G key/value heads, D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from octavo.ops.attention import cache_mask


class KeyValueCache:
    """Keys and values of every block, (B, S, G, D) each. `length` positions are filled; `advance` moves it."""

    def __init__(
        self,
        layers: int,
        *,
        batch: int,
        room: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, batch, room, heads, head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.room = room
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, G, D) after the filled positions; returns all keys and values up to them."""
        end = self.length + k.shape[1]
        assert end <= self.room, f"{end} positions in a cache with room for {self.room}"
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def positions(self, count: int) -> Tensor:
        """(1, count): where the next so many tokens stand."""
        return torch.arange(self.length, self.length + count, device=self.keys.device)[None]

    def mask(self, count: int) -> Tensor | None:
        """What the next so many tokens see of the cache; None where one call needs no mask."""
        return cache_mask(self.length, count, self.keys.device)

    def at(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`extend` of one layer."""
        return partial(self.extend, layer)

    def advance(self, count: int) -> None:
        """Counts `count` stored positions as filled, once all blocks have stored theirs."""
        self.length += count


class SlotCache:
    """Keys and values of many requests at once: a slot of `room` positions each, (L, slots, S, G, D), taken once.

    `lengths` are the filled positions of each slot. Slots are read and written through `rows`.
    """

    def __init__(
        self,
        layers: int,
        *,
        slots: int,
        room: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, slots, room, heads, head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # masked places are multiplied by 0: no NaN there
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.room = room
        self.lengths = [0] * slots

    def rows(self, first: int, count: int) -> SlotRows:
        """Slots [first, first + count) as the cache of a batch of so many rows."""
        return SlotRows(self, first, count)

    def copy_(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of one slot into another, which then has that length."""
        if source != target:
            self.keys[:, target, :length] = self.keys[:, source, :length]
            self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length

    def clear_(self, slot: int) -> None:
        """Empties a slot and writes zeros over all of it."""
        self.keys[:, slot], self.values[:, slot] = 0, 0
        self.lengths[slot] = 0


class SlotRows:
    """Consecutive slots, each at a length of its own, as a batch. Several new tokens at once go into one slot alone."""

    def __init__(self, cache: SlotCache, first: int, count: int) -> None:
        self.cache, self.first, self.count = cache, first, count
        self._starts = torch.tensor(cache.lengths[first : first + count], device=cache.keys.device)
        self._numbers = torch.arange(count, device=cache.keys.device)

    def positions(self, count: int) -> Tensor:
        """(rows, count)."""
        return self._starts[:, None] + torch.arange(count, device=self._starts.device)

    def mask(self, count: int) -> Tensor:
        """(rows, 1, count, S), S the longest row: each new token sees what its own slot holds up to itself."""
        seen = torch.arange(self._end(count), device=self._starts.device)
        return (seen <= self.positions(count)[..., None])[:, None]

    def at(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Stores k and v (rows, T, G, D) behind what the slots hold; returns all up to the longest row."""
        return partial(self._extend, layer)

    def _extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        count, end = k.shape[1], self._end(k.shape[1])
        assert end <= self.cache.room
        assert count == 1 or self.count == 1
        rows = slice(self.first, self.first + self.count)
        kept = []
        for store, new in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
            if self.count == 1:
                store[self.first, end - count : end] = new[0]
            else:
                store[rows][self._numbers, self._starts] = new[:, 0]
            kept.append(store[rows, :end])
        return kept[0], kept[1]

    def advance(self, count: int) -> None:
        """Counts stored positions as filled, once all blocks have stored theirs."""
        for slot in range(self.first, self.first + self.count):
            self.cache.lengths[slot] += count

    def _end(self, count: int) -> int:
        return max(self.cache.lengths[self.first : self.first + self.count]) + count
