"""The slots of the engine's cache and what they hold, so that a prompt that begins like another is not read twice.

Only whole tiles of prompts are used again (ops/tiles.py): they have the bits that the prompt would get by itself. The
last tile of a prompt may be cut short, and what decode wrote was computed by other kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.layers.kv_cache import SlotCache
from octavo.ops import tiles
from octavo.ops.tiles import Phase


class Slots:
    """A cache of slots with the tokens, and the adapter, that each slot's keys and values are of.

    What a request leaves behind stays until its slot is taken again.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self._adapters: list[str | None] = [None] * len(cache.lengths)
        self._tokens: list[list[int]] = [[] for _ in cache.lengths]
        self._prefilled = [0] * len(cache.lengths)  # tokens of each slot that were read as a prompt, from the first on

    def begin(self, slot: int, adapter: str | None, prompt: Sequence[int]) -> int:
        """Makes a slot ready for a prompt: copies the longest start of it, in whole tiles, that any slot holds; returns
        its length."""
        source, length = slot, 0
        for other, (own, tokens) in enumerate(zip(self._adapters, self._tokens, strict=True)):
            if own == adapter:
                common = _common(tokens[: self._prefilled[other]], prompt) // tiles.PREFILL_TILE * tiles.PREFILL_TILE
                source, length = (other, common) if common > length else (source, length)
        self.cache.copy_(source, slot, length)
        self._adapters[slot], self._tokens[slot], self._prefilled[slot] = adapter, list(prompt[:length]), length
        return length

    def wrote(self, slot: int, tokens: Sequence[int], phase: Phase) -> None:
        """Notes what was read into a slot."""
        if phase is Phase.PREFILL:
            assert self._prefilled[slot] == len(self._tokens[slot]), "a prompt after an answer"
            self._prefilled[slot] += len(tokens)
        self._tokens[slot] += tokens

    def move(self, source: int, target: int) -> None:
        """Puts what one slot holds into another as well."""
        if source != target:
            self.cache.copy_(source, target, self.cache.lengths[source])
            self._adapters[target], self._tokens[target] = self._adapters[source], list(self._tokens[source])
            self._prefilled[target] = self._prefilled[source]

    def clear(self, slot: int) -> None:
        """Takes out of a slot what is not finite: masked places are multiplied by 0, which NaN outlives."""
        self.cache.clear_(slot)
        self._empty(slot)

    def forget(self, adapter: str | None = None) -> None:
        """Nothing of an adapter, or nothing at all, is found again."""
        for slot, own in enumerate(self._adapters):
            if adapter is None or own == adapter:
                self._empty(slot)

    def _empty(self, slot: int) -> None:
        self._adapters[slot], self._tokens[slot], self._prefilled[slot] = None, [], 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their start."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
