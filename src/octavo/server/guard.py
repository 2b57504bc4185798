"""ASGI middleware before every route: checks Host, Origin, API key, number of requests and body size, in this order.

It is pure ASGI, so a rejected request is neither read nor routed.

- Host must be in an allow-list. This prevents DNS rebinding: a rebinding page sends its own name in the Host header.
- Origin is checked for requests that change state. This prevents requests from web pages of other sites.
- API key, number of concurrent requests, size of the body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.addresses import host_name, is_address
from octavo.server.errors import ApiError, overloaded
from octavo.server.metrics import Metrics

OPEN_PATHS = ("/health", "/ready", "/ping")  # probes of orchestrators and load balancers: no API key needed
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
BODY_SECONDS = 30.0  # enough for a few megabytes on a slow line


@dataclass(frozen=True)
class Rules:
    """Settings of the guard. `hosts` and `origins` are lowercase; "*" in them allows all."""

    key: str | None
    hosts: frozenset[str]
    origins: frozenset[str]
    requests: int  # limit of concurrent requests
    body_bytes: int
    any_address: bool = False  # accept every IP address in the Host header


class Guard:
    """Middleware that enforces `rules` and counts responses in `metrics`."""

    def __init__(self, app: ASGIApp, *, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500
        is_head = scope["method"] == "HEAD"  # handled as GET; the body is dropped
        get_scope = {**scope, "method": "GET"} if is_head else scope

        async def send_and_record(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        changes_state = scope["method"] not in SAFE_METHODS
        self._requests += changes_state
        try:
            self._check(scope, changes_state=changes_state)
            body = await self._body(scope, receive) if changes_state else b""
            await self.app(get_scope, _replay(body, receive), send_and_record)
        except ApiError as error:
            await error.response()(scope, receive, send_and_record)
        finally:
            self._requests -= changes_state
            # The label is the route, not the request's path: clients could send unlimited different paths.
            route = getattr(get_scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in (*SAFE_METHODS, "POST") else "other"
            self.metrics.responses[route, method, status] += 1

    def _check(self, scope: Scope, *, changes_state: bool) -> None:
        host = self._host(scope)
        if changes_state:
            self._check_origin(_header_values(scope, b"origin"), host)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(scope)
        if changes_state and self._requests > self.rules.requests:
            raise overloaded(f"The server is already handling {self.rules.requests} requests.")

    def _host(self, scope: Scope) -> str:
        values = _header_values(scope, b"host")
        header = values[0] if len(values) == 1 else ""
        name = host_name(header)
        if not ({name, "*"} & self.rules.hosts or (self.rules.any_address and is_address(name))):
            raise ApiError(403, f"The Host {name!r} is not allowed. Allow it with --hosts.", code="host_not_allowed")
        return header.lower()

    def _check_origin(self, values: list[str], host: str) -> None:
        """403 for a page of another origin. Requests without an Origin header do not come from a browser page."""
        for origin in (origin.lower() for origin in values):
            same_origin = origin.partition("://")[2] == host and origin.startswith(("http://", "https://"))
            if not same_origin and not {origin, "*"} & self.rules.origins:
                raise ApiError(
                    403, f"Requests from pages of {origin!r} are not allowed. Allow the origin with --origins.",
                    code="origin_not_allowed",
                )  # fmt: skip

    def _check_key(self, scope: Scope) -> None:
        if self.rules.key is None:
            return
        values = _header_values(scope, b"authorization")
        scheme, _, key = (values[0] if len(values) == 1 else "").partition(" ")
        matches = compare_digest(key.strip().encode(), self.rules.key.encode())  # constant time
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. 413 as soon as Content-Length or the bytes received exceed the limit. 408 if it is slow."""
        limit = self.rules.body_bytes
        content_length = _header_values(scope, b"content-length")
        if content_length and content_length[0].isdecimal() and int(content_length[0][:20]) > limit:
            raise _body_too_large(limit)
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The client disconnected before it sent the whole request.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limit:
                        raise _body_too_large(limit)
        except TimeoutError:
            raise ApiError(408, "The body took too long to arrive.", headers={"Connection": "close"}) from None
        return bytes(body)


def _body_too_large(limit: int) -> ApiError:
    # The rest of the body is not read, so the connection cannot be reused.
    message = f"The body is longer than this server's limit of {limit:,} bytes."
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first returns the body already read, then the messages after it."""
    returned = False

    async def replay() -> Message:
        nonlocal returned
        if returned:
            return await receive()
        returned = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _header_values(scope: Scope, name: bytes) -> list[str]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value.decode("latin-1") for key, value in headers if key == name]
