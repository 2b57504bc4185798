"""The slots of the engine's cache and the tokens in them, so that a common start of two prompts is computed once.

Only whole tiles of a prompt are reused (ops/tiles.py): they have the bits that the other prompt would compute. The
last tile of a prompt may be incomplete, and decode computes tokens with other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.layers.kv_cache import SlotCache
from octavo.ops import tiles
from octavo.ops.tiles import Phase


class Slots:
    """A cache with slots, and for each slot the adapter and the tokens of its keys and values.

    The content of a slot stays after its request has finished, until the slot is used again.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self._adapters: list[str | None] = [None] * len(cache.lengths)
        self._tokens: list[list[int]] = [[] for _ in cache.lengths]
        self._prefilled = [0] * len(cache.lengths)  # the first tokens of each slot that prefill computed

    def begin(self, slot: int, adapter: str | None, prompt: Sequence[int]) -> int:
        """Prepares a slot for a prompt: copies its longest start, in whole tiles, that any slot has.

        Returns the number of copied tokens.
        """
        source, length = slot, 0
        for other, (owner, tokens) in enumerate(zip(self._adapters, self._tokens, strict=True)):
            if owner == adapter:
                tokens = tokens[: self._prefilled[other]]
                common = _common_length(tokens, prompt) // tiles.PREFILL_TILE * tiles.PREFILL_TILE
                source, length = (other, common) if common > length else (source, length)
        self.cache.copy_(source, slot, length)
        self._adapters[slot], self._tokens[slot], self._prefilled[slot] = adapter, list(prompt[:length]), length
        return length

    def append(self, slot: int, tokens: Sequence[int], phase: Phase) -> None:
        """Registers the tokens whose keys and values were written to a slot."""
        if phase is Phase.PREFILL:
            assert self._prefilled[slot] == len(self._tokens[slot]), "prefill after decode"
            self._prefilled[slot] += len(tokens)
        self._tokens[slot] += tokens

    def move(self, source: int, target: int) -> None:
        """Copies one slot into another."""
        if source != target:
            self.cache.copy_(source, target, self.cache.lengths[source])
            self._adapters[target], self._tokens[target] = self._adapters[source], list(self._tokens[source])
            self._prefilled[target] = self._prefilled[source]

    def clear(self, slot: int) -> None:
        """Writes zeros to a slot whose values may not be finite: attention multiplies masked values by 0."""
        self.cache.clear_(slot)
        self._empty(slot)

    def invalidate(self, adapter: str | None = None) -> None:
        """Prevents the reuse of all tokens of an adapter, or of all tokens."""
        for slot, owner in enumerate(self._adapters):
            if adapter is None or owner == adapter:
                self._empty(slot)

    def _empty(self, slot: int) -> None:
        self._adapters[slot], self._tokens[slot], self._prefilled[slot] = None, [], 0


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of ids that two sequences have in common at their start."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
