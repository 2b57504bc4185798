"""The tensors of a key/value cache: max_len positions of a layer, or the last ones if it has a sliding window.

A token sees the last w positions in a layer with a window w. Such a layer has a ring of S cells: position p is in cell
p mod S, where it overwrites position p - S. Decode needs S >= w. A pass that stores T new positions before it attends
needs S >= w + T, so S is w + CHUNK, and longer passes are computed in pieces of CHUNK (layers/kv_cache.py).

A cell may still hold another position than the one that attention reads there. No query sees it: it is masked.

Legend: n layers, S positions that a layer holds, G key/value heads, D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The positions that a layer holds beyond its window: a pass stores and attends up to so many at once. A multiple of
# PREFILL_TILE and of the prefill kernel's tiles, so that a longer pass has the same tiles as without a ring.
CHUNK = 512


class LayerGroup(NamedTuple):
    """Keys and values of n layers that hold equally many positions."""

    keys: Tensor  # (n, rows, S, G, D)
    values: Tensor  # (n, rows, S, G, D)


class KeyValueStore:
    """Keys and values of every layer, of which `windows` are the sliding windows, None for a layer without one.

    A layer holds S = max_len positions, or S = min(max_len, window + CHUNK). Layers of equal S share one tensor.
    """

    def __init__(
        self, make: Callable[..., Tensor], windows: Sequence[int | None], rows: int, max_len: int, *,
        heads: int, head_size: int, dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.windows, self.max_len = tuple(windows), max_len
        self.held = [max_len if window is None else min(max_len, window + CHUNK) for window in windows]  # S
        self.groups: dict[int, LayerGroup] = {}  # by S
        for held in self.held:
            if held not in self.groups:
                shape = (self.held.count(held), rows, held, heads, head_size)  # (n, rows, S, G, D)
                self.groups[held] = LayerGroup(*(make(shape, dtype=dtype, device=device) for _ in range(2)))
        self._index = [self.held[:layer].count(held) for layer, held in enumerate(self.held)]  # within its group

    def keys(self, layer: int) -> Tensor:
        """(rows, S, G, D), a view."""
        return self.groups[self.held[layer]].keys[self._index[layer]]

    def values(self, layer: int) -> Tensor:
        """(rows, S, G, D), a view."""
        return self.groups[self.held[layer]].values[self._index[layer]]

    @property
    def device(self) -> torch.device:
        return self.keys(0).device

    def can_continue(self, length: int, written: int) -> bool:
        """Whether a row with `written` positions can continue from position `length`: whether its rings still hold all
        positions that a query there sees."""
        return all(
            window is None or written - held <= max(0, length + 1 - window)
            for window, held in zip(self.windows, self.held, strict=True)
        )
