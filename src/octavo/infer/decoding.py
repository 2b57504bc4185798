"""Decode: a step computes one new token of every running request, row i from slot i.

Graphs are captured for a few numbers of rows. A step uses the smallest graph with enough rows and marks the remaining
rows as idle. All inputs of a step are sent to the GPU in one copy. One copy returns the summary of the logits: the
largest one of each row and its token. It suffices for greedy requests and shows logits that are not finite; the logits
themselves stay on the GPU.

Legend: B rows of a step, V the vocabulary of the tokenizer, d the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.infer.graphs import Graphs, capture
from octavo.layers.kv_cache import SlotCache
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import kernels_run_on

IDLE = -1  # the length of a slot without a token in this step
BASE = 0  # the adapter id of a row without an adapter


@dataclass(frozen=True)
class StepOutput:
    """The logits of a step, and for each row the largest logit and its token id."""

    logits: Tensor  # (B, V) float32 on the model's device; the next step overwrites them
    max_logits: list[float]  # B; not finite if a logit of the row is NaN or +inf
    argmax: list[int]  # B


def step_output(logits: Tensor, rows: int, summary: Tensor | None = None) -> StepOutput:
    """The output of the first `rows` rows. `summary` is `_summary(logits)`, if the caller has it."""
    summary = _summary(logits) if summary is None else summary
    max_logits, argmax = summary.tolist()  # the copy to the CPU
    return StepOutput(logits[:rows], max_logits[:rows], [int(token) for token in argmax[:rows]])


def _summary(logits: Tensor) -> Tensor:
    """(2, B) float64: the largest logit of each row, and its token id, which float64 represents exactly.

    `max` propagates NaN, so the largest logit shows whether all logits of a row are usable.
    """
    max_logits, argmax = logits.max(dim=1)  # (B,) each
    return torch.stack([max_logits.double(), argmax.double()])


class PendingStep(NamedTuple):
    """A launched step. Reading the tensors on the CPU waits for the GPU."""

    logits: Tensor  # (B, V) float32
    summary: Tensor  # (2, B) float64
    rows: int  # those that are not idle


class DecodeRunner:
    """Decode steps of one model over one cache.

    Logits from `vocab_size` on are cut off: embeddings are often padded beyond the tokenizer's vocabulary.

    `deterministic`: the bits of a row do not depend on the number of rows, however many there are.
    """

    def __init__(
        self, model: Decoder, cache: SlotCache, adapters: ServedAdapters, vocab_size: int, *,
        deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.deterministic = deterministic
        self.model, self.cache, self.adapters, self.vocab_size = model, cache, adapters, vocab_size
        self._graphs: Graphs[_DecodeGraph] = Graphs(adapters, cache.device)
        self._pending: PendingStep | None = None
        # Whether the scheduler launches a step before it emits the tokens of the previous one. Without graphs a launch
        # is a whole step, so that would only delay the tokens.
        self.launches_ahead = self.uses_graphs

    @property
    def uses_graphs(self) -> bool:
        """Whether steps are CUDA graphs: if the kernels run. References wait for the GPU; no graph can capture that."""
        return kernels_run_on(self.cache.keys(0))

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """Functions that capture the decode graphs and compile the prefill kernels, which would delay a request.

        The first takes longest: it compiles nearly all kernels, unless Triton's cache has them.
        """
        if not self.uses_graphs:
            return []
        lengths = 1, 65  # the prefill kernels have one tile for up to 64 rows and one for more
        return [
            *(partial(self._graph, rows) for rows in _graph_rows(len(self.cache.lengths))),
            *(partial(self._warm_up_prefill, length) for length in lengths if length <= self.cache.max_len),
        ]

    @torch.no_grad()
    def _warm_up_prefill(self, length: int) -> None:
        """Prefills a prompt of `length` tokens in the first slot, and empties the slot."""
        ids = torch.zeros(1, length, dtype=torch.long, device=self.cache.device)  # (1, length)
        self.model.hidden(ids, cache=self.cache.slot(0))
        self.cache.lengths[0] = 0

    def launch(self, tokens: Sequence[int], adapter_ids: Sequence[int]) -> None:
        """Launches a step that appends one token to each of the first slots; does not wait for the GPU."""
        rows = len(tokens)
        lengths = self.cache.lengths[:rows]
        if self.uses_graphs:
            graph = self._graph(next(size for size in _graph_rows(len(self.cache.lengths)) if size >= rows))
            self._pending = graph.run([tokens, lengths, adapter_ids])
        else:
            inputs = torch.tensor([list(tokens), lengths, list(adapter_ids)], device=self.cache.device)  # (3, B)
            logits = self._logits(inputs, max(lengths), any(adapter_ids))  # (B, V)
            self._pending = PendingStep(logits, _summary(logits), rows)
        for slot in range(rows):
            self.cache.lengths[slot] += 1

    def result(self) -> StepOutput:
        """The output of the launched step; waits for the GPU."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return step_output(pending.logits, pending.rows, pending.summary)

    def step(self, tokens: Sequence[int], adapter_ids: Sequence[int]) -> StepOutput:
        """`launch` and `result`."""
        self.launch(tokens, adapter_ids)
        return self.result()

    def _graph(self, rows: int) -> _DecodeGraph:
        return self._graphs.get(rows, partial(_DecodeGraph, self))

    def _logits(self, inputs: Tensor, longest: int, adapters: bool) -> Tensor:
        """(B, V) float32. `inputs` (3, B) int64 are tokens, lengths of the slots and adapter ids.

        `longest` is at least every length. `adapters`: whether any row may have an adapter.
        """
        tokens, lengths, adapter_ids = inputs  # (B,) each
        ids = adapter_ids if adapters else None
        phase = Phase.DECODE if self.deterministic else Phase.DECODE_ANY_ORDER
        view = self.cache.decode(lengths, longest, phase)
        hidden = self.model.hidden(tokens[:, None], cache=view, adapter_ids=ids)  # (B, 1, d)
        return self.model.infer_logits(hidden, phase, ids)[:, 0, : self.vocab_size]


class _DecodeGraph:
    """A captured step of a fixed number of rows."""

    def __init__(self, runner: DecodeRunner, rows: int, pool: Any) -> None:
        device = runner.cache.device
        self._pinned = torch.tensor([[0], [IDLE], [BASE]]).repeat(1, rows).pin_memory()  # (3, B) int64
        self._inputs = self._pinned.to(device)  # (3, B): the graph reads its inputs at this address
        # A graph is replayed for any lengths and adapters: it gets the largest length, and adapters if any is loaded.
        longest, adapters = runner.cache.max_len - 1, bool(runner.adapters.ids)

        def step() -> tuple[Tensor, Tensor]:
            logits = runner._logits(self._inputs, longest, adapters)
            return logits, _summary(logits)

        self.graph, (self._logits, self._summary) = capture(step, device, pool)

    def run(self, inputs: Sequence[Sequence[int]]) -> PendingStep:
        rows = len(inputs[0])
        self._pinned[1, rows:] = IDLE  # the previous step has finished, so no copy reads the pinned memory now
        self._pinned[:, :rows] = torch.tensor([list(values) for values in inputs])  # (3, rows)
        self._inputs.copy_(self._pinned, non_blocking=True)
        self.graph.replay()
        return PendingStep(self._logits, self._summary, rows)


def _graph_rows(slots: int) -> list[int]:
    """The numbers of rows that have a graph: powers of two, and `slots`. So less than half of the rows are idle."""
    return [*(1 << n for n in range(slots.bit_length()) if 1 << n < slots), slots]
