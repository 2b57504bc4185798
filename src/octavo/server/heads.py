"""What a request's head may be: h11's parser with bounds on size and number, and refusals of ambiguous framing.

h11 bounds only heads that are incomplete, takes any HTTP/x.y, and lets Transfer-Encoding win over Content-Length, which
RFC 9112 (6.3) allows but which a proxy in front of this server may read the other way round.
"""

from __future__ import annotations

import h11

HEAD_BYTES = 32 * 1024  # browsers and proxies send 1 to 8 KiB
MOST_HEADERS = 100
# What the parser is given at once: so a head that is too long is refused before more than this is read beyond it.
PIECE_BYTES = 16 * 1024
TLS_HANDSHAKE = b"\x16"


class Parser(h11.Connection):
    """A server's side of one connection. `problem` says in plain words why `next_event` raised."""

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
        """The next event. h11.RemoteProtocolError for what is no HTTP or is not taken here."""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check(event)
        except h11.RemoteProtocolError as error:
            self.status = error.error_status_hint
            if self.status == 431:
                self.problem = f"The request's head is longer than {HEAD_BYTES:,} bytes or {MOST_HEADERS} headers."
            elif self._first == TLS_HANDSHAKE:
                self.problem = "This port speaks plain HTTP and not TLS: use http://, or a proxy for TLS in front."
            elif isinstance(error, _RefusedError) or self.status == 501:
                self.problem = f"{error}."
            raise
        return event

    def _skip_empty_lines(self) -> None:
        """Empty lines before a request line are skipped, as RFC 9112 (2.2) asks; h11 refuses them."""
        if self.their_state is h11.IDLE:
            held, _ = self.trailing_data
            if empty := len(held) - len(held.lstrip(b"\r\n")):
                self._receive_buffer.maybe_extract_at_most(empty)


class _RefusedError(h11.RemoteProtocolError):
    """A head that h11 takes and this server does not."""


def _check(request: h11.Request) -> None:
    names = [name for name, _ in request.headers]
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if len(names) > MOST_HEADERS or size > HEAD_BYTES:
        raise _RefusedError("too long", error_status_hint=431)
    if request.http_version not in (b"1.0", b"1.1"):
        raise _RefusedError("This server speaks HTTP/1.1", error_status_hint=505)
    if b"transfer-encoding" in names and b"content-length" in names:
        raise _RefusedError("Content-Length and Transfer-Encoding contradict each other: send one of them")
    if b"transfer-encoding" in names and request.http_version == b"1.0":
        raise _RefusedError("HTTP/1.0 has no Transfer-Encoding")
