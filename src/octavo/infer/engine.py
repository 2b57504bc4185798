"""Many requests at once over one model: continuous batching, with several adapters in one batch.

One thread owns the model. Each of its steps reads of the oldest waiting prompts what one chunk holds, then one new
token for every running request (infer/decoding.py); requests join and leave between steps. Running requests stand in
slots 0, 1, .. without gaps, so that their part of the cache is one view; requests whose prompts are being read
(infer/prefill.py) stand behind them. The cache is taken once: requests beyond its slots wait, and beyond the queue's
limit they are refused.

An answer has the same bits whatever requests run beside it and whatever the cache holds of its prompt: those of
infer/engine.generate, the reference that tests compare with. Only where a GPU decodes more than 32 requests at once
does that take `Limits.deterministic` (docs/design/batch-invariance.md).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

import torch

from octavo.adapters import remove_, serve_
from octavo.errors import AdapterError, ModelError
from octavo.infer.active import ActiveRequest, next_tokens
from octavo.infer.decoding import Chosen, DecodeRunner, chosen
from octavo.infer.generate import TextStream, all_stop_ids
from octavo.infer.logprobs import tell
from octavo.infer.prefill import Prefiller
from octavo.infer.requests import Limits, QueueFullError, Request, ServedAdapter, Stats, Stream, Token, check_request
from octavo.infer.slots import Slots
from octavo.layers.multi_lora import ServedAdapters
from octavo.models import Decoder
from octavo.ops import tiles
from octavo.ops.tiles import Phase
from octavo.store import peft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Engine:
    """The engine of one model. `start` lets its thread run; without it `step` may be called by hand."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerFast,
        *,
        base: str,
        base_sha256: str = "",
        limits: Limits | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        limits = limits or Limits()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.base, self.base_sha256 = base, base_sha256
        self.limits = replace(limits, max_len=min(limits.max_len, model.config.context))
        self.context = self.limits.max_len
        self._stop_ids = all_stop_ids(tokenizer, stop_ids)
        self._vocab_size = min(len(tokenizer), model.config.vocabulary)
        self._slots = Slots(model.new_slots(slots=self.limits.slots, max_len=self.limits.max_len))
        self._routing = ServedAdapters()
        self._decoder = DecodeRunner(
            model, self._slots.cache, self._routing, self._vocab_size, deterministic=self.limits.deterministic
        )
        self._reader = Prefiller(model, tokenizer, self._slots, self._routing, self._vocab_size)
        self._adapters: dict[str, ServedAdapter] = {}
        self._draining: dict[str, ServedAdapter] = {}  # those that take no more requests and are to be removed
        self._running: list[ActiveRequest] = []
        self._in_flight: list[ActiveRequest] = []  # whose last token a step is reading
        self._waiting: deque[Stream] = deque()
        self._counts: Counter[str] = Counter()  # of Stats, those that only rise
        self._changed = threading.Condition()  # guards what other threads touch: the queue, adapters, stopping
        self._stepping = threading.Lock()  # held while the model is at work, taken by `_alone` only
        self._turn = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # Asked from any thread.

    def submit(self, request: Request) -> Stream:
        """Takes a request and returns at once. UsageError, AdapterError or QueueFullError if it cannot be taken."""
        check_request(request, context=self.context, vocab_size=self._vocab_size)
        with self._changed:
            adapter = None if request.adapter is None else self._adapters.get(request.adapter)
            if request.adapter is not None and adapter is None:
                raise self._unknown(request.adapter)
            if self._stopping:
                raise QueueFullError("The engine is stopping.", hint="Ask another one.")
            free = self.limits.slots - len(self._at_work())  # the next step takes so many out of the queue
            if len(self._waiting) >= self.limits.queue + free:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already.", hint="Try again later.")
            stream = Stream(request, adapter)
            self._waiting.append(stream)
            self._count("requests_total")
            self._changed.notify()
        return stream

    def adapters(self) -> dict[str, ServedAdapter]:
        with self._changed:
            return dict(self._adapters)

    def load_adapter(self, name: str, folder: Path, *, allow_pickle: bool = False) -> ServedAdapter:
        """Serves an adapter from the next step on; AdapterError if it does not fit or its name is taken."""
        self._check_free(name)
        read = peft.read(folder, allow_pickle=allow_pickle)
        with self._alone():
            self._check_free(name)  # once more: another thread may have been faster
            serve_(self.model, self._routing, read, name)
            served = ServedAdapter(name, read.sha256, folder, time(), read.trained_on)
            with self._changed:
                self._adapters[name] = served
        return served

    def draining(self) -> dict[str, ServedAdapter]:
        """The adapters that take no more requests and are not yet removed."""
        with self._changed:
            return dict(self._draining)

    def drain_adapter(self, name: str) -> ServedAdapter:
        """Takes no more requests for an adapter from now on; AdapterError if there is none."""
        with self._changed:
            if name in self._adapters:
                self._draining[name] = self._adapters.pop(name)
            if name not in self._draining:
                raise self._unknown(name)
            return self._draining[name]

    def remove_adapter(self, name: str) -> None:
        """Takes an adapter away, draining or not. AdapterError if there is none, or a request is using it."""
        with self._alone(), self._changed:
            held = self._draining if name in self._draining else self._adapters
            if name not in held:
                raise self._unknown(name)
            users = [run.adapter for run in self._at_work()] + [stream.request.adapter for stream in self._waiting]
            if name in users:
                raise AdapterError(f"{users.count(name)} requests are using the adapter {name!r}.", hint="Try later.")
            del held[name]
            remove_(self.model, self._routing, name)
            self._slots.forget(name)

    def stats(self) -> Stats:
        with self._changed:
            used = sum(run.done for run in self._at_work())
            running = len(self._at_work())
            limits = self.limits.slots, self.limits.queue, self.limits.slots * self.limits.max_len
            return Stats(*limits, running, len(self._waiting), used, **self._counts)

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """Work that would make the first requests wait, piece by piece; none on a CPU. Before `start`."""
        return [*self._decoder.warmup_tasks(), *self._reader.prompts.warmup_tasks()]

    def start(self) -> None:
        """Lets the engine's own thread take steps."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._loop, name="octavo-engine", daemon=True)
        self._thread.start()

    def stop(self, grace_seconds: float) -> None:
        """Takes no more requests, finishes those at work for so long, then cancels what is left."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(grace_seconds)
            with self._alone(), self._changed:  # between steps a request is waiting or at work, and nowhere else
                for stream in [*self._waiting, *(run.stream for run in self._at_work())]:
                    stream.cancel()
            self._thread.join()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Between two steps, or for one. Who waits has the turn: else the next step could take the lock back first."""
        with self._turn:
            self._stepping.acquire()
        try:
            yield
        finally:
            self._stepping.release()

    # The engine's own thread.

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._at_work() or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._waiting or self._at_work()):
                    return
            try:
                self.step()
            except Exception as error:  # whatever it was, whoever waits for an answer must hear of it
                self._fail(error)

    def step(self) -> None:
        """What one chunk holds of prompts, then one token for every running request."""
        with self._alone(), torch.no_grad():
            self._drop_cancelled()
            if not self._in_flight:
                self._read()
                self._launch()
            if self._in_flight:
                self._decode()
            self._count("steps_total")

    def _read(self) -> None:
        """As much of the oldest waiting prompts as one chunk holds; what is read at once counts as a quarter of it."""
        left = max(self.limits.chunk, tiles.PREFILL_TILE)
        while left >= tiles.PREFILL_TILE:
            self._admit()
            if not self._reader.runs:
                return
            count, logits = self._reader.read(len(self._running), left)
            left -= max(count, self.limits.chunk // 4)
            if logits is not None:
                runs, self._reader.runs = self._reader.runs, []
                self._running += runs
                self._take(runs, chosen(logits, len(runs)))

    def _admit(self) -> None:
        """The oldest waiting requests into the slots behind the running ones: one, or as many as are read at once."""
        while (slot := len(self._at_work())) < self.limits.slots:
            with self._changed:
                if not self._waiting or not self._reader.takes(self._waiting[0].request):
                    return
                stream = self._waiting.popleft()
            request = stream.request
            limit = min(request.sampling.max_new_tokens, self.context - len(request.prompt))
            run = ActiveRequest(
                stream, limit, TextStream(self.tokenizer, request.sampling.stop),
                torch.Generator().manual_seed(request.sampling.seed), list(request.prompt),
            )  # fmt: skip
            self._reader.begin(run, slot)
            self._count("prompt_tokens_total", len(run.ids))
            self._count("reused_tokens_total", run.done)

    def _launch(self) -> None:
        """Has the token read that each running request chose last; `_decode` hears of it."""
        if not self._running:
            return
        new = [run.ids[run.done] for run in self._running]
        self._decoder.launch(new, [self._reader.number(run) for run in self._running])
        for slot, (run, token) in enumerate(zip(self._running, new, strict=True)):
            run.done += 1
            self._slots.wrote(slot, [token], Phase.DECODE)
        self._in_flight = list(self._running)

    def _decode(self) -> None:
        """One new token for each running request. A card reads it already while the host tells of it."""
        runs, self._in_flight = self._in_flight, []
        self._take(runs, self._decoder.found(), go_on=self._decoder.runs_ahead)

    def _take(self, runs: list[ActiveRequest], found: Chosen, *, go_on: bool = False) -> None:
        """Chooses the next token of each run from its row of the logits, and tells it.

        To `go_on` is to launch the next step before anything is told, if that is sure to be wanted.
        """
        tokens = next_tokens(runs, found)
        for run, token in zip(runs, tokens, strict=True):
            if token is not None:
                run.ids.append(token)
        if go_on and None not in tokens and self._nothing_changes():
            self._launch()
        for row, (run, token) in enumerate(zip(runs, tokens, strict=True)):
            if run.limit == 0:  # cancelled, or at its end, while the card went on
                continue
            if token is None:  # of this request alone: an extreme penalty, an adapter full of NaN
                self._give_up(run, _not_finite())
            else:
                self._tell(run, tell(token, found.logits[row], run.stream.request.logprobs))
        self._leave()

    def _nothing_changes(self) -> bool:
        """Whether the next step is sure to be of the same requests and of no prompt."""
        with self._changed:
            joins = self._waiting and len(self._running) < self.limits.slots
        return not joins and not self._reader.runs and all(run.goes_on(self._stop_ids) for run in self._running)

    def _tell(self, run: ActiveRequest, told: Token) -> None:
        """Puts the token's text and, if it is the last, the reason into the stream."""
        reason: str | None = None
        if told.token_id in self._stop_ids:
            text, reason = run.text.finish(), "stop"
        else:
            text, stopped = run.text.push(told.token_id)
            if stopped:
                reason = "stop"
            elif run.answered == run.limit:
                text, reason = text + run.text.finish(), "length"
        self._count("generated_tokens_total")
        run.stream.put(replace(told, text=text, finish_reason=reason))
        if reason is not None:
            run.limit = 0  # marks it as finished
            self._count("finished_total")

    def _leave(self) -> None:
        """Finished requests go; the last ones move into their slots, after what a card is still reading into these."""
        for slot in reversed(range(len(self._running))):
            if self._running[slot].limit == 0:
                self._remove(slot)

    def _remove(self, slot: int) -> None:
        """Takes a running request out of its slot, and the last running one, and those being read, into the gap."""
        last = len(self._running) - 1
        if self._running[slot].stream.error:
            self._slots.clear(slot)
        self._running[slot] = self._running[last]
        self._running.pop()
        self._slots.move(last, slot)
        for slot in range(last, last + len(self._reader.runs)):
            self._slots.move(slot + 1, slot)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [stream for stream in self._waiting if stream.cancelled]
            self._waiting = deque(stream for stream in self._waiting if not stream.cancelled)
        for run in self._at_work():
            if run.stream.cancelled:
                dropped.append(run.stream)
                run.limit = 0
        self._reader.runs = [run for run in self._reader.runs if run.limit > 0]
        self._leave()
        for stream in dropped:
            stream.put(Token(-1, "", "cancelled"))
        self._count("cancelled_total", len(dropped))

    def _fail(self, error: Exception) -> None:
        """Ends every request at work with the error; the engine goes on with those that wait."""
        for run in self._at_work():
            if run.limit > 0:
                self._give_up(run, error)
        self._running, self._reader.runs, self._in_flight = [], [], []
        self._slots.forget()

    def _give_up(self, run: ActiveRequest, error: Exception) -> None:
        """Ends one request with an error."""
        run.limit = 0
        run.stream.failure = error
        run.stream.error = f"{type(error).__name__}: {error}"
        self._count("failed_total")
        run.stream.put(Token(-1, "", "error"))

    def _at_work(self) -> list[ActiveRequest]:
        return [*self._running, *self._reader.runs]

    def _check_free(self, name: str) -> None:
        if name == self.base or name in self.adapters() or name in self.draining():
            raise AdapterError(
                f"The name {name!r} is taken.", hint="Remove that adapter first, or choose another name."
            )

    def _unknown(self, name: str) -> AdapterError:
        there = ", ".join([self.base, *self._adapters])
        return AdapterError(f"There is no adapter {name!r} here.", hint=f"There are: {there}.")

    def _count(self, name: str, more: int = 1) -> None:
        with self._changed:
            self._counts[name] += more


def _not_finite() -> ModelError:
    return ModelError(
        "The model's numbers are not finite.",
        hint="Is the repetition penalty extreme? If an adapter is on, did its training diverge?",
    )
