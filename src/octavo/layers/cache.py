"""The key/value cache of generation: room for a known number of positions, taken once.

Legend: B rows of a batch, S positions of room, G key/value heads, D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


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

    def at(self, layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`extend` of one layer."""
        return partial(self.extend, layer)

    def advance(self, count: int) -> None:
        """Counts `count` stored positions as filled, once all blocks have stored theirs."""
        self.length += count
