"""Prefill: a long prompt in chunks, so that running requests continue in between; short prompts at once as a graph.

Legend: T tokens of a chunk, V the vocabulary of the tokenizer, d the width of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.infer.active import ActiveRequest
from octavo.infer.decoding import BASE
from octavo.infer.logprobs import prompt_logprobs
from octavo.infer.prefill_graphs import PrefillGraphs, Prompt
from octavo.infer.requests import Request
from octavo.infer.slots import Slots
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops import tiles
from octavo.ops.tiles import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Prefiller:
    """Prefills prompts in the slots after those of the running requests.

    `active` are the requests in prefill: one whose prompt is computed in chunks, or several of one CUDA graph.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerFast,
        slots: Slots,
        adapters: ServedAdapters,
        vocab_size: int,
    ) -> None:
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.adapters, self.vocab_size = adapters, vocab_size
        self.graphs = PrefillGraphs(model, slots.cache, adapters, vocab_size)
        self.active: list[ActiveRequest] = []

    def accepts(self, request: Request) -> bool:
        """Whether a request can be prefilled together with the active ones."""
        together = [*(active.stream.request for active in self.active), request]
        return len(together) == 1 or self._fit_graph(together)

    def add(self, active: ActiveRequest, slot: int) -> None:
        """Starts the prefill of a request; copies the start of its prompt if another slot has it."""
        self.active.append(active)  # first: if the following fails, the request must receive the error
        request = active.stream.request
        # The last token is always computed, for its logits; of a prompt that fits a graph all tokens: it costs no more.
        entire = request.prompt_logprobs or self._fit_graph([request])
        active.cached = self.slots.reuse_prefix(slot, active.adapter, () if entire else request.prompt[:-1])

    def step(self, first_slot: int, max_tokens: int) -> tuple[int, Tensor | None]:
        """One pass over the model: all active prompts as a graph, or up to `max_tokens` of one, in whole tiles.

        The active requests have the slots from `first_slot` on. Returns (number of tokens, logits (requests, V)
        float32 if the prompts are complete, else None). The logits are NaN, and returned at once, for a prompt with a
        hidden state or key that is not finite.
        """
        if self._fit_graph([active.stream.request for active in self.active]):
            return self._prefill_graph(first_slot)
        (active,) = self.active
        end = active.cached + max_tokens // tiles.PREFILL_TILE * tiles.PREFILL_TILE
        chunk = active.ids[active.cached : end]
        return len(chunk), self._prefill_chunk(active, chunk, first_slot)

    def _prefill_graph(self, first_slot: int) -> tuple[int, Tensor]:
        prompts = [Prompt(active.ids, first_slot + n, self.adapter_id(active)) for n, active in enumerate(self.active)]
        logits = self.graphs.prefill(prompts)
        for active, prompt in zip(self.active, prompts, strict=True):
            active.cached = len(active.ids)
            self.slots.append(prompt.slot, prompt.ids, Phase.PREFILL)
        return sum(len(prompt.ids) for prompt in prompts), logits

    def _prefill_chunk(self, active: ActiveRequest, chunk: list[int], slot: int) -> Tensor | None:
        adapter_id, device = self.adapter_id(active), self.slots.cache.keys.device
        adapter_ids = None if adapter_id == BASE else torch.tensor([adapter_id], device=device)  # (1,)
        ids = torch.tensor([chunk], device=device)  # (1, T)
        hidden = self.model.hidden(ids, cache=self.slots.cache.slot(slot), adapter_ids=adapter_ids)[0]  # (T, d)
        if not bool(hidden[-1].isfinite().all() & self.slots.cache.keys_finite(slot, len(chunk))):
            return hidden.new_full((1, self.vocab_size), torch.nan, dtype=torch.float32)
        request = active.stream.request
        if request.prompt_logprobs:
            logits = self.model.infer_logits(hidden[None], Phase.PREFILL, adapter_ids)[0, :, : self.vocab_size]
            active.prompt_logprobs += prompt_logprobs(
                self.tokenizer, active.ids, active.cached, logits, request.logprobs or 0
            )
        active.cached += len(chunk)
        self.slots.append(slot, chunk, Phase.PREFILL)
        if active.cached < len(active.ids):
            return None
        active.stream.prompt = tuple(active.prompt_logprobs)
        return self.model.infer_logits(hidden[None, -1:], Phase.DECODE, adapter_ids)[0, :, : self.vocab_size]

    def adapter_id(self, active: ActiveRequest) -> int:
        """The id of the request's adapter."""
        return BASE if active.adapter is None else self.adapters.ids[active.adapter]

    def _fit_graph(self, requests: list[Request]) -> bool:
        """Whether a CUDA graph prefills the prompts of these requests at once."""
        logprobs = any(request.prompt_logprobs for request in requests)
        return not logprobs and self.graphs.shape_for([len(request.prompt) for request in requests]) is not None
