"""Streams of the engine read from the event loop, for as long as their client is there and their time lasts."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from time import perf_counter
from types import TracebackType

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.infer.requests import Stream, Token
from octavo.server.errors import ApiError, unavailable
from octavo.server.metrics import Metrics

LOG = logging.getLogger("octavo.server")
# A client that reads nothing blocks the sending of its answer; this long after the answer's time it is cut off.
SENDING_SECONDS = 5.0


class ClientGoneError(ApiError):
    """There is nobody left to answer: the status is for the counts (nginx's 499)."""

    def __init__(self) -> None:
        super().__init__(499, "The client went away.")


class Generation:
    """The streams of one HTTP request. A context: leaving it, for whatever reason, frees the slots that they hold.

    `fingerprint` is that of the weights that they come from.
    """

    def __init__(
        self, streams: Sequence[Stream], receive: Receive, *, fingerprint: str, metrics: Metrics, seconds: float
    ) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.streams, self.fingerprint = streams, fingerprint
        self.deadline = loop.time() + seconds
        self._seconds, self._metrics = seconds, metrics
        self._started = perf_counter()
        self._changed = asyncio.Event()
        self._watch = loop.create_task(_until_gone(receive))
        self._watch.add_done_callback(lambda _: self._changed.set())

        def wake() -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._changed.set)

        for stream in streams:
            stream.notify(wake)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.cancel()
        for stream in self.streams:
            stream.cancel()  # one that has finished does not care

    async def tokens(self) -> AsyncGenerator[tuple[int, Token], None]:
        """(number of the stream, its next token) as they come, until all have finished.

        ClientGoneError as soon as the client goes; ApiError when time is up or the engine fails or stops.
        """
        running = dict(enumerate(self.streams))
        first = True
        while running:
            self._changed.clear()
            arrived = [(number, token) for number, stream in running.items() for token in stream.ready()]
            if self._watch.done():
                self._metrics.gone += 1
                raise ClientGoneError
            for number, token in arrived:
                if first:
                    self._metrics.first_token.observe(perf_counter() - self._started)
                    first = False
                if token.finish_reason in ("error", "cancelled"):
                    raise _failure(token, self.streams[number])
                if token.finish_reason is not None:
                    del running[number]
                yield number, token
            if running:
                await self._more()
        self._metrics.whole_answer.observe(perf_counter() - self._started)

    async def _more(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self.deadline):
                await self._changed.wait()
        if self._loop.time() >= self.deadline:
            message = f"The answer took longer than this server's limit of {self._seconds:g} seconds."
            raise unavailable(message, code="timeout")


def _failure(token: Token, stream: Stream) -> ApiError:
    if token.finish_reason == "cancelled":
        return unavailable("The server is stopping.", code="stopping")
    # What failed may name files or sizes: the operator reads it in the log.
    LOG.error("the engine failed: %s", stream.error)
    return ApiError(500, "The engine failed while it answered this request.", code="engine_error")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events made from a generation, whose slots are free once this has been sent or could not be."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation, self._events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        with self._generation as generation, suppress(TimeoutError, OSError):
            async with asyncio.timeout_at(generation.deadline + SENDING_SECONDS), aclosing(self._bodies()) as bodies:
                await send(start)
                async for body in bodies:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _bodies(self) -> AsyncGenerator[bytes, None]:
        """The events; a failure on the way becomes the last of them, since the status is long sent."""
        try:
            async for event in self._events:
                yield event.encode()
        except ClientGoneError:
            return
        except ApiError as error:
            yield event_of(json.dumps(error.document)).encode()


def event_of(data: str) -> str:
    """One event."""
    return f"data: {data}\n\n"


DONE = event_of("[DONE]")
