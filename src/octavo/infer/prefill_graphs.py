"""Short prompts as CUDA graphs: a card reads some in a fraction of the time that a host takes to launch the kernels.

A graph is recorded for a few shapes, so many prompts of so many tokens. Prompts take the next larger one: each is
filled up behind its end, where nothing looks back, and rows that are left over read the first prompt once more. All of
this only where it was prepared for, as a server does: one prompt alone is read sooner than its graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.infer.graphs import Graphs, record
from octavo.layers.kv_cache import SlotCache
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import kernels_run_on

SIZES = (16, 32, 64, 128, 256)  # tokens of a prompt
ROWS = (1, 4, 16)  # prompts at once
MOST = 1024  # tokens at once: more would make running requests wait, and gain little for a token


Lines = Sequence[Sequence[int]]  # what `Prompts.found` is given, a row for each prompt


class Prompt(NamedTuple):
    """A prompt for an empty slot, through the adapter of this number."""

    ids: Sequence[int]
    slot: int
    number: int


class Shape(NamedTuple):
    """What a graph reads: so many prompts of up to so many tokens."""

    rows: int
    size: int


class PrefillGraphs:
    """Reads whole prompts into empty slots of a cache. `words` are the logits that count."""

    def __init__(self, model: Decoder, cache: SlotCache, routing: ServedAdapters, vocab_size: int) -> None:
        self.model, self.cache, self.routing, self.vocab_size = model, cache, routing, vocab_size
        self.shapes: list[Shape] = []
        self._graphs: Graphs[_Recorded] = Graphs(routing, cache.keys.device)

    @property
    def records(self) -> bool:
        """Whether there are graphs: on a card where the kernels run."""
        return kernels_run_on(self.cache.keys)

    def shape_for(self, lengths: Sequence[int]) -> Shape | None:
        """The cheapest shape that prompts of these lengths are read in; None if there is none."""
        fitting = [shape for shape in self.shapes if shape.rows >= len(lengths) and shape.size >= max(lengths)]
        return min(fitting, key=lambda shape: (shape.rows * shape.size, shape.size), default=None)

    def read(self, prompts: Sequence[Prompt]) -> Tensor:
        """Logits (n, words) float32 behind each prompt's last token; NaN if anything that was computed of it is not
        finite. The next call writes over them.
        """
        shape = self.shape_for([len(prompt.ids) for prompt in prompts])
        assert shape is not None, "prompts that `shape_for` has no graph for"
        given = [_line(prompt, shape.size) for prompt in prompts]
        given += [given[0]] * (shape.rows - len(given))
        found = self.recorded(shape, given).run(given)
        for prompt in prompts:
            self.cache.lengths[prompt.slot] = len(prompt.ids)
        return found[: len(prompts)]

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """Has prompts read here from now on; the recording of each graph, which would make a request wait."""
        sizes = [size for size in SIZES if size <= self.cache.max_len] if self.records else []
        useful = [rows for rows in ROWS if rows < 4 * len(self.cache.lengths)]  # a slot for more than the one below
        self.shapes = [Shape(rows, size) for size in sizes for rows in sorted({min(r, MOST // size) for r in useful})]
        first = {size: _line(Prompt([0], 0, 0), size) for size in sizes}  # no request has a slot yet
        return [partial(self.recorded, shape, [first[shape.size]] * shape.rows) for shape in self.shapes]

    def recorded(self, shape: Shape, given: Lines) -> _Recorded:
        """The graph of a shape. To record it is to read `given` once: what is about to be read into those slots."""
        return self._graphs.of(shape, partial(_Recorded, self, given))

    def found(self, given: Tensor) -> Tensor:
        """`given` (rows, size + 3) int64: of each prompt its ids, how many of them count, its slot and its adapter."""
        ids, counts, slots, adapter_ids = given[:, :-3], given[:, -3], given[:, -2], given[:, -1]
        own = adapter_ids if self.routing.served else None
        over = self.cache.prompts(slots, counts)
        hidden = self.model.hidden(ids, cache=over, adapter_ids=own)
        last = hidden[torch.arange(len(ids), device=ids.device), counts - 1]  # (rows, d)
        logits = self.model.infer_logits(last[:, None], Phase.DECODE, own)[
            :, 0, : self.vocab_size
        ]  # (rows, vocab_size)
        finite = over.finite & last.isfinite().all(dim=1)
        return logits.masked_fill(~finite[:, None], torch.nan)


def _line(prompt: Prompt, size: int) -> list[int]:
    """A row of what `found` is given."""
    count = len(prompt.ids)
    more = [prompt.ids[-1]] * (size - count)  # whose numbers are finite if the prompt's are: 0 times NaN is NaN
    return [*prompt.ids, *more, count, prompt.slot, prompt.number]


class _Recorded:
    """The reading of prompts of one shape as a CUDA graph."""

    def __init__(self, prompts: PrefillGraphs, given: Lines, shape: Shape, pool: Any) -> None:
        device = prompts.cache.keys.device
        self._sent = torch.tensor(given).pin_memory()
        self._given = self._sent.to(device)
        self.graph, self._found = record(lambda: prompts.found(self._given), device, pool)

    def run(self, given: Lines) -> Tensor:
        self._sent.copy_(torch.tensor(given))  # the prompts before were waited for, so nobody reads this any more
        self._given.copy_(self._sent, non_blocking=True)
        self.graph.replay()
        return self._found
