"""The engine's token streams in asyncio: read until they end, the client disconnects, or the deadline passes.

The engine's thread writes tokens; the event loop's thread reads them. After each token the engine's thread schedules
`_changed.set` in the event loop with `call_soon_threadsafe`, so no thread waits for a request.
"""

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
# Sending blocks while the client does not read. The connection is closed this long after the request's deadline.
SEND_SECONDS = 5.0


class ClientGoneError(ApiError):
    """The client disconnected. Nobody receives the status; it is for the metrics (499, as in nginx)."""

    def __init__(self) -> None:
        super().__init__(499, "The client disconnected.")


class Generation:
    """The engine streams of one HTTP request. A context manager: exiting it cancels the streams and frees their slots.

    `fingerprint` is the sha256 of the weights that generate: the adapter's, or the base model's.
    """

    def __init__(
        self, streams: Sequence[Stream], receive: Receive, *, fingerprint: str, metrics: Metrics, seconds: float
    ) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self.streams, self.fingerprint = streams, fingerprint
        self.deadline = loop.time() + seconds
        self._seconds, self._metrics = seconds, metrics
        self._started = perf_counter()
        self._changed = asyncio.Event()  # set by a token or a disconnect
        self._disconnect = loop.create_task(_wait_for_disconnect(receive))
        self._disconnect.add_done_callback(lambda _: self._changed.set())

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads the stream
                loop.call_soon_threadsafe(self._changed.set)

        for stream in streams:
            stream.notify(wake)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disconnect.cancel()
        for stream in self.streams:
            stream.cancel()  # no effect on a finished stream

    async def tokens(self) -> AsyncGenerator[tuple[int, Token], None]:
        """Yields (stream index, token) as tokens arrive, until all streams have finished.

        Raises ClientGoneError when the client disconnects, ApiError on timeout or when the engine fails or stops.
        """
        running = dict(enumerate(self.streams))
        first = True
        while running:
            self._changed.clear()  # before reading: a token that arrives during the reads sets it again
            arrived = [(index, token) for index, stream in running.items() for token in stream.ready()]
            if self._disconnect.done():
                self._metrics.disconnected += 1
                raise ClientGoneError
            for index, token in arrived:
                if first:
                    self._metrics.time_to_first_token.observe(perf_counter() - self._started)
                    first = False
                if token.finish_reason in ("error", "cancelled"):
                    raise _stream_error(token, self.streams[index])
                if token.finish_reason is not None:
                    del running[index]
                yield index, token
            if running:
                await self._wait()
        self._metrics.total_time.observe(perf_counter() - self._started)

    async def _wait(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self.deadline):
                await self._changed.wait()
        if self._loop.time() >= self.deadline:
            message = f"The request took longer than this server's limit of {self._seconds:g} seconds."
            raise unavailable(message, code="timeout")


def _stream_error(token: Token, stream: Stream) -> ApiError:
    if token.finish_reason == "cancelled":
        return unavailable("The server is stopping.", code="stopping")
    # The message may contain file names or sizes: it goes to the log only.
    LOG.error("the engine failed: %s", stream.error)
    return ApiError(500, "The engine failed during this request.", code="engine_error")


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of server-sent events. The slots of its generation are freed when sending ends or fails."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation, self._events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        # TimeoutError and OSError: the client does not read, or is gone. There is nobody to receive an error.
        with self._generation as generation, suppress(TimeoutError, OSError):
            async with asyncio.timeout_at(generation.deadline + SEND_SECONDS), aclosing(self._bodies()) as bodies:
                await send(start)
                async for body in bodies:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _bodies(self) -> AsyncGenerator[bytes, None]:
        """The encoded events. An error becomes the last event, because the status was already sent."""
        try:
            async for event in self._events:
                yield event.encode()
        except ClientGoneError:
            return
        except ApiError as error:
            yield event_of(json.dumps(error.document)).encode()


def event_of(data: str) -> str:
    """`data` as one server-sent event."""
    return f"data: {data}\n\n"


DONE = event_of("[DONE]")
