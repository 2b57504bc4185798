"""Prefill: computes the keys and values of prompts, and the logits after their last tokens.

A long prompt is computed in chunks, one in each step of the scheduler, so that running requests continue in between.
Short prompts are computed several at once by a CUDA graph (infer/prefill_graphs.py).

Legend: T tokens of a chunk, n prompts, V the vocabulary of the tokenizer, d the width of the model.
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

    `active` are the requests in prefill: either one, in chunks, or several whose prompts one CUDA graph computes.
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
        """Whether a request can be prefilled together with the active ones: if there are none, or in one CUDA graph."""
        together = [*(active.stream.request for active in self.active), request]
        return len(together) == 1 or self._fit_graph(together)

    def add(self, active: ActiveRequest, slot: int) -> None:
        """Starts the prefill of a request; reuses the longest prefix of its prompt that a slot stores."""
        self.active.append(active)  # first: if the following fails, the request must receive the error
        request = active.stream.request
        # No prefix is reused for log-probabilities of the prompt, which need the logits of all its tokens, and for a
        # graph, which computes a whole prompt in any case. Else all but the last token may be reused: its logits are
        # needed.
        whole = request.prompt_logprobs or self._fit_graph([request])
        extent = len(request.prompt) + active.limit
        active.cached = self.slots.reuse_prefix(slot, active.adapter, () if whole else request.prompt[:-1], extent)

    def step(self, first_slot: int, max_tokens: int) -> tuple[int, Tensor | None]:
        """One pass over the model: all active prompts as a graph, or up to `max_tokens` of one prompt.

        The active requests have the slots from `first_slot` on. Returns (number of tokens computed, logits (n, V)
        float32 after the last token of each prompt; None if the prompt is not complete). For a prompt with a hidden
        state or key that is not finite the logits are NaN, and returned at once: the scheduler ends the request.
        """
        if self._fit_graph([active.stream.request for active in self.active]):
            return self._prefill_graph(first_slot)
        (active,) = self.active
        # Chunks end at multiples of a tile, counted from the prompt's start, so that their size changes no bit.
        end = active.cached + max_tokens // tiles.PREFILL_TILE * tiles.PREFILL_TILE
        chunk = active.ids[active.cached : end]
        return len(chunk), self._prefill_chunk(active, chunk, first_slot)

    def _prefill_graph(self, first_slot: int) -> tuple[int, Tensor]:
        prompts = [Prompt(active.ids, first_slot + n, self.adapter_id(active)) for n, active in enumerate(self.active)]
        logits = self.graphs.prefill(prompts)  # (n, V)
        for active, prompt in zip(self.active, prompts, strict=True):
            active.cached = len(active.ids)
            self.slots.append(prompt.slot, prompt.ids, Phase.PREFILL)
        return sum(len(prompt.ids) for prompt in prompts), logits

    def _prefill_chunk(self, active: ActiveRequest, chunk: list[int], slot: int) -> Tensor | None:
        adapter_id, device = self.adapter_id(active), self.slots.cache.device
        adapter_ids = None if adapter_id == BASE else torch.tensor([adapter_id], device=device)  # (1,)
        ids = torch.tensor([chunk], device=device)  # (1, T)
        hidden = self.model.hidden(ids, cache=self.slots.cache.slot(slot), adapter_ids=adapter_ids)[0]  # (T, d)
        # The output of attention may be finite although a key is NaN, so both are checked. `bool` waits for the GPU.
        if not bool(hidden[-1].isfinite().all() & self.slots.cache.keys_finite(slot, len(chunk))):
            return hidden.new_full((1, self.vocab_size), torch.nan, dtype=torch.float32)
        request = active.stream.request
        if request.prompt_logprobs:
            logits = self.model.infer_logits(hidden[None], Phase.PREFILL, adapter_ids)[0]  # (T, padded V)
            logits = logits[:, : self.vocab_size]  # (T, V)
            active.prompt_logprobs += prompt_logprobs(
                self.tokenizer, active.ids, active.cached, logits, request.logprobs or 0
            )
        active.cached += len(chunk)
        self.slots.append(slot, chunk, Phase.PREFILL)
        if active.cached < len(active.ids):
            return None
        active.stream.prompt = tuple(active.prompt_logprobs)
        # DECODE as in infer/generate.py and the graphs: only the same tiles give the same bits.
        return self.model.infer_logits(hidden[None, -1:], Phase.DECODE, adapter_ids)[0, :, : self.vocab_size]  # (1, V)

    def adapter_id(self, active: ActiveRequest) -> int:
        """The id of the request's adapter in the adapter banks."""
        return BASE if active.adapter is None else self.adapters.ids[active.adapter]

    def _fit_graph(self, requests: list[Request]) -> bool:
        """Whether a CUDA graph prefills the prompts of these requests at once."""
        logprobs = any(request.prompt_logprobs for request in requests)
        return not logprobs and self.graphs.shape_for([len(request.prompt) for request in requests]) is not None
