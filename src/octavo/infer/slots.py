"""The slots of the engine's cache and what they hold, so that a prompt that begins like another is not read twice."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.layers.cache import SlotCache


class Slots:
    """A cache of slots with the tokens, and the adapter, that each slot's keys and values are of.

    What a request leaves behind stays until its slot is taken again.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self._adapters: list[str | None] = [None] * len(cache.lengths)
        self._tokens: list[list[int]] = [[] for _ in cache.lengths]

    def begin(self, slot: int, adapter: str | None, prompt: Sequence[int]) -> int:
        """Makes a slot ready for a prompt: copies the longest start of it that any slot holds; returns its length."""
        source, length = slot, 0
        for other, (own, tokens) in enumerate(zip(self._adapters, self._tokens, strict=True)):
            if own == adapter and (found := _common(tokens, prompt)) > length:
                source, length = other, found
        self.cache.copy_(source, slot, length)
        self._adapters[slot], self._tokens[slot] = adapter, list(prompt[:length])
        return length

    def wrote(self, slot: int, tokens: Sequence[int]) -> None:
        """Notes what was read into a slot."""
        self._tokens[slot] += tokens

    def move(self, source: int, target: int) -> None:
        """Puts what one slot holds into another as well."""
        if source != target:
            self.cache.copy_(source, target, self.cache.lengths[source])
            self._adapters[target], self._tokens[target] = self._adapters[source], list(self._tokens[source])

    def clear(self, slot: int) -> None:
        """Takes out of a slot what is not finite: masked places are multiplied by 0, which NaN outlives."""
        self.cache.clear_(slot)
        self._adapters[slot], self._tokens[slot] = None, []

    def forget(self, adapter: str | None = None) -> None:
        """Nothing of an adapter, or nothing at all, is found again."""
        for slot, own in enumerate(self._adapters):
            if adapter is None or own == adapter:
                self._adapters[slot], self._tokens[slot] = None, []


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their start."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
