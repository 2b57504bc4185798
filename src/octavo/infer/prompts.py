"""Short prompts as CUDA graphs: a card reads one in a fraction of the time that a host takes to launch its kernels.

A graph is recorded for a few lengths; a prompt takes the next longer one and is filled up behind its end, where nothing
looks back. It is read into a slot of its own, of which what counts is copied to where the request stands. All of this
only where it was prepared for, as a server does: one prompt alone is read sooner than its graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.infer.graphs import Graphs, record
from octavo.layers.cache import SlotCache
from octavo.layers.served import Routing
from octavo.models import Model
from octavo.ops.twins import kernels_run_on

SIZES = (16, 32, 64, 128, 256)  # tokens


class Read(NamedTuple):
    """What a prompt's last token says: logits (1, words) float32, and whether all that was computed is finite."""

    logits: Tensor
    finite: Tensor


class Prompts:
    """Reads whole prompts into empty slots of a cache. `words` are the logits that count."""

    def __init__(self, model: Model, cache: SlotCache, routing: Routing, words: int) -> None:
        self.model, self.cache, self.routing, self.words = model, cache, routing, words
        self.sizes: list[int] = []
        self._graphs: Graphs[_Recorded] = Graphs(routing, cache.keys.device)

    @property
    def records(self) -> bool:
        """Whether there are graphs: on a card where the kernels run."""
        return kernels_run_on(self.cache.keys)

    def take(self, count: int) -> bool:
        """Whether prompts of so many tokens are read here."""
        return bool(self.sizes) and count <= self.sizes[-1]

    def read(self, ids: Sequence[int], slot: int, number: int) -> Read:
        """Reads a prompt into an empty slot, through the adapter of this number."""
        size = next(size for size in self.sizes if size >= len(ids))
        more = [ids[-1]] * (size - len(ids))  # a token whose numbers are finite if the prompt's are: 0 times NaN is NaN
        found = self.recorded(size).run([*ids, *more, len(ids), number])
        self.cache.keys[:, slot, : len(ids)] = self._own.keys[:, 0, : len(ids)]
        self.cache.values[:, slot, : len(ids)] = self._own.values[:, 0, : len(ids)]
        self.cache.lengths[slot] = len(ids)
        return found

    def preparations(self) -> list[Callable[[], object]]:
        """Has prompts read here from now on; the recording of each graph, which would make a request wait."""
        self.sizes = [size for size in SIZES if size <= self.cache.room] if self.records else []
        if self.sizes:
            self._own = self.model.new_slots(slots=1, room=self.sizes[-1])
        return [partial(self.recorded, size) for size in self.sizes]

    def recorded(self, size: int) -> _Recorded:
        """The graph of a length."""
        return self._graphs.of(size, partial(_Recorded, self))

    def found(self, given: Tensor) -> Read:
        """`given`: ids, how many of them are the prompt's, the number of the adapter; int64."""
        ids, count, number = given[:-2], given[-2], given[-1:]
        self.routing.numbers = number if self.routing.served else None
        self._own.lengths[0] = 0
        hidden = self.model.hidden(ids[None], cache=self._own.slot(0))[0]
        last = hidden.index_select(0, (count - 1)[None])
        inside = torch.arange(len(ids), device=ids.device) < count
        keys = self._own.keys[:, 0, : len(ids)].flatten(2).isfinite().all(dim=2)
        finite = last.isfinite().all() & (keys | ~inside).all()
        return Read(self.model.head(last[None])[0, :, : self.words].float(), finite)


class _Recorded:
    """The reading of a prompt of one length as a CUDA graph."""

    def __init__(self, prompts: Prompts, size: int, pool: Any) -> None:
        device = prompts.cache.keys.device
        self._sent = torch.tensor([0] * size + [1, 0]).pin_memory()
        self._given = self._sent.to(device)
        self.graph, self._found = record(lambda: prompts.found(self._given), device, pool)

    def run(self, given: Sequence[int]) -> Read:
        self._sent.copy_(torch.tensor(given))  # the prompt before was waited for, so nobody reads this any more
        self._given.copy_(self._sent, non_blocking=True)
        self.graph.replay()
        return self._found
