"""How prompts come into the cache: a long one in chunks, so that running requests go on between; short ones whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.infer.active import ActiveRequest
from octavo.infer.decoding import BASE
from octavo.infer.logprobs import tell_prompt
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
    """Reads prompts into the slots behind those of the running requests.

    `runs` are those under way: one whose prompt is read in chunks, or some whose prompts are read whole at once.
    """

    def __init__(
        self, model: Decoder, tokenizer: PreTrainedTokenizerFast, slots: Slots, routing: ServedAdapters, vocab_size: int
    ) -> None:
        self.model, self.tokenizer, self.slots, self.routing, self.vocab_size = (
            model,
            tokenizer,
            slots,
            routing,
            vocab_size,
        )
        self.prompts = PrefillGraphs(model, slots.cache, routing, vocab_size)
        self.runs: list[ActiveRequest] = []

    def takes(self, request: Request) -> bool:
        """Whether a request's prompt can be read along with those under way."""
        asked = [*(run.stream.request for run in self.runs), request]
        return len(asked) == 1 or self._whole(asked)

    def begin(self, run: ActiveRequest, slot: int) -> None:
        """Puts a request's prompt under way, as far as a slot began alike."""
        self.runs.append(run)  # at once: what fails from here on is heard of
        request = run.stream.request
        # The last token is always read anew; a short prompt all of it, which takes no longer on a card.
        whole = request.prompt_logprobs or self._whole([request])
        run.done = self.slots.begin(slot, run.adapter, () if whole else request.prompt[:-1])

    def read(self, first: int, most: int) -> tuple[int, Tensor | None]:
        """Reads short prompts whole, or up to `most` tokens of a long one, in whole tiles but for its end. The runs are
        in the slots from `first` on.

        Returns how many tokens that were, and logits (runs, words) float32 if the prompts' ends were reached; NaN,
        and at once, where something that was computed of a prompt is not finite.
        """
        if self._whole([run.stream.request for run in self.runs]):
            return self._read_whole(first)
        (run,) = self.runs
        new = run.ids[run.done : run.done + most // tiles.PREFILL_TILE * tiles.PREFILL_TILE]
        return len(new), self._read_chunk(run, new, first)

    def _read_whole(self, first: int) -> tuple[int, Tensor]:
        prompts = [Prompt(run.ids, first + n, self.number(run)) for n, run in enumerate(self.runs)]
        logits = self.prompts.read(prompts)
        for run, prompt in zip(self.runs, prompts, strict=True):
            run.done = len(run.ids)
            self.slots.wrote(prompt.slot, prompt.ids, Phase.PREFILL)
        return sum(len(prompt.ids) for prompt in prompts), logits

    def _read_chunk(self, run: ActiveRequest, new: list[int], slot: int) -> Tensor | None:
        number, device = self.number(run), self.slots.cache.keys.device
        ids = None if number == BASE else torch.tensor([number], device=device)  # (1,)
        hidden = self.model.hidden(
            torch.tensor([new], device=device), cache=self.slots.cache.slot(slot), adapter_ids=ids
        )[0]  # (T, d)
        if not bool(hidden[-1].isfinite().all() & self.slots.cache.keys_finite(slot, len(new))):
            return hidden.new_full((1, self.vocab_size), torch.nan, dtype=torch.float32)
        if run.stream.request.prompt_logprobs:
            logits = self.model.infer_logits(hidden[None], Phase.PREFILL, ids)[0, :, : self.vocab_size]
            run.logprobs += tell_prompt(self.tokenizer, run.ids, run.done, logits, run.stream.request.logprobs or 0)
        run.done += len(new)
        self.slots.wrote(slot, new, Phase.PREFILL)
        if run.done < len(run.ids):
            return None
        run.stream.prompt = tuple(run.logprobs)
        return self.model.infer_logits(hidden[None, -1:], Phase.DECODE, ids)[0, :, : self.vocab_size]

    def number(self, run: ActiveRequest) -> int:
        """That of the run's adapter."""
        return BASE if run.adapter is None else self.routing.served[run.adapter]

    def _whole(self, requests: list[Request]) -> bool:
        """Whether these prompts are read whole, at once."""
        logprobs = any(request.prompt_logprobs for request in requests)
        return not logprobs and self.prompts.shape_for([len(request.prompt) for request in requests]) is not None
