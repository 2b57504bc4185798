"""One new token for each running request: a step over the first slots of the cache, on a card as a CUDA graph.

A graph is recorded for a few numbers of rows; a step takes the next larger one and leaves its last rows idle. What
differs from step to step is sent in one copy, and what the host wants to know comes back in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

IDLE = -1  # the length of a slot that has no token to read
BASE = 0  # the number of a row that goes through no adapter


@dataclass(frozen=True)
class Chosen:
    """What a step found: logits (n, V) float32 where the model is; of each row the largest one and its token."""

    logits: Tensor
    best: list[float]
    greedy: list[int]


def chosen(logits: Tensor, rows: int, summary: Tensor | None = None) -> Chosen:
    """The first `rows` of the logits (B, V); `summary` is `_summary` of them if that was computed already."""
    summary = _summary(logits) if summary is None else summary
    best, greedy = summary.tolist()
    return Chosen(logits[:rows], best[:rows], [int(token) for token in greedy[:rows]])


def _summary(logits: Tensor) -> Tensor:
    """(2, B) float64, which holds any token's number: the largest logit of each row, and its token."""
    best, greedy = logits.max(dim=1)
    return torch.stack([best.double(), greedy.double()])


class EagerStep(NamedTuple):
    """A step under way: its logits (B, V) and their summary, and how many rows count."""

    logits: Tensor
    summary: Tensor
    rows: int


class DecodeRunner:
    """Steps of one model over one cache. `words` are the logits that count: rows past the tokenizer's do not.

    `deterministic`: a row's bits do not depend on the number of rows, however many there are.
    """

    def __init__(
        self, model: Decoder, cache: SlotCache, routing: ServedAdapters, vocab_size: int, *, deterministic: bool = False
    ) -> None:
        self.deterministic = deterministic
        self.model, self.cache, self.routing, self.vocab_size = model, cache, routing, vocab_size
        self._graphs: Graphs[_Recorded] = Graphs(routing, cache.keys.device)
        self._launched: EagerStep | None = None
        self.runs_ahead = self.records  # whether a step is worth launching before the last one was told

    @property
    def records(self) -> bool:
        """Whether steps are CUDA graphs: on a card where the kernels run. The definitions ask the card for numbers."""
        return kernels_run_on(self.cache.keys)

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """What would make a request wait, piece by piece: every graph that a step can need, kernels for prompts.

        The first piece has nearly all kernels compiled, unless that was done once on this machine.
        """
        if not self.records:
            return []
        counts = 1, 65  # prefill has a tile for up to 64 rows, and one for more
        return [
            *(partial(self._recorded, rows) for rows in _sizes(len(self.cache.lengths))),
            *(partial(self._rehearse_prompt, count) for count in counts if count <= self.cache.max_len),
        ]

    @torch.no_grad()
    def _rehearse_prompt(self, count: int) -> None:
        """Reads a prompt of so many tokens into the first slot and forgets it."""
        ids = torch.zeros(1, count, dtype=torch.long, device=self.cache.keys.device)
        self.model.hidden(ids, cache=self.cache.slot(0))
        self.cache.lengths[0] = 0

    def launch(self, tokens: Sequence[int], adapter_ids: Sequence[int]) -> None:
        """Reads one token into each of the first slots, through the adapters of these numbers. No wait on a card."""
        rows = len(tokens)
        lengths = self.cache.lengths[:rows]
        if self.records:
            recorded = self._recorded(next(size for size in _sizes(len(self.cache.lengths)) if size >= rows))
            self._launched = recorded.run([tokens, lengths, adapter_ids])
        else:
            given = torch.tensor([list(tokens), lengths, list(adapter_ids)], device=self.cache.keys.device)
            logits = self._logits(given, max(lengths), any(adapter_ids))
            self._launched = EagerStep(logits, _summary(logits), rows)
        for slot in range(rows):
            self.cache.lengths[slot] += 1

    def found(self) -> Chosen:
        """What the last launch found, once the card is there."""
        assert self._launched is not None
        launched, self._launched = self._launched, None
        return chosen(launched.logits, launched.rows, launched.summary)

    def step(self, tokens: Sequence[int], adapter_ids: Sequence[int]) -> Chosen:
        """Both at once."""
        self.launch(tokens, adapter_ids)
        return self.found()

    def _recorded(self, rows: int) -> _Recorded:
        return self._graphs.of(rows, partial(_Recorded, self))

    def _logits(self, given: Tensor, longest: int, adapters: bool) -> Tensor:
        """(B, words) float32. `given` (3, B): tokens, lengths of the slots, numbers of the adapters."""
        tokens, lengths, adapter_ids = given  # (B,) each
        ids = adapter_ids if adapters else None
        phase = Phase.DECODE if self.deterministic else Phase.DECODE_ANY_ORDER
        hidden = self.model.hidden(tokens[:, None], cache=self.cache.step(lengths, longest, phase), adapter_ids=ids)
        return self.model.infer_logits(hidden, phase, ids)[:, 0, : self.vocab_size]


class _Recorded:
    """A step of a fixed number of rows as a CUDA graph."""

    def __init__(self, decoder: DecodeRunner, rows: int, pool: Any) -> None:
        device = decoder.cache.keys.device
        self._sent = torch.tensor([[0], [IDLE], [BASE]]).repeat(1, rows).pin_memory()
        self._given = self._sent.to(device)
        longest, adapters = decoder.cache.max_len - 1, bool(decoder.routing.served)

        def step() -> tuple[Tensor, Tensor]:
            logits = decoder._logits(self._given, longest, adapters)
            return logits, _summary(logits)

        self.graph, (self._logits, self._summary) = record(step, device, pool)

    def run(self, given: Sequence[Sequence[int]]) -> EagerStep:
        rows = len(given[0])
        self._sent[1, rows:] = IDLE  # the step before was waited for, so nobody reads this any more
        self._sent[:, :rows] = torch.tensor([list(line) for line in given])
        self._given.copy_(self._sent, non_blocking=True)
        self.graph.replay()
        return EagerStep(self._logits, self._summary, rows)


def _sizes(slots: int) -> list[int]:
    """Numbers of rows that graphs are recorded for: powers of two, and all slots."""
    return [*(1 << n for n in range(slots.bit_length()) if 1 << n < slots), slots]
