"""Many requests at once over one model, with several adapters in one batch: the interface for all threads.

One thread owns the model and takes steps (infer/scheduler.py). Other threads submit requests, read their streams, and
load and remove adapters between two steps. The cache is allocated once: requests without a free slot wait, and are
refused when the queue is full.

An answer has the same bits whatever other requests run and whatever part of its prompt is in the cache: those of
infer/generate.py, the reference of the tests. On a GPU that decodes more than 32 requests at once this needs
`Limits.deterministic` (docs/design/batch-invariance.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import time
from typing import TYPE_CHECKING

import torch

from octavo.adapters import Adapter, remove_, serve_
from octavo.errors import AdapterError
from octavo.infer.generate import all_stop_ids
from octavo.infer.requests import Limits, QueueFullError, Request, ServedAdapter, Stats, Stream, check_request
from octavo.infer.scheduler import Scheduler
from octavo.infer.waiting import WaitingQueue
from octavo.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Engine:
    """The engine of one model. `start` runs it in a thread of its own; without it the caller calls `step`."""

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
        self._changed = self._queue.changed  # guards adapters and stopping too
        self.scheduler = Scheduler(model, tokenizer, self._queue, self.limits, all_stop_ids(tokenizer, stop_ids))
        self._adapters: dict[str, ServedAdapter] = {}
        self._draining: dict[str, ServedAdapter] = {}  # accept no more requests and are to be removed
        self._stepping = threading.Lock()  # held during a step; acquired by `_between_steps` only
        self._turn = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # Called from any thread.

    def submit(self, request: Request) -> Stream:
        """Queues a request and returns at once. UsageError, AdapterError or QueueFullError if it is refused."""
        check_request(request, context=self.context, vocab_size=self.scheduler.vocab_size)
        with self._changed:
            adapter = None if request.adapter is None else self._adapters.get(request.adapter)
            if request.adapter is not None and adapter is None:
                raise self._unknown(request.adapter)
            if self._stopping:
                raise QueueFullError("The engine is stopping.", hint="Ask another one.")
            free = self.limits.slots - len(self.scheduler.active)  # the next step admits so many
            if len(self._queue) >= self.limits.queue + free:
                raise QueueFullError(f"{len(self._queue)} requests are waiting already.", hint="Try again later.")
            stream = Stream(request, adapter)
            self._queue.put(stream)
        return stream

    def adapters(self) -> dict[str, ServedAdapter]:
        """The adapters that accept requests, by name."""
        with self._changed:
            return dict(self._adapters)

    def load_adapter(self, name: str, adapter: Adapter) -> ServedAdapter:
        """Serves an adapter from the next step on. AdapterError if it does not fit the model or the name is taken."""
        self._check_free(name)
        with self._between_steps():
            self._check_free(name)  # again: another thread may have taken the name
            serve_(self.model, self.scheduler.adapters, adapter, name)
            served = ServedAdapter(name, adapter.sha256, time(), adapter.trained_on)
            with self._changed:
                self._adapters[name] = served
        return served

    def draining(self) -> dict[str, ServedAdapter]:
        """The adapters that accept no more requests and are not yet removed."""
        with self._changed:
            return dict(self._draining)

    def drain_adapter(self, name: str) -> ServedAdapter:
        """Refuses requests for an adapter from now on; AdapterError if there is none."""
        with self._changed:
            if name in self._adapters:
                self._draining[name] = self._adapters.pop(name)
            if name not in self._draining:
                raise self._unknown(name)
            return self._draining[name]

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter, draining or not. AdapterError if there is none, or a request is using it."""
        with self._between_steps(), self._changed:
            served = self._draining if name in self._draining else self._adapters
            if name not in served:
                raise self._unknown(name)
            streams = [*self._queue.streams(), *(active.stream for active in self.scheduler.active)]
            users = sum(stream.request.adapter == name for stream in streams)
            if users:
                raise AdapterError(f"{users} requests are using the adapter {name!r}.", hint="Try later.")
            del served[name]
            remove_(self.model, self.scheduler.adapters, name)
            self.scheduler.slots.invalidate(name)

    def stats(self) -> Stats:
        """The counters, and how much is in use now."""
        with self._changed:
            active = self.scheduler.active
            limits = self.limits.slots, self.limits.queue, self.limits.slots * self.limits.max_len
            used = sum(request.cached for request in active)
            return Stats(*limits, len(active), len(self._queue), used, **self._queue.counts)

    def warmup_tasks(self) -> list[Callable[[], object]]:
        """Compiling and capturing that would delay the first requests, in parts; none on a CPU. Before `start`."""
        return [*self.scheduler.decoder.warmup_tasks(), *self.scheduler.prefiller.graphs.warmup_tasks()]

    def start(self) -> None:
        """Starts the thread that takes steps."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._loop, name="octavo-engine", daemon=True)
        self._thread.start()

    def stop(self, grace_seconds: float) -> None:
        """Refuses new requests, finishes all others within the grace time, then cancels the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(grace_seconds)
            with self._between_steps(), self._changed:  # between steps every request is in the queue or in a slot
                for stream in [*self._queue.streams(), *(active.stream for active in self.scheduler.active)]:
                    stream.cancel()
            self._thread.join()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Excludes steps, or is one. A waiter holds `_turn`, so the engine loop cannot acquire the lock before it."""
        with self._turn:
            self._stepping.acquire()
        try:
            yield
        finally:
            self._stepping.release()

    # Called from the engine's thread.

    def step(self) -> None:
        """One step of the scheduler."""
        with self._between_steps(), torch.no_grad():
            self.scheduler.step()

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self.scheduler.active or self._stopping):
                    self._changed.wait()
                if self._stopping and not (self._queue or self.scheduler.active):
                    return
            try:
                self.step()
            except Exception as error:  # of any kind: the callers that wait for tokens must receive it
                self.scheduler.fail(error)

    def _check_free(self, name: str) -> None:
        if name == self.base or name in self.adapters() or name in self.draining():
            raise AdapterError(
                f"The name {name!r} is taken.", hint="Remove that adapter first, or choose another name."
            )

    def _unknown(self, name: str) -> AdapterError:
        names = ", ".join([self.base, *self._adapters])
        return AdapterError(f"There is no adapter {name!r} here.", hint=f"There are: {names}.")
