"""The inference engine: many requests at once over one model, with several adapters in one batch; thread-safe.

One thread runs the model, in steps (infer/scheduler.py). Other threads submit requests and read their streams at any
time, and load and remove adapters between two steps. The cache is allocated once, with a fixed number of slots: a
request waits in the queue until a slot is free, and is refused if the queue is full.

Adapters have several representations:

    Adapter          (adapters) the tensors of an adapter file, without a model
    AdapterBank      (layers/multi_lora.py) the LoRA of all served adapters on one layer, by adapter id
    ServedAdapters   (layers/multi_lora.py) the adapter ids by name: `scheduler.adapters`
    ServedAdapter    (infer/requests.py) what a client learns of an adapter: name, hash, time of loading
    Engine.adapters  the ServedAdapter by name, of those that accept requests: `_adapters`

Batch invariance: an answer has the same bits as that of infer/generate.py, the reference, whatever other requests run
and whatever part of its prompt was already in the cache. On a GPU this needs `Limits.deterministic` if more than 32
requests are decoded at once: for so many rows another matmul instruction is faster, which sums in another order
(docs/design/batch-invariance.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import time
from typing import TYPE_CHECKING

import torch

from octavo.adapters import Adapter, attached
from octavo.adapters.served import remove_, serve_
from octavo.errors import AdapterError
from octavo.infer.generate import all_stop_ids
from octavo.infer.requests import Limits, QueueFullError, Request, ServedAdapter, Stats, Stream, check_request
from octavo.infer.scheduler import Scheduler
from octavo.infer.waiting import WaitingQueue
from octavo.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Engine:
    """The engine of one model. `start` runs it in a thread of its own; without it the caller calls `step`.

    `base` is the name of the base model in requests and responses, `base_sha256` the hash of its weights.

    Two locks of different length protect the state. `_step_lock` is held for a whole step, and by whoever changes the
    model or the slots. `_condition` is held for moments: it guards the queue, the counters, the names of adapters and
    `_stopping`, so that `submit` does not wait for a step.
    """

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
        self._queue = WaitingQueue()
        self._condition = self._queue.changed  # the queue's own: `_loop` waits for a new request or for `_stopping`
        self.scheduler = Scheduler(model, tokenizer, self._queue, self.limits, all_stop_ids(tokenizer, stop_ids))
        self._adapters: dict[str, ServedAdapter] = {}
        self._draining: dict[str, ServedAdapter] = {}  # accept no new requests; removed when the last one has finished
        self._step_lock = threading.Lock()
        self._next_lock = threading.Lock()  # of the thread that is next to acquire `_step_lock`
        self._stopping = False
        self._thread: threading.Thread | None = None

    # Called from any thread.

    def submit(self, request: Request) -> Stream:
        """Queues a request and returns at once. UsageError, AdapterError or QueueFullError if it is refused."""
        check_request(request, context=self.context, vocab_size=self.scheduler.vocab_size)
        with self._condition:
            adapter = None if request.adapter is None else self._adapters.get(request.adapter)
            if request.adapter is not None and adapter is None:
                raise self._unknown_adapter(request.adapter)
            if self._stopping:
                raise QueueFullError("The engine is stopping.", hint="Send the request to another engine.")
            # Requests that the next step moves into free slots do not count as waiting. `active` belongs to
            # `_step_lock`, so the number may be stale; then one request more or less waits, which is harmless.
            free = self.limits.slots - len(self.scheduler.active)
            if len(self._queue) >= self.limits.queue + free:
                raise QueueFullError(f"{len(self._queue)} requests are waiting already.", hint="Try again later.")
            stream = Stream(request, adapter)
            self._queue.put(stream)
        return stream

    def adapters(self) -> dict[str, ServedAdapter]:
        """The adapters that accept requests, by name."""
        with self._condition:
            return dict(self._adapters)

    def load_adapter(self, name: str, adapter: Adapter) -> ServedAdapter:
        """Serves an adapter from the next step on. AdapterError if it does not fit the model or the name is taken."""
        self._check_name_is_free(name)  # before waiting for the end of a step
        with self._exclusive_access():
            self._check_name_is_free(name)  # again: another thread may have taken the name
            serve_(self.model, self.scheduler.adapters, adapter, name)
            served = ServedAdapter(name, adapter.sha256, time(), adapter.trained_on, attached(adapter))
            with self._condition:
                self._adapters[name] = served
        return served

    def draining(self) -> dict[str, ServedAdapter]:
        """The adapters that accept no new requests but are not yet removed, by name."""
        with self._condition:
            return dict(self._draining)

    def drain_adapter(self, name: str) -> ServedAdapter:
        """Refuses new requests for an adapter from now on. AdapterError if there is no adapter of that name."""
        with self._condition:
            if name in self._adapters:
                self._draining[name] = self._adapters.pop(name)
            if name not in self._draining:
                raise self._unknown_adapter(name)
            return self._draining[name]

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, draining or not. AdapterError if there is no such adapter or a request uses it."""
        with self._exclusive_access(), self._condition:
            served = self._draining if name in self._draining else self._adapters
            if name not in served:
                raise self._unknown_adapter(name)
            streams = [*self._queue.streams(), *(active.stream for active in self.scheduler.active)]
            users = sum(stream.request.adapter == name for stream in streams)
            if users:
                raise AdapterError(f"{users} requests are using the adapter {name!r}.", hint="Try again later.")
            del served[name]
            remove_(self.model, self.scheduler.adapters, name)
            self.scheduler.slots.invalidate(name)

    def stats(self) -> Stats:
        """The limits, the current use of slots and cache, and the counters."""
        with self._condition:
            active = self.scheduler.active  # may be stale, which is harmless: `_step_lock` guards it
            return Stats(
                slots=self.limits.slots,
                queue_limit=self.limits.queue,
                cache_tokens_total=self.limits.slots * self.limits.max_len,
                running=len(active),
                waiting=len(self._queue),
                cache_tokens_used=sum(request.cached for request in active),
                **self._queue.counts,
            )

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """Functions that compile kernels and capture graphs, which would delay the first requests; none on a CPU.

        The caller calls each once, before `start`. They are separate so that it can show progress.
        """
        return [*self.scheduler.decoder.warmup_tasks(), *self.scheduler.prefiller.graphs.warmup_tasks()]

    def start(self) -> None:
        """Starts the engine's thread."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._loop, name="octavo-engine", daemon=True)
        self._thread.start()

    def stop(self, grace_seconds: float) -> None:
        """Refuses new requests, runs the others for up to `grace_seconds`, then cancels those that are left."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(grace_seconds)
            # Between two steps every request is either in the queue or in a slot: none is missed.
            with self._exclusive_access(), self._condition:
                for stream in [*self._queue.streams(), *(active.stream for active in self.scheduler.active)]:
                    stream.cancel()
            self._thread.join()

    @contextmanager
    def _exclusive_access(self) -> Iterator[None]:
        """Exclusive access to the model and the slots: for a step, and for all that must not happen during a step.

        A lock in Python is not fair: the engine's loop releases `_step_lock` and acquires it again at once, and could
        do so for ever while another thread waits. So every thread first acquires `_next_lock` and holds it while it
        waits for `_step_lock`. The loop then waits for `_next_lock`, and the other thread runs after the current step.
        """
        with self._next_lock:
            self._step_lock.acquire()
        try:
            yield
        finally:
            self._step_lock.release()

    # Called from the engine's thread only, or by the caller if there is no such thread.

    def step(self) -> None:
        """One step of the scheduler."""
        with self._exclusive_access(), torch.no_grad():
            self.scheduler.step()

    def _loop(self) -> None:
        while True:
            with self._condition:
                while not (self._queue or self.scheduler.active or self._stopping):
                    self._condition.wait()
                if self._stopping and not (self._queue or self.scheduler.active):
                    return
            try:
                self.step()
            except Exception as error:  # any exception: threads that read a stream would otherwise wait for ever
                self.scheduler.fail(error)

    def _check_name_is_free(self, name: str) -> None:
        if name == self.base or name in self.adapters() or name in self.draining():
            raise AdapterError(
                f"The name {name!r} is taken.", hint="Remove that adapter first, or choose another name."
            )

    def _unknown_adapter(self, name: str) -> AdapterError:
        names = ", ".join([self.base, *self._adapters])
        return AdapterError(f"There is no adapter {name!r} here.", hint=f"There are: {names}.")
