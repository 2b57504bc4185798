"""Connections over real sockets: how many there may be, and for how long they may dawdle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import uvicorn
import uvloop
from tests.server.clients import PATIENCE, play, until
from uvicorn.server import ServerState

from octavo.server import connections
from octavo.server.connections import Connection

Loop = Callable[[], asyncio.AbstractEventLoop]
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Any:
    """Makes an event loop: uvicorn takes uvloop's where it is installed."""
    return request.param


class App:
    """Answers with what it is told to, and notes who came and who went away."""

    def __init__(self, body: bytes = b"hello", *, pieces: int = 1) -> None:
        self.body, self.pieces = body, pieces
        self.begun, self.gone, self.bodies = 0, 0, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        length = str(len(self.body) * self.pieces).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for left in reversed(range(self.pieces)):
            await send({"type": "http.response.body", "body": self.body, "more_body": left > 0})
        self.gone += (await receive())["type"] == "http.disconnect"


@dataclass
class Site:
    """A server of our connections: uvicorn's state of it, and the clients' ends."""

    port: int
    state: ServerState
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # A client that stops reading has taken little by then.
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
        self.writers.append(writer)
        return reader, writer


@asynccontextmanager
async def serving(app: Any, *, most: int = 8) -> AsyncIterator[Site]:
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", timeout_keep_alive=9)
    config.load()
    state = ServerState()
    protocol = partial(Connection, config=config, server_state=state, app_state={}, most=most)
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    site = Site(server.sockets[0].getsockname()[1], state)
    try:
        yield site
    finally:
        server.close()
        for writer in site.writers:
            writer.transport.abort()
        await until(lambda: not state.connections and not state.tasks)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What is still sent until the server closes the connection."""
    return await asyncio.wait_for(reader.read(), PATIENCE)


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: local", REQUEST + b"GET /"])
def test_a_head_that_does_not_come_is_not_waited_for(loop: Loop, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)

    async def scene() -> None:
        async with serving(App()) as site:
            reader, writer = await site.connect()
            if begun.startswith(REQUEST):  # a second request on a connection that was used
                writer.write(REQUEST)
                await reader.readuntil(b"hello")
            writer.write(begun.removeprefix(REQUEST))
            assert await ended(reader) == b""
            await until(lambda: not site.state.connections)

    play(scene(), loop)


def test_a_head_that_comes_byte_by_byte_has_no_longer(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)

    async def scene() -> None:
        app = App()
        async with serving(app) as site:
            reader, writer = await site.connect()
            whole = asyncio.create_task(ended(reader))
            writer.write(b"GET / HTTP/1.1\r\nHost: ")
            while not whole.done():
                writer.write(b"x")
                await asyncio.wait([whole], timeout=0.01)
            assert (app.begun, whole.exception() or whole.result()) == (0, b"")

    play(scene(), loop)


def test_a_head_that_came_in_time_leaves_the_body_its_own(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.02)

    async def scene() -> None:
        app = App()
        async with serving(app) as site:
            reader, writer = await site.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\n")
            await until(lambda: app.begun == 1)
            late = asyncio.get_running_loop().call_later(0.06, writer.write, b"prompt")
            assert (await asyncio.wait_for(reader.readuntil(b"hello"), PATIENCE)).startswith(b"HTTP/1.1 200")
            assert app.bodies == [b"prompt"]
            late.cancel()

    play(scene(), loop)


def test_connections_beyond_the_limit_are_told_to_come_again(loop: Loop) -> None:
    async def scene() -> None:
        async with serving(App(), most=2) as site:
            held = [await site.connect() for _ in range(2)]
            await until(lambda: len(site.state.connections) == 2)
            reader, writer = await site.connect()
            head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 2" in head.lower()
            assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
            assert f"content-length: {len(body)}".encode() in head.lower()
            held[0][1].close()
            await until(lambda: len(site.state.connections) == 1)
            reader, writer = await site.connect()
            writer.write(REQUEST)
            assert b"200 OK" in await reader.readuntil(b"hello")

    play(scene(), loop)


def test_a_client_that_reads_nothing_is_cut_off(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its answer, and its place among the requests, would be held for as long as it likes."""
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.05)

    async def scene() -> None:
        app = App(b"x" * 2**20, pieces=64)
        async with serving(app) as site:
            _, writer = await site.connect()
            writer.write(REQUEST)
            await until(lambda: app.gone == 1)
            await until(lambda: not site.state.tasks and not site.state.connections)

    play(scene(), loop)


def test_a_client_that_reads_slowly_but_reads_gets_it_all(loop: Loop) -> None:
    async def scene() -> None:
        app = App(b"x" * 2**20, pieces=8)
        async with serving(app) as site:
            reader, writer = await site.connect()
            writer.write(REQUEST)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            assert await asyncio.wait_for(reader.readexactly(2**23), PATIENCE) == b"x" * 2**23

    play(scene(), loop)


def test_what_is_no_http_is_refused_in_the_shape_of_all_errors(loop: Loop) -> None:
    async def scene() -> None:
        async with serving(App()) as site:
            for garbage in (b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000):
                reader, writer = await site.connect()
                writer.write(garbage)
                head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 400 ")
                assert json.loads(body)["error"]["code"] == "invalid_http"

    play(scene(), loop)


def test_garbage_amid_an_answer_ends_the_connection_and_nothing_else(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        """Begins to answer before the body is there."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def scene() -> None:
        async with serving(early) as site:
            reader, writer = await site.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"hello"), PATIENCE)
            writer.write(b"GARBAGE\r\n\r\n")
            assert b"HTTP" not in await ended(reader), "no second answer within the first"
            await until(lambda: not site.state.tasks)

    play(scene(), loop)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
