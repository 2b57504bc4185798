"""Parses request heads with h11, limits their size and number of headers, and rejects ambiguous framing.

h11 limits only incomplete heads, accepts any HTTP/x.y, and prefers Transfer-Encoding if Content-Length is also sent.
RFC 9112 (6.3) allows that, but a proxy in front of the server may prefer the other one (request smuggling).
"""

from __future__ import annotations

import h11

HEAD_BYTES = 32 * 1024  # browsers and proxies send 1 to 8 KiB
MAX_HEADERS = 100
# Bytes passed to the parser at once. At most this much is read of a head that is too long.
FEED_BYTES = 16 * 1024
TLS_HANDSHAKE = b"\x16"


class Parser(h11.Connection):
    """The server side of one connection. `problem` and `status` describe why `next_event` raised."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.problem, self.status = "This is not HTTP/1.1.", 400
        self._first = b""

    def receive_data(self, data: bytes) -> None:
        self._first = self._first or data[:1]
        super().receive_data(data)
        self._skip_empty_lines()

    def start_next_cycle(self) -> None:
        super().start_next_cycle()
        self._skip_empty_lines()

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event. h11.RemoteProtocolError for data that is not HTTP or that this server rejects."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check(event)
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint
            if self.status == 431:
                self.problem = f"The request head has more than {HEAD_BYTES:,} bytes or {MAX_HEADERS} headers."
            elif self._first == TLS_HANDSHAKE:
                self.problem = "This port serves plain HTTP, not TLS. Use http://, or put a TLS proxy in front."
            elif isinstance(error, _RejectedError) or self.status == 501:
                self.problem = f"{error}."
            raise
        return event

    def _skip_empty_lines(self) -> None:
        """Skips empty lines before a request line, as RFC 9112 (2.2) recommends; h11 rejects them."""
        if self.their_state is h11.IDLE:
            buffered, _ = self.trailing_data
            if empty := len(buffered) - len(buffered.lstrip(b"\r\n")):
                self._receive_buffer.maybe_extract_at_most(empty)


class _RejectedError(h11.RemoteProtocolError):
    """A head that h11 accepts but this server rejects."""


def _check(request: h11.Request) -> None:
    names = [name for name, _ in request.headers]
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if len(names) > MAX_HEADERS or size > HEAD_BYTES:
        raise _RejectedError("too long", error_status_hint=431)
    if request.http_version not in (b"1.0", b"1.1"):
        raise _RejectedError("This server supports HTTP/1.0 and HTTP/1.1", error_status_hint=505)
    if b"transfer-encoding" in names and b"content-length" in names:
        raise _RejectedError("The request has both Content-Length and Transfer-Encoding: send one of them")
    if b"transfer-encoding" in names and request.http_version == b"1.0":
        raise _RejectedError("HTTP/1.0 does not support Transfer-Encoding")
