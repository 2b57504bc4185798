"""Prefill of short prompts as CUDA graphs: a GPU computes them in a fraction of the time that launching kernels takes.

Graphs are captured for a few shapes: a number of prompts and their length. Prompts use the cheapest shape that they
fit into. A prompt is padded at its end, where causal attention ignores the padding. Unused rows repeat the first
prompt, so they write the same keys and values to the same slot again. Graphs are used only after `warmup_tasks`, as in
a server: for a single prompt capturing takes longer than prefill.

Legend: B prompts of a shape, T its length, n prompts of a call, V the vocabulary of the tokenizer, d the width of the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.hardware import capabilities_of
from octavo.infer.graphs import Graphs, capture
from octavo.layers.kv_cache import SlotCache
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import kernels_run_on

LENGTHS = (16, 32, 64, 128, 256)  # T
ROWS = (1, 4, 16)  # B
MAX_TOKENS = 1024  # B T; more would delay running requests, and saves little per token

Inputs = Sequence[Sequence[int]]  # B rows of T + 3 numbers: the tensor that `PrefillGraphs.logits` gets


class Prompt(NamedTuple):
    """A prompt for an empty slot."""

    ids: Sequence[int]
    slot: int
    adapter_id: int


class Shape(NamedTuple):
    """B and T of a graph."""

    rows: int
    length: int


class PrefillGraphs:
    """Prefills entire prompts into empty slots of a cache. Logits past `vocab_size` are cut off."""

    def __init__(self, model: Decoder, cache: SlotCache, adapters: ServedAdapters, vocab_size: int) -> None:
        self.model, self.cache, self.adapters, self.vocab_size = model, cache, adapters, vocab_size
        self.shapes: list[Shape] = []
        self._graphs: Graphs[_PrefillGraph] = Graphs(adapters, cache.device)

    @property
    def uses_graphs(self) -> bool:
        """Whether there are graphs: if all kernels run. References wait for the GPU; no graph can capture that."""
        return kernels_run_on(self.cache.keys(0)) and capabilities_of(self.cache.device).triton_dots

    def shape_for(self, lengths: Sequence[int]) -> Shape | None:
        """The cheapest shape for prompts of these lengths; None if there is none."""
        fitting = [shape for shape in self.shapes if shape.rows >= len(lengths) and shape.length >= max(lengths)]
        return min(fitting, key=lambda shape: (shape.rows * shape.length, shape.length), default=None)

    def prefill(self, prompts: Sequence[Prompt]) -> Tensor:
        """Logits (n, V) float32 after the last token of each prompt; the next call overwrites them.

        They are NaN for a prompt with a hidden state or key that is not finite.
        """
        shape = self.shape_for([len(prompt.ids) for prompt in prompts])
        assert shape is not None, "there is no shape for these prompts"
        inputs = [_input_row(prompt, shape.length) for prompt in prompts]
        inputs += [inputs[0]] * (shape.rows - len(inputs))
        logits = self.graph(shape, inputs).run(inputs)  # (B, V)
        for prompt in prompts:
            self.cache.lengths[prompt.slot] = len(prompt.ids)
        return logits[: len(prompts)]

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """Enables graphs from now on. Returns functions that capture them, which would delay a request."""
        lengths = [length for length in LENGTHS if length <= self.cache.max_len] if self.uses_graphs else []
        # ROWS are powers of four. A number is useful if there are more slots than the next smaller one.
        useful = [rows for rows in ROWS if rows < 4 * len(self.cache.lengths)]
        self.shapes = [
            Shape(rows, length)
            for length in lengths
            for rows in sorted({min(rows, MAX_TOKENS // length) for rows in useful})
        ]
        # Capturing runs a pass, which writes to slot 0: nothing is lost, since all slots are empty still.
        first = {length: _input_row(Prompt([0], 0, 0), length) for length in lengths}
        return [partial(self.graph, shape, [first[shape.length]] * shape.rows) for shape in self.shapes]

    def graph(self, shape: Shape, inputs: Inputs) -> _PrefillGraph:
        """The graph of a shape; captured with `inputs` if there is none.

        Capturing runs a pass over `inputs`, so these are the inputs of the next run: it writes only to their slots.
        """
        return self._graphs.get(shape, partial(_PrefillGraph, self, inputs))

    def logits(self, inputs: Tensor) -> Tensor:
        """(B, V) float32. `inputs` (B, T + 3) int64 are the padded ids of each prompt, its length, slot and adapter id.

        One tensor, so that a replay needs one copy to the GPU.
        """
        ids, lengths, slots, adapter_ids = inputs[:, :-3], inputs[:, -3], inputs[:, -2], inputs[:, -1]  # (B, T), (B,)
        used_ids = adapter_ids if self.adapters.ids else None
        view = self.cache.prefill(slots, lengths)
        hidden = self.model.hidden(ids, cache=view, adapter_ids=used_ids)  # (B, T, d)
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # (B, d)
        logits = self.model.infer_logits(last[:, None], Phase.DECODE, used_ids)[:, 0, : self.vocab_size]  # (B, V)
        # A flag that the CPU reads would need a second copy; NaN logits take the same way as those of a decode step.
        finite = view.finite & last.isfinite().all(dim=1)  # (B,)
        return logits.masked_fill(~finite[:, None], torch.nan)


def _input_row(prompt: Prompt, length: int) -> list[int]:
    """A row of the inputs. The padding repeats the last token, not an arbitrary one: its hidden states must be finite.

    Attention multiplies masked values by 0, and 0 * NaN is NaN.
    """
    count = len(prompt.ids)
    padding = [prompt.ids[-1]] * (length - count)
    return [*prompt.ids, *padding, count, prompt.slot, prompt.adapter_id]


class _PrefillGraph:
    """The captured prefill of prompts of one shape."""

    def __init__(self, owner: PrefillGraphs, inputs: Inputs, shape: Shape, pool: Any) -> None:
        device = owner.cache.device
        self._pinned = torch.tensor(inputs).pin_memory()  # (B, T + 3) int64
        self._inputs = self._pinned.to(device)  # (B, T + 3): the graph reads its inputs at this address
        self.graph, self._logits = capture(lambda: owner.logits(self._inputs), device, pool)

    def run(self, inputs: Inputs) -> Tensor:
        self._pinned.copy_(torch.tensor(inputs))  # the previous replay has finished: no copy reads the pinned memory
        self._inputs.copy_(self._pinned, non_blocking=True)
        self.graph.replay()
        return self._logits  # (B, V)
