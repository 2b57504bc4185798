"""Prefix caching over the slots of the engine's cache: a common prefix of two prompts is computed once.

Only whole tiles of a prompt are reused (ops/tiles.py): prefill of the new prompt would compute the same bits. An
incomplete last tile has other bits, and so have the tokens of an answer, which decode computes with other kernels.

Layers with a sliding window hold the last positions of a slot only (layers/kv_cache.py). A prefix is reused as long as
all of these layers hold what the next token sees: until its slot has about CHUNK more positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from octavo.layers.kv_cache import SlotCache
from octavo.ops import tiles
from octavo.ops.tiles import Phase


class Slots:
    """A cache with slots, and for each slot the adapter and the tokens whose keys and values it stores.

    Keys and values depend on the adapter, so only a prompt with the same adapter reuses them. A slot keeps its content
    after its request has finished, until another request gets the slot.
    """

    def __init__(self, cache: SlotCache, regime: Callable[[int], Hashable] = lambda extent: None) -> None:
        """`regime` of the most positions of a request is equal where keys have the same rotary positions."""
        self.cache, self._regime = cache, regime
        self._adapters: list[str | None] = [None] * len(cache.lengths)
        self._tokens: list[list[int]] = [[] for _ in cache.lengths]
        self._prefilled = [0] * len(cache.lengths)  # how many of the tokens, from the first on, prefill computed
        # The most positions since the slot was last empty. A slot that continues from a shorter prefix keeps its rings.
        self._written = [0] * len(cache.lengths)

    def reuse_prefix(self, slot: int, adapter: str | None, prompt: Sequence[int], extent: int | None = None) -> int:
        """Prepares a slot for a prompt: copies the longest prefix of it, in whole tiles, that any slot stores.

        `extent` is the most positions that the request may have, by default those of a slot. Returns the number of
        reused tokens; the slot has this length. `slot` itself may be the source.
        """
        source, length = slot, 0
        regime = self._regime(extent := extent or self.cache.max_len)
        for other, (other_adapter, tokens) in enumerate(zip(self._adapters, self._tokens, strict=True)):
            if other_adapter == adapter and self._regime(self.cache.extent_of[other]) == regime:
                tokens = tokens[: self._prefilled[other]]
                common = _common_prefix(tokens, prompt) // tiles.PREFILL_TILE * tiles.PREFILL_TILE
                if common > length and self.cache.can_continue(common, self._written[other]):
                    source, length = other, common
        self.cache.copy_(source, slot, length)
        self.cache.set_extent(slot, extent)
        self._written[slot] = self._written[source] if length else 0
        self._adapters[slot], self._tokens[slot], self._prefilled[slot] = adapter, list(prompt[:length]), length
        return length

    def append(self, slot: int, tokens: Sequence[int], phase: Phase) -> None:
        """Records the tokens whose keys and values the model has appended to a slot, and how it computed them."""
        if phase is Phase.PREFILL:
            assert self._prefilled[slot] == len(self._tokens[slot]), "prefill after decode"
            self._prefilled[slot] += len(tokens)
        self._tokens[slot] += tokens
        self._written[slot] = max(self._written[slot], len(self._tokens[slot]))

    def copy(self, source: int, target: int) -> None:
        """Copies the content of one slot to another."""
        if source != target:
            self.cache.copy_(source, target, self.cache.lengths[source])
            self.cache.set_extent(target, self.cache.extent_of[source])
            self._adapters[target], self._tokens[target] = self._adapters[source], list(self._tokens[source])
            self._prefilled[target], self._written[target] = self._prefilled[source], self._written[source]

    def clear(self, slot: int) -> None:
        """Empties a slot whose keys and values may be NaN, and overwrites it with zeros.

        Attention multiplies masked values by 0, and 0 * NaN is NaN: a later request of the slot would get it.
        """
        self.cache.clear_(slot)
        self._forget(slot)

    def invalidate(self, adapter: str | None = None) -> None:
        """Prevents reuse of the slots of an adapter: another one may get its name. None: of all slots."""
        for slot, slot_adapter in enumerate(self._adapters):
            if adapter is None or slot_adapter == adapter:
                self._forget(slot)

    def _forget(self, slot: int) -> None:
        self._adapters[slot], self._tokens[slot], self._prefilled[slot] = None, [], 0


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
