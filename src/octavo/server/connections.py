"""Connections that may not dawdle: uvicorn's over h11, with a limit on their number and on what they wait for.

uvicorn itself ends only connections that are silent between two requests. A client that sends its head byte by byte,
or reads no more of an answer, would otherwise hold a connection, and the answer's memory, for as long as it likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.server.refusals import RefusedError, unavailable, wrong

HEAD_SECONDS = 10.0  # for the first line and the headers: they are a few hundred bytes
UNREAD_SECONDS = 60.0  # for an answer's next 64 KiB to be taken


class Connection(H11Protocol):
    """One client's connection. `most` may be open at once; those beyond get 503 and are closed."""

    def __init__(self, *args: Any, most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most
        self._head = _Timer(self.loop, HEAD_SECONDS, self.timeout_keep_alive_handler)
        self._unread = _Timer(self.loop, UNREAD_SECONDS, lambda: self.transport.abort())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))  # uvloop's is one in all but its class
        if len(self.connections) > self._most:
            self._end_with(unavailable(f"{self._most} connections are open already.", code="overloaded"))
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # ends the time that uvicorn gives a silent connection
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._unread.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread.start()

    def resume_writing(self) -> None:
        self._unread.stop()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of the same shape as all others, unless it comes amid an answer."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._end_with(wrong(msg, code="invalid_http"))
        else:
            self.transport.close()

    def _watch_head(self) -> None:
        """Starts the time for a request's head with its first byte, and stops it with its last."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._head.stop()
        else:
            self._head.start()

    def _end_with(self, refusal: RefusedError) -> None:
        answer = refusal.response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        self.transport.write(
            b"HTTP/1.1 %d \r\n" % refusal.status
            + b"".join(b"%s: %s\r\n" % header for header in headers)
            + b"\r\n"
            + bytes(answer.body)
        )
        self.transport.close()


class _Timer:
    """Calls back once its time is up. Started again while it runs, it goes on as it was."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]) -> None:
        self._loop, self._seconds, self._call = loop, seconds, call
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
