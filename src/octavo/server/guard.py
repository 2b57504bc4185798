"""What stands before every route: who may ask, from where, how much, and how many at once.

Pure ASGI, so that a refused request costs neither its body nor a route. In order: the Host header against an
allow-list (a web page that rebinds its name to this machine comes with that name), the Origin of what changes state
(a web page of somebody else's), the key, the number of requests, the size of the body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.addresses import host_name, is_address
from octavo.server.errors import ApiError, busy
from octavo.server.metrics import Metrics

OPEN_PATHS = ("/health", "/ready", "/ping")  # for whoever looks after the process and holds no key
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
BODY_SECONDS = 30.0  # a body of a few megabytes takes less on any line that an answer is worth sending over


@dataclass(frozen=True)
class Rules:
    """What a guard holds to. `hosts` and `origins` are in lower case; "*" among them allows all."""

    key: str | None
    hosts: frozenset[str]
    origins: frozenset[str]
    requests: int  # that may be read or answered at once
    body_bytes: int
    any_address: bool = False  # a Host that is an address and no name is right, whichever it is


class Guard:
    """The app behind the rules."""

    def __init__(self, app: ASGIApp, *, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500
        looks = scope["method"] == "HEAD"  # answered as GET is, without the body
        inner = {**scope, "method": "GET"} if looks else scope

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif looks:
                message = {**message, "body": b""}
            await send(message)

        changes = scope["method"] not in SAFE_METHODS
        self._requests += changes
        try:
            self._check(scope, changes=changes)
            body = await self._body(scope, receive) if changes else b""
            await self.app(inner, _replayed(body, receive), counted)
        except ApiError as error:
            await error.response()(scope, receive, counted)
        finally:
            self._requests -= changes
            route = getattr(inner.get("route"), "path", "none")  # not the path: that would be a label without bounds
            method = scope["method"] if scope["method"] in (*SAFE_METHODS, "POST") else "other"
            self.metrics.answers[route, method, status] += 1

    def _check(self, scope: Scope, *, changes: bool) -> None:
        host = self._host(scope)
        if changes:
            self._check_origin(_values(scope, b"origin"), host)
        if scope["path"] not in OPEN_PATHS:
            self._check_key(scope)
        if changes and self._requests > self.rules.requests:
            raise busy(f"{self.rules.requests} requests are being answered already.")

    def _host(self, scope: Scope) -> str:
        given = _values(scope, b"host")
        header = given[0] if len(given) == 1 else ""
        name = host_name(header)
        if not ({name, "*"} & self.rules.hosts or (self.rules.any_address and is_address(name))):
            raise ApiError(
                403, f"This server does not go by the name {name!r}; --hosts names others.", code="host_not_allowed"
            )
        return header.lower()

    def _check_origin(self, given: list[str], host: str) -> None:
        """A request without the header comes from no browser's page."""
        for origin in (origin.lower() for origin in given):
            own = origin.partition("://")[2] == host and origin.startswith(("http://", "https://"))
            if not own and not {origin, "*"} & self.rules.origins:
                raise ApiError(
                    403, f"Pages of {origin!r} may not use this server; --origins names those that may.",
                    code="origin_not_allowed",
                )  # fmt: skip

    def _check_key(self, scope: Scope) -> None:
        if self.rules.key is None:
            return
        given = _values(scope, b"authorization")
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        fits = compare_digest(key.strip().encode(), self.rules.key.encode())  # as long for a near miss as for a far one
        if scheme.lower() != "bearer" or not fits:
            raise ApiError(
                401,
                "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. 413 as soon as it is known to be too long, whatever its length was said to be."""
        most = self.rules.body_bytes
        said = _values(scope, b"content-length")
        if said and said[0].isdecimal() and int(said[0][:20]) > most:
            raise _too_long(most)
        body = bytearray()
        more = True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "The request broke off.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise _too_long(most)
        except TimeoutError:
            raise ApiError(408, "The body took too long to arrive.", headers={"Connection": "close"}) from None
        return bytes(body)


def _too_long(most: int) -> ApiError:
    # The rest is not read: the connection can serve nothing after this.
    message = f"The body is longer than this server's limit of {most:,} bytes."
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _values(scope: Scope, name: bytes) -> list[str]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value.decode("latin-1") for key, value in headers if key == name]
