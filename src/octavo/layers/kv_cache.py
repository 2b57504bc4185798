"""The key/value cache of inference, allocated once for a fixed number of positions.

A forward pass over T new positions calls `view = cache.next(T)` once. Each block then calls `view.attend`, which stores
the block's new keys and values and attends over all of them, and at the end the pass calls `view.finish`. There are
three views, for three kinds of passes: AppendView (any number of tokens after equally many in every row), PrefillView
(entire prompts into empty slots) and DecodeView (one token in each of several slots of different lengths).

The tensors are those of a KeyValueStore (layers/kv_store.py): a layer holds position p in cell p mod S.

Legend: B rows of a batch, T new positions, S positions that a layer holds, H query heads, G key/value heads, D the size
of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from octavo.layers.kv_store import KeyValueStore
from octavo.ops.attention import PLAIN, AttentionSpec
from octavo.ops.cached_attention import decode_attention, prefill_attention, ring_cells
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

    @property
    def extents(self) -> Tensor | int:
        """(B, 1) int64, or one number for all rows: the most positions that the request of a row may have."""
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


class KeyValueCache(KeyValueStore):
    """Rows of equal length. The first `length` positions of each row are stored."""

    def __init__(self, windows: Sequence[int | None], *, batch: int, max_len: int, **shape: Any) -> None:
        super().__init__(torch.empty, windows, batch, max_len, **shape)
        self.length = 0

    def next(self, count: int) -> CacheView:
        phase = Phase.DECODE if self.length and count == 1 else Phase.PREFILL
        return AppendView(self, slice(None), self.length, count, self._set_length, phase, self.max_len)

    def _set_length(self, length: int) -> None:
        self.length = length


class SlotCache(KeyValueStore):
    """Many requests at once: a slot of `max_len` positions for each. `lengths` are the stored positions of each slot.

    It is no `Cache` itself: `slot`, `prefill` and `decode` give one for a forward pass over one slot, over several
    prompts in empty slots, or over one token in each of the first slots.
    """

    def __init__(self, windows: Sequence[int | None], *, slots: int, max_len: int, **shape: Any) -> None:
        # Attention multiplies masked values by 0, so none may be NaN.
        super().__init__(torch.zeros, windows, slots, max_len, **shape)
        self.lengths = [0] * slots
        self.extent_of = [max_len] * slots  # the most positions that the request of a slot may have
        self.extents = torch.full((slots,), max_len, device=self.device)  # the same on the cache's device

    def set_extent(self, slot: int, extent: int) -> None:
        """Says how many positions the request of a slot may have: its rotary positions may depend on it."""
        if self.extent_of[slot] != extent:
            self.extent_of[slot] = extent
            self.extents[slot] = extent

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
        """Copies the first `length` positions of one slot to another and sets its length.

        The source may be longer, if it `can_continue` from there. Cells of later positions may be copied with a ring:
        no query sees them before they are overwritten.
        """
        if source != target:
            for held, group in self.groups.items():
                for tensor in group:
                    tensor[:, target, : min(length, held)] = tensor[:, source, : min(length, held)]
        self.lengths[target] = length

    def keys_finite(self, slot: int, count: int) -> Tensor:
        """() bool: whether the last `count` keys of a slot are finite, as far as they are held.

        The output of attention does not show that: it may be finite although a key is NaN.
        """
        end, finite = self.lengths[slot], []
        for held, group in self.groups.items():
            cells = ring_cells(end - min(count, held), end, held, self.device)
            finite.append(group.keys[:, slot, cells].isfinite().all())
        return reduce(torch.logical_and, finite)

    def clear_(self, slot: int) -> None:
        """Empties a slot and overwrites it with zeros."""
        for group in self.groups.values():
            group.keys[:, slot], group.values[:, slot] = 0, 0
        self.lengths[slot] = 0


class Slot:
    """One slot as a `Cache` of one row, for any number of new tokens."""

    def __init__(self, cache: SlotCache, number: int) -> None:
        self.cache, self.number = cache, number

    def next(self, count: int) -> CacheView:
        row, start = slice(self.number, self.number + 1), self.cache.lengths[self.number]
        extent = self.cache.extent_of[self.number]
        return AppendView(self.cache, row, start, count, self._set_length, Phase.PREFILL, extent)

    def _set_length(self, length: int) -> None:
        self.cache.lengths[self.number] = length


class PrefillView:
    """Entire prompts in empty slots, padded at their end to T positions. It is the `Cache` of this pass and its view.

    The padding is stored as zeros: attention multiplies masked values by 0, so none may be NaN. In a ring shorter than
    T it changes no cell, since the cell may hold a position that is still visible. A pass can be one CUDA graph, since
    all that changes from call to call is in tensors; the caller sets `SlotCache.lengths`. After the pass `finite` (B,)
    says whether all keys of a prompt are finite.
    """

    phase = Phase.PREFILL

    def __init__(self, cache: SlotCache, slots: Tensor, lengths: Tensor) -> None:
        self.cache, self.slots, self.lengths = cache, slots, lengths
        self.max_len = cache.max_len
        self.finite = torch.ones_like(slots, dtype=torch.bool)  # (B,)
        self._starts = torch.zeros_like(slots)  # (B,): the slots are empty

    @property
    def extents(self) -> Tensor:
        return self.cache.extents[self.slots][:, None]  # (B, 1)

    def next(self, count: int) -> CacheView:
        self.positions = torch.arange(count, device=self.slots.device)[None]  # (1, T)
        self._padding = (self.positions >= self.lengths[:, None])[:, :, None, None]  # (B, T, 1, 1)
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        self.finite &= (k.isfinite() | self._padding).flatten(1).all(dim=1)
        stores = self.cache.keys(layer), self.cache.values(layer)  # (slots, S, G, D) each
        results = []
        for piece in _pieces(0, q.shape[1], stores[0].shape[1], spec):
            for store, new in zip(stores, (k, v), strict=True):
                self._store(store, new, piece)
            starts = _shifted(self._starts, piece)  # (B,)
            results.append(prefill_attention(q[:, piece], *stores, starts, self.slots, spec))
        return _joined(results)

    def _store(self, store: Tensor, new: Tensor, piece: slice) -> None:
        """Stores the positions `piece` of `new` (B, T, G, D) in the slots of `store` (slots, S, G, D).

        Two rows of one slot are equal (infer/prefill_graphs.py), so the order in which they are stored is irrelevant.
        """
        held, padding = store.shape[1], self._padding[:, piece]  # (B, t, 1, 1)
        if new.shape[1] <= held:
            store[:, piece].index_copy_(0, self.slots, new[:, piece].masked_fill(padding, 0))
        else:
            cells = self.slots[:, None], self.positions[:, piece] % held  # (B, 1), (1, t)
            store[cells] = torch.where(padding, store[cells], new[:, piece])  # (B, t, G, D)

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

    @property
    def extents(self) -> Tensor:
        return self.cache.extents[: len(self.lengths), None]  # (B, 1)

    def next(self, count: int) -> CacheView:
        assert count == 1
        return self

    @property
    def positions(self) -> Tensor:
        return self.lengths.clamp_min(0)[:, None]  # (B, 1); an idle slot needs a valid position

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        rows = len(self.lengths)
        stored = self.cache.keys(layer)[:rows], self.cache.values(layer)[:rows]  # (B, S, G, D) each
        return decode_attention(q[:, 0], k[:, 0], v[:, 0], *stored, self.lengths, self.longest, spec)[:, None]

    def finish(self) -> None:
        return


class AppendView:
    """`count` new positions after `start` stored ones, in `rows` of a store; both are the same for all rows."""

    def __init__(
        self, cache: KeyValueStore, rows: slice, start: int, count: int, set_length: Callable[[int], None],
        phase: Phase, extents: int,
    ) -> None:  # fmt: skip
        self.end = start + count
        assert self.end <= cache.max_len, f"{self.end} positions in a cache of {cache.max_len}"
        self.cache, self.rows, self.start, self.phase = cache, rows, start, phase
        self.max_len, self.extents = cache.max_len, extents
        self._set_length = set_length
        self.positions = torch.arange(start, self.end, device=cache.device)[None]  # (1, T)
        self._starts = torch.full((len(cache.keys(0)[rows]),), start, device=cache.device)  # (B,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = PLAIN) -> Tensor:
        keys, values = self.cache.keys(layer)[self.rows], self.cache.values(layer)[self.rows]  # (B, S, G, D) each
        if self.phase is Phase.DECODE:
            return decode_attention(q[:, 0], k[:, 0], v[:, 0], keys, values, self._starts, self.start, spec)[:, None]
        held, results = keys.shape[1], []
        for piece in _pieces(self.start, q.shape[1], held, spec):
            cells = ring_cells(self.start + piece.start, self.start + piece.stop, held, q.device)
            keys[:, cells], values[:, cells] = k[:, piece], v[:, piece]  # (B, t, G, D)
            results.append(prefill_attention(q[:, piece], keys, values, _shifted(self._starts, piece), spec=spec))
        return _joined(results)

    def finish(self) -> None:
        self._set_length(self.end)


def _pieces(start: int, count: int, held: int, spec: AttentionSpec) -> list[slice]:
    """Parts of `count` new positions after `start`, stored and attended one after the other.

    One, if all positions are held. Else a part overwrites no position that its first query sees.
    """
    if start + count <= held:
        return [slice(0, count)]
    assert spec.window is not None, "a layer without a window in a ring"
    size = held - spec.window  # CHUNK
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _shifted(starts: Tensor, piece: slice) -> Tensor:
    return starts + piece.start if piece.start else starts


def _joined(results: list[Tensor]) -> Tensor:
    """Results (B, t, H, D) of pieces as (B, T, H, D)."""
    return results[0] if len(results) == 1 else torch.cat(results, dim=1)
