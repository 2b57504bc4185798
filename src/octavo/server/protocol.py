"""Connections with bounds: uvicorn's protocol over h11, which limits their number and how long each may wait for what.

uvicorn ends only connections that are silent between two requests. Here every state of a connection has an end:

- a request's head must arrive within HEAD_SECONDS;
- a body that the app reads has the app's own limit (guard.BODY_SECONDS). One that has not arrived by the time its
  request is answered is read no further: the answer says `Connection: close`, what still comes is discarded for
  LINGER_SECONDS, so that the client can read the answer instead of a reset, and then the connection is closed;
- of an answer at least UNREAD_BYTES must be taken in UNREAD_SECONDS, also after the server has closed its side.

A client that closes its sending side is answered. One that is gone altogether looks the same until something is sent
to it: so while its answer has not begun, it gets an interim `100 Continue` every PROBE_SECONDS, which HTTP/1.1 allows
at any time and which makes the system report a closed socket.

The parser is h11 by design, also where httptools is installed: the bounds of `heads` are its.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from octavo.server.errors import ApiError, unavailable
from octavo.server.heads import PIECE_BYTES, Parser

HEAD_SECONDS = 10.0  # for the first line and the headers: they are a few hundred bytes
UNREAD_SECONDS = 20.0
UNREAD_BYTES = 64 * 1024  # 3 KiB/s: a slow mobile line takes ten times as much
LINGER_SECONDS = 2.0  # a round trip and what was on its way
PROBE_SECONDS = 10.0
RESET_SECONDS = 0.5  # in which a probe's answer, a reset, has arrived
CLOSE = (b"connection", b"close")


class Connection(H11Protocol):
    """One client's connection. `most` may be open at once; those beyond get 503 and are closed."""

    def __init__(self, *args: Any, most: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: Parser = Parser()
        self.app: Any = self._closing(self.app)
        self._most = most
        self._half_closed = False
        self._unsent = 0
        self._head = _Timer(self.loop, HEAD_SECONDS, self.timeout_keep_alive_handler)
        self._unread = _Timer(self.loop, UNREAD_SECONDS, self._check_unread)
        self._linger = _Timer(self.loop, LINGER_SECONDS, lambda: self._socket.close())
        self._probe = _Timer(self.loop, PROBE_SECONDS, self._send_probe)
        self._reset = _Timer(self.loop, RESET_SECONDS, self._check_reset)

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class
        super().connection_made(cast(asyncio.Transport, _Closing(self._socket, self._close)))
        if len(self.connections) > self._most and not self._evict():
            self._end_with(unavailable(f"{self._most} connections are open already.", code="overloaded"))
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            if self.transport.is_closing():  # what comes after the end is discarded
                return
            super().data_received(data[start : start + PIECE_BYTES])  # ends the time of a silent connection
        self._watch_head()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn always has the connection closed
        """True keeps the connection open: where a whole request is being answered."""
        if self.transport.is_closing() or self.cycle is None or self.cycle.response_complete:
            return False
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY, h11.ERROR):
            return False
        self._half_closed = True
        self._probe.start()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread, self._linger, self._probe, self._reset):
            timer.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._unread.stop()
        super().resume_writing()

    # What uvicorn calls.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.transport.close()  # nothing more will come

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error of the same shape as all others, unless it comes amid an answer."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._end_with(ApiError(self.conn.status, self.conn.problem, code="invalid_http"))
        else:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is offered is not taken: RFC 9110 (7.8) allows that, and it is worth no line in the log."""

    # Our own.

    def _closing(self, app: Any) -> Callable[[Scope, Receive, Send], Any]:
        """`app`, whose answers to requests that have not arrived in full say that the connection ends with them."""

        async def closing(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._probe.stop()
                    if self.conn.their_state is h11.SEND_BODY:
                        message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
                await send(message)

            await app(scope, receive, sent)

        return closing

    def _watch_head(self) -> None:
        """Starts the time for a request's head with its first byte, and stops it with its last."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._head.stop()
        else:
            self._head.start()

    def _watch_unread(self) -> None:
        self._unsent = self._socket.get_write_buffer_size()
        self._unread.start()

    def _check_unread(self) -> None:
        """Cuts a client off that has taken too little of its answer."""
        left = self._socket.get_write_buffer_size()
        if left and left > self._unsent - UNREAD_BYTES:
            self._socket.abort()
        elif left:
            self._watch_unread()

    def _close(self) -> None:
        """Ends the connection once all is sent; where more may be on its way, that is discarded for a while."""
        for timer in (self._head, self._probe):
            timer.stop()
        self._watch_unread()
        begun = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.conn.trailing_data[0]
        if begun and not self._half_closed and not self._socket.is_closing():
            self._socket.write_eof()
            self._socket.resume_reading()
            self._linger.start()
        else:
            self._socket.close()

    def _evict(self) -> bool:
        """Makes room by ending a connection whose last answer has been given."""
        for other in self.connections:
            if isinstance(other, Connection) and other is not self and other.transport.is_closing():
                other._socket.abort()
                return True
        return False

    def _send_probe(self) -> None:
        waits = self.cycle is not None and not self.cycle.response_started and not self.transport.is_closing()
        if waits and self.conn.our_state is h11.SEND_RESPONSE and self.conn.their_http_version != b"1.0":
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self._socket.write(self.conn.send(interim))
            self._reset.start()
            self._probe.start()

    def _check_reset(self) -> None:
        held = self._socket.get_extra_info("socket")
        if held is not None and held.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._socket.abort()

    def _end_with(self, refusal: ApiError) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # the app has nobody left to answer
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        answer = refusal.response()
        self.transport.write(
            b"HTTP/1.1 %d \r\n" % refusal.status
            + b"".join(b"%s: %s\r\n" % header for header in [*answer.raw_headers, CLOSE])
            + b"\r\n"
            + bytes(answer.body)
        )
        self.transport.close()


class _Closing:
    """A transport as uvicorn sees it: closing it is up to the connection."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self._end = transport, close
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._end()

    def is_closing(self) -> bool:
        return self._closed or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Timer:
    """Calls back once its time is up. Started again while it runs, it goes on as it was."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, call: Callable[[], None]) -> None:
        self._loop, self._seconds, self._call = loop, seconds, call
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._run)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run(self) -> None:
        self._handle = None
        self._call()
