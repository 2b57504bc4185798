"""Continuous batching with chunked prefill: which requests have a slot of the cache, and what a step computes.

A step prefills prompts, oldest first, up to one chunk of tokens in total; then it decodes one token of every running
request. A request is admitted to a free slot before a step and leaves its slot after one. Running requests have slots
0, 1, .. without gaps, so that their part of the cache is one view; the requests in prefill have the slots after them.

Prefix reuse: a slot keeps the keys and values of its last request until another request gets it. If the prompt of a new
request starts with the same tokens as a slot's, and has the same adapter, they are copied instead of computed again
(infer/slots.py). `ActiveRequest.cached` counts the tokens whose keys and values a slot has, reused or computed.

Speculative launch: on a GPU the next decode step is launched before the tokens of the previous one are put into the
streams, so that the GPU works while the CPU decodes text. This is done only if the next step certainly has the same
requests. Only a stop string, which is found in the text, may end a request nevertheless: the result of the launched
step is then discarded for this request.

Legend: n requests, V the vocabulary of the tokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from octavo.errors import ModelError
from octavo.infer.active import ActiveRequest, next_tokens
from octavo.infer.decoding import DecodeRunner, StepOutput, step_output
from octavo.infer.generate import TextStream
from octavo.infer.logprobs import token_with_logprobs
from octavo.infer.prefill import Prefiller
from octavo.infer.requests import Limits, Token
from octavo.infer.slots import Slots
from octavo.infer.waiting import WaitingQueue
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops import tiles
from octavo.ops.tiles import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Scheduler:
    """Takes requests from `queue` into slots and computes them step by step. One thread at a time may call it."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerFast,
        queue: WaitingQueue,
        limits: Limits,
        stop_ids: frozenset[int],
    ) -> None:
        self.tokenizer, self.queue, self.limits, self.stop_ids = tokenizer, queue, limits, stop_ids
        self.vocab_size = min(len(tokenizer), model.config.vocabulary)
        self.slots = Slots(model.new_slots(slots=limits.slots, max_len=limits.max_len), model.length_regime)
        self.adapters = ServedAdapters()
        self.decoder = DecodeRunner(
            model, self.slots.cache, self.adapters, self.vocab_size, deterministic=limits.deterministic
        )
        self.prefiller = Prefiller(model, tokenizer, self.slots, self.adapters, self.vocab_size)
        self.running: list[ActiveRequest] = []  # requests in decode; running[i] has slot i
        self._in_flight: list[ActiveRequest] = []  # the requests of the launched decode step, [] if there is none

    @property
    def active(self) -> list[ActiveRequest]:
        """All requests that have a slot, in the order of the slots."""
        return [*self.running, *self.prefiller.active]

    def step(self) -> None:
        """Prefills up to one chunk of prompt tokens, then decodes one token of every running request."""
        self._drop_cancelled()
        # If the previous step launched this step's decode already (speculative launch), there is nothing to prefill: it
        # did so only because no prompt was waiting.
        if not self._in_flight:
            self._prefill()
            self._launch()
        if self._in_flight:
            self._decode()
        self.queue.count("steps_total")

    def fail(self, error: Exception) -> None:
        """Ends every request that has a slot with the error. Waiting requests stay in the queue.

        The exception may have left any slot half written, so no slot's tokens are reused.
        """
        for active in self.active:
            if not active.finished:
                self._fail_request(active, error)
        self.running, self.prefiller.active, self._in_flight = [], [], []
        self.slots.invalidate()

    def _prefill(self) -> None:
        """Prefills up to one chunk of tokens, in one or several passes over the model.

        Running requests wait meanwhile. A pass reads all weights, so a short one takes nearly as long as a longer one:
        each counts as at least a quarter of the chunk, which limits the passes of a step to four. A pass works in whole
        tiles (ops/tiles.py), so none starts with a budget of less than one.
        """
        budget = max(self.limits.chunk, tiles.PREFILL_TILE)  # tokens
        while budget >= tiles.PREFILL_TILE:
            self._admit()
            if not self.prefiller.active:
                return
            count, logits = self.prefiller.step(len(self.running), budget)  # logits (n, V)
            budget -= max(count, self.limits.chunk // 4)
            if logits is not None:
                prefilled, self.prefiller.active = self.prefiller.active, []
                self.running += prefilled
                self._add_tokens(prefilled, step_output(logits, len(prefilled)))

    def _admit(self) -> None:
        """Moves the oldest waiting requests into free slots and starts their prefill.

        `Prefiller.accepts` limits them to those that one pass prefills together: one request, or on a GPU several short
        ones in a CUDA graph.
        """
        while (slot := len(self.active)) < self.limits.slots:
            stream = self.queue.take(self.prefiller.accepts)
            if stream is None:
                return
            request = stream.request
            # Prompt and answer together must fit into the slot.
            limit = min(request.sampling.max_new_tokens, self.limits.max_len - len(request.prompt))
            active = ActiveRequest(
                stream, limit, TextStream(self.tokenizer, request.sampling.stop),
                torch.Generator().manual_seed(request.sampling.seed), list(request.prompt),
            )  # fmt: skip
            self.prefiller.add(active, slot)
            self.queue.count("prompt_tokens_total", len(active.ids))
            self.queue.count("reused_tokens_total", active.cached)

    def _launch(self) -> None:
        """Launches a decode step of all running requests; `_decode` waits for its result.

        The input of a request is its last token, the only one whose key and value are not in the cache.
        """
        if not self.running:
            return
        tokens = [active.ids[active.cached] for active in self.running]
        self.decoder.launch(tokens, [self.prefiller.adapter_id(active) for active in self.running])
        for slot, (active, token) in enumerate(zip(self.running, tokens, strict=True)):
            active.cached += 1
            self.slots.append(slot, [token], Phase.DECODE)  # so that no prompt reuses it: decode has other bits
        self._in_flight = list(self.running)

    def _decode(self) -> None:
        """Waits for the launched step and adds its tokens."""
        in_flight, self._in_flight = self._in_flight, []
        self._add_tokens(in_flight, self.decoder.result(), launch_next=self.decoder.launches_ahead)

    def _add_tokens(self, requests: list[ActiveRequest], output: StepOutput, *, launch_next: bool = False) -> None:
        """Selects the next token of every request from its row of the logits, and puts it into the request's stream.

        With `launch_next` the next step is launched in between, if it certainly has the same requests.
        """
        tokens = next_tokens(requests, output)
        for active, token in zip(requests, tokens, strict=True):
            if token is not None:  # None: the logits are not finite, and the request is ended below
                active.ids.append(token)
        if launch_next and None not in tokens and self._same_requests_continue():
            self._launch()
        for row, (active, token) in enumerate(zip(requests, tokens, strict=True)):
            if active.finished:  # cancelled, or ended at a stop string while this step was in flight: discard its token
                continue
            if token is None:  # logits that are not finite, of this request alone: extreme penalty, adapter with NaN
                self._fail_request(active, _not_finite())
            else:
                n_logprobs = active.stream.request.logprobs
                self._emit(active, token_with_logprobs(token, output.logits[row], n_logprobs))
        self._remove_finished()

    def _same_requests_continue(self) -> bool:
        """Whether the next step certainly decodes the same requests, without prefill."""
        admits = len(self.queue) and len(self.running) < self.limits.slots
        return (
            not admits
            and not self.prefiller.active
            and all(active.needs_next_step(self.stop_ids) for active in self.running)
        )

    def _emit(self, active: ActiveRequest, token: Token) -> None:
        """Puts a token into the request's stream, with the text and, at the end, the finish reason."""
        reason: str | None = None
        if token.token_id in self.stop_ids:
            text, reason = active.text.finish(), "stop"
        else:
            text, stopped = active.text.push(token.token_id)
            if stopped:
                reason = "stop"
            elif active.generated == active.limit:
                text, reason = text + active.text.finish(), "length"
        self.queue.count("generated_tokens_total")
        active.stream.put(replace(token, text=text, finish_reason=reason))
        if reason is not None:
            active.finished = True
            self.queue.count("finished_total")

    def _remove_finished(self) -> None:
        """Frees the slots of finished requests.

        A step in flight still writes to these slots. That is safe: the copies here are queued on the same CUDA
        stream, so they run after it.
        """
        for slot in reversed(range(len(self.running))):  # from the last: `_free` moves the last request
            if self.running[slot].finished:
                self._free(slot)

    def _free(self, slot: int) -> None:
        """Frees a running request's slot, without leaving a gap.

        The last running request moves into the slot, and each request in prefill moves down by one.
        """
        last = len(self.running) - 1
        if self.running[slot].stream.error:
            self.slots.clear(slot)  # its keys and values may be NaN
        self.running[slot] = self.running[last]
        self.running.pop()
        self.slots.copy(last, slot)
        for target in range(last, last + len(self.prefiller.active)):
            self.slots.copy(target + 1, target)

    def _drop_cancelled(self) -> None:
        """Ends cancelled requests, waiting or active. A freed slot is available to this step."""
        dropped = self.queue.take_cancelled()
        for active in self.active:
            if active.stream.cancelled:
                dropped.append(active.stream)
                active.finished = True
        self.prefiller.active = [active for active in self.prefiller.active if not active.finished]
        self._remove_finished()
        for stream in dropped:
            stream.put(Token.end("cancelled"))
        self.queue.count("cancelled_total", len(dropped))

    def _fail_request(self, active: ActiveRequest, error: Exception) -> None:
        """Ends one request with an error."""
        active.finished = True
        active.stream.failure = error
        active.stream.error = f"{type(error).__name__}: {error}"
        self.queue.count("failed_total")
        active.stream.put(Token.end("error"))


def _not_finite() -> ModelError:
    return ModelError(
        "The model's logits are not finite.",
        hint="Is the repetition penalty extreme? If an adapter is used, did its training diverge?",
    )
