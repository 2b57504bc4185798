"""uvicorn's h11 protocol with a limit on the number of connections and a timeout for every connection state.

uvicorn itself only closes idle keep-alive connections. Here:

- The head of a request must arrive within HEAD_SECONDS.
- The body has the guard's timeout (guard.BODY_SECONDS). If a request is answered before its body has arrived, the rest
  is not read: the response has `Connection: close`, further input is discarded for LINGER_SECONDS, so that the client
  receives the response instead of a reset, and then the connection is closed.
- The client must read at least UNREAD_BYTES of a response in UNREAD_SECONDS, also while the connection is closing.

A client that only closes its sending side (half-close) gets its response. A client that has disconnected looks the same
until data is sent to it. So it gets an interim `100 Continue` every PROBE_SECONDS until its response starts: HTTP/1.1
allows that at any time, and the operating system then reports a closed socket.

The parser is always h11, even if httptools is installed, because the limits in `heads` need h11.
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
from octavo.server.heads import FEED_BYTES, Parser

HEAD_SECONDS = 10.0  # for the request line and the headers, a few hundred bytes
UNREAD_SECONDS = 20.0
UNREAD_BYTES = 64 * 1024  # 3 KiB/s; a slow mobile connection is ten times as fast
LINGER_SECONDS = 2.0  # a round trip and the data in transit
PROBE_SECONDS = 10.0
RESET_SECONDS = 0.5  # time for the reset that answers a probe to arrive
CLOSE = (b"connection", b"close")


class Connection(H11Protocol):
    """One client connection. If more than `max_connections` are open, a new one gets a 503 and is closed."""

    def __init__(self, *args: Any, max_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: Parser = Parser()
        self.app: Any = self._announce_close(self.app)
        self._max_connections = max_connections
        self._half_closed = False
        self._unsent_before = 0
        self._head_timer = _Timer(self.loop, HEAD_SECONDS, self.timeout_keep_alive_handler)
        self._unread_timer = _Timer(self.loop, UNREAD_SECONDS, self._check_unread)
        self._linger_timer = _Timer(self.loop, LINGER_SECONDS, lambda: self._socket.close())
        self._probe_timer = _Timer(self.loop, PROBE_SECONDS, self._send_probe)
        self._reset_timer = _Timer(self.loop, RESET_SECONDS, self._check_reset)

    # Callbacks of the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._socket = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass
        super().connection_made(cast(asyncio.Transport, _LingeringTransport(self._socket, self._close)))
        if len(self.connections) > self._max_connections and not self._evict():
            self._respond_and_close(
                unavailable(f"{self._max_connections} connections are open already.", code="overloaded")
            )
        else:
            self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), FEED_BYTES):
            if self.transport.is_closing():  # discard input after the close
                return
            super().data_received(data[start : start + FEED_BYTES])  # also stops the keep-alive timer
        self._update_head_timer()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's always closes the connection
        """True keeps the connection open, for a complete request that is being answered."""
        if self.transport.is_closing() or self.cycle is None or self.cycle.response_complete:
            return False
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY, h11.ERROR):
            return False
        self._half_closed = True
        self._probe_timer.start()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._unread_timer, self._linger_timer, self._probe_timer, self._reset_timer):
            timer.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_unread_timer()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._unread_timer.stop()
        super().resume_writing()

    # Callbacks of uvicorn.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.transport.close()  # the client sends nothing more

    def send_400_response(self, msg: str) -> None:
        """Answers invalid HTTP with an error in OpenAI's format, unless a response is already being sent."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._respond_and_close(ApiError(self.conn.status, self.conn.problem, code="invalid_http"))
        else:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Disables uvicorn's warning: RFC 9110 (7.8) allows a server to ignore an Upgrade header."""

    # Internal methods.

    def _announce_close(self, app: Any) -> Callable[[Scope, Receive, Send], Any]:
        """Wraps `app`: adds `Connection: close` to a response that starts before the request's body has arrived."""

        async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_close(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self._probe_timer.stop()
                    if self.conn.their_state is h11.SEND_BODY:
                        message = {**message, "headers": [*message.get("headers", ()), CLOSE]}
                await send(message)

            await app(scope, receive, send_with_close)

        return wrapped

    def _update_head_timer(self) -> None:
        """Starts the head timer while a request head is expected or incomplete; stops it otherwise."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._head_timer.stop()
        else:
            self._head_timer.start()

    def _start_unread_timer(self) -> None:
        self._unsent_before = self._socket.get_write_buffer_size()
        self._unread_timer.start()

    def _check_unread(self) -> None:
        """Aborts the connection if the client has read too little of the response."""
        unsent = self._socket.get_write_buffer_size()
        if unsent and unsent > self._unsent_before - UNREAD_BYTES:
            self._socket.abort()
        elif unsent:
            self._start_unread_timer()

    def _close(self) -> None:
        """Closes the connection after all data is sent; discards further input for a while if some is expected."""
        for timer in (self._head_timer, self._probe_timer):
            timer.stop()
        self._start_unread_timer()
        input_pending = self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.conn.trailing_data[0]
        if input_pending and not self._half_closed and not self._socket.is_closing():
            self._socket.write_eof()
            self._socket.resume_reading()
            self._linger_timer.start()
        else:
            self._socket.close()

    def _evict(self) -> bool:
        """Aborts one connection that is already closing, to make room for another. Returns whether there was one."""
        for connection in self.connections:
            if isinstance(connection, Connection) and connection is not self and connection.transport.is_closing():
                connection._socket.abort()
                return True
        return False

    def _send_probe(self) -> None:
        answer_pending = self.cycle is not None and not self.cycle.response_started and not self.transport.is_closing()
        if answer_pending and self.conn.our_state is h11.SEND_RESPONSE and self.conn.their_http_version != b"1.0":
            informational = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self._socket.write(self.conn.send(informational))
            self._reset_timer.start()
            self._probe_timer.start()

    def _check_reset(self) -> None:
        client_socket = self._socket.get_extra_info("socket")
        if client_socket is not None and client_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._socket.abort()

    def _respond_and_close(self, error: ApiError) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # the app gets a disconnect
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = error.response()
        self.transport.write(
            b"HTTP/1.1 %d \r\n" % error.status
            + b"".join(b"%s: %s\r\n" % header for header in [*response.raw_headers, CLOSE])
            + b"\r\n"
            + bytes(response.body)
        )
        self.transport.close()


class _LingeringTransport:
    """The transport that uvicorn gets. `close` calls the connection's `_close`, which may linger."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self._close_connection = transport, close
        self._closed = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._close_connection()

    def is_closing(self) -> bool:
        return self._closed or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Timer:
    """Calls `callback` after `seconds`. `start` has no effect while the timer is running."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, callback: Callable[[], None]) -> None:
        self._loop, self._seconds, self._callback = loop, seconds, callback
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._fire)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._callback()
