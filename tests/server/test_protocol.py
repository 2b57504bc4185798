"""Connection limits and timeouts over real sockets."""

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
from tests.server.clients import PATIENCE, run_scenario, until
from uvicorn.server import ServerState

from octavo.server import protocol
from octavo.server.protocol import HEAD_SECONDS, LINGER_SECONDS, UNREAD_SECONDS, Connection

Loop = Callable[[], asyncio.AbstractEventLoop]
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Any:
    """Makes an event loop. uvicorn uses uvloop if it is installed, so both are tested."""
    return request.param


class Clock:
    """A manual clock for the connection timers: it does not advance by itself, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[HandTimer] = []

    def is_running(self, seconds: float) -> bool:
        """Whether a timer of `seconds` is running."""
        return any(timer.due is not None and timer.seconds == seconds for timer in self.timers)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for timer in self.timers[:]:
            if timer.due is not None and timer.due <= self.now:
                timer.due = None
                timer.call()


class HandTimer:
    """Replacement of protocol._Timer that uses a Clock."""

    def __init__(self, clock: Clock, _: object, seconds: float, call: Callable[[], None]) -> None:
        self.clock, self.seconds, self.call = clock, seconds, call
        self.due: float | None = None
        clock.timers.append(self)

    def start(self) -> None:
        if self.due is None:
            self.due = self.clock.now + self.seconds

    def stop(self) -> None:
        self.due = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    manual_clock = Clock()
    monkeypatch.setattr(protocol, "_Timer", partial(HandTimer, manual_clock))
    return manual_clock


class App:
    """Reads the body, responds with `body`, and counts requests and disconnects."""

    def __init__(self, body: bytes = b"hello", *, chunks: int = 1) -> None:
        self.body, self.chunks = body, chunks
        self.started, self.disconnected, self.bodies = 0, 0, list[bytes]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.started += 1
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        length = str(len(self.body) * self.chunks).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for left in reversed(range(self.chunks)):
            await send({"type": "http.response.body", "body": self.body, "more_body": left > 0})
        self.disconnected += (await receive())["type"] == "http.disconnect"


@dataclass
class ConnectionServer:
    """A server that uses Connection: its port, uvicorn's state, and the writers of the clients."""

    port: int
    state: ServerState
    received: list[int]
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # A small limit: a client that stops reading has buffered little.
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
        self.writers.append(writer)
        return reader, writer

    async def wait_for_bytes(self, count: int) -> None:
        """Waits until `count` bytes have arrived over all connections."""
        await until(lambda: sum(self.received) >= count)


@asynccontextmanager
async def serve(app: Any, *, max_connections: int = 8) -> AsyncIterator[ConnectionServer]:
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", timeout_keep_alive=9)
    config.load()
    state, received = ServerState(), list[int]()

    class Counted(Connection):
        def data_received(self, data: bytes) -> None:
            received.append(len(data))
            super().data_received(data)

    protocol = partial(Counted, config=config, server_state=state, app_state={}, max_connections=max_connections)
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    connection_server = ConnectionServer(server.sockets[0].getsockname()[1], state, received)
    try:
        yield connection_server
    finally:
        server.close()
        for writer in connection_server.writers:
            writer.transport.abort()
        await until(lambda: not state.connections and not state.tasks)


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """The remaining data until the server closes the connection."""
    return await asyncio.wait_for(reader.read(), PATIENCE)


@pytest.mark.parametrize("started", [b"", b"G", b"GET / HTTP/1.1\r\nHost: local", REQUEST + b"GET /"])
def test_head_timeout(loop: Loop, started: bytes, clock: Clock) -> None:
    async def scenario() -> None:
        async with serve(App()) as connection_server:
            reader, writer = await connection_server.connect()
            if started.startswith(REQUEST):  # a second request on the same connection
                writer.write(REQUEST)
                await reader.readuntil(b"hello")
            writer.write(started.removeprefix(REQUEST))
            await connection_server.wait_for_bytes(len(started))
            clock.advance(HEAD_SECONDS)
            assert await read_until_closed(reader) == b""
            clock.advance(LINGER_SECONDS)
            await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)


def test_head_timeout_of_a_slow_sender(loop: Loop, clock: Clock) -> None:
    async def scenario() -> None:
        app = App()
        async with serve(app) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(started := b"GET / HTTP/1.1\r\nHost: ")
            await connection_server.wait_for_bytes(len(started))
            for number in range(8):  # eighths are exact in floating point
                assert not reader.at_eof()
                writer.write(b"x")
                await connection_server.wait_for_bytes(len(started) + number + 1)
                clock.advance(HEAD_SECONDS / 8)
            assert await read_until_closed(reader) == b""
            clock.advance(LINGER_SECONDS)
            await until(lambda: not connection_server.state.connections)
            assert app.started == 0

    run_scenario(scenario(), loop)


def test_the_head_timeout_does_not_apply_to_the_body(loop: Loop, clock: Clock) -> None:
    async def scenario() -> None:
        app = App()
        async with serve(app) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\n")
            await until(lambda: app.started == 1)
            clock.advance(2 * HEAD_SECONDS)
            writer.write(b"prompt")
            assert (await asyncio.wait_for(reader.readuntil(b"hello"), PATIENCE)).startswith(b"HTTP/1.1 200")
            assert app.bodies == [b"prompt"]

    run_scenario(scenario(), loop)


def test_connections_beyond_the_limit_get_503(loop: Loop) -> None:
    async def scenario() -> None:
        async with serve(App(), max_connections=2) as connection_server:
            connections = [await connection_server.connect() for _ in range(2)]
            await until(lambda: len(connection_server.state.connections) == 2)
            reader, writer = await connection_server.connect()
            head, _, body = (await read_until_closed(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 2" in head.lower()
            assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}
            assert f"content-length: {len(body)}".encode() in head.lower()
            connections[0][1].close()
            await until(lambda: len(connection_server.state.connections) == 1)
            reader, writer = await connection_server.connect()
            writer.write(REQUEST)
            assert b"200 OK" in await reader.readuntil(b"hello")

    run_scenario(scenario(), loop)


def test_a_client_that_does_not_read_is_disconnected(loop: Loop, clock: Clock) -> None:
    """Otherwise the client could hold the response and its request slot without limit."""

    async def scenario() -> None:
        app = App(b"x" * 2**20, chunks=64)
        async with serve(app) as connection_server:
            _, writer = await connection_server.connect()
            writer.write(REQUEST)
            await until(lambda: clock.is_running(UNREAD_SECONDS))

            def is_cut_off() -> bool:
                clock.advance(UNREAD_SECONDS)  # at first the system may still buffer data
                return app.disconnected == 1

            await until(is_cut_off)
            await until(lambda: not connection_server.state.tasks and not connection_server.state.connections)

    run_scenario(scenario(), loop)


def test_a_slow_reader_gets_the_whole_response(loop: Loop) -> None:
    async def scenario() -> None:
        app = App(b"x" * 2**20, chunks=8)
        async with serve(app) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(REQUEST)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            assert await asyncio.wait_for(reader.readexactly(2**23), PATIENCE) == b"x" * 2**23

    run_scenario(scenario(), loop)


HOST = b"Host: localhost\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
BOTH = POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
REJECTED = {
    "garbage": (400, b"GARBAGE\r\n\r\n"),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00"),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/9.9": (505, b"GET / HTTP/9.9\r\n" + HOST + b"\r\n"),
    "HTTP/0.9": (400, b"GET /\r\n\r\n"),
    "no host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n"),
    "both lengths": (400, BOTH + b"0\r\n\r\n"),
    "both lengths, in the other order": (
        400,
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    ),
    "chunks in HTTP/1.0": (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    "a length that is none": (400, POST + b"Content-Length: +5\r\n\r\nhello"),
    "a negative length": (400, POST + b"Content-Length: -5\r\n\r\nhello"),
    "an endless length": (400, POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nhello"),
    "another encoding": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n"),
    "a space before the colon": (400, b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n"),
    "a null": (400, b"GET / HTTP/1.1\r\nHost: localhost\r\nA: b\0c\r\n\r\n"),
    "a head that does not end": (431, b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000),
    "a long complete head": (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"a" * 100_000 + b"\r\n\r\n"),
    "a long target": (431, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "many headers": (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 101 + b"\r\n"),
    "very many headers": (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 20_000 + b"\r\n"),
    "a chunk of no size": (400, CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n"),
    "a chunk of a negative size": (400, CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"),
    "a chunk that is longer than it says": (400, CHUNKED + b"2\r\nhello\r\n0\r\n\r\n"),
    "a chunk's size without end": (431, CHUNKED + b"1;" + b"a" * 100_000),
    "trailers without end": (431, CHUNKED + b"0\r\n" + b"A: b\r\n" * 20_000),
}


@pytest.mark.parametrize("name", REJECTED)
def test_invalid_http_is_rejected_in_openais_format(loop: Loop, name: str) -> None:
    status, garbage = REJECTED[name]

    async def scenario() -> None:
        async with serve(App()) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(garbage + REQUEST)
            head, _, body = (await read_until_closed(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status), head
            assert json.loads(body)["error"]["code"] == "invalid_http", "there is exactly one response"

    run_scenario(scenario(), loop)


ACCEPTED = {
    "empty lines before it": b"\r\n\r\n" + REQUEST,
    "an empty line after a body": POST + b"Content-Length: 5\r\n\r\nhello\r\n" + REQUEST,
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "100 headers": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 99 + b"\r\n",
    "a folded header": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n",
    "an offer of HTTP/2": b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "an offer of a websocket": b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "chunks": CHUNKED + b"5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_valid_http_is_answered(loop: Loop, name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        app = App()
        async with serve(app) as connection_server:
            _, writer = await connection_server.connect()
            writer.write(ACCEPTED[name])
            await until(lambda: app.started == ACCEPTED[name].count(b"HTTP/1"))
            assert not caplog.records

    run_scenario(scenario(), loop)

    run_scenario(scenario(), loop)


def test_garbage_during_a_response_closes_the_connection_only(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    async def early(scope: Any, receive: Any, send: Any) -> None:
        """Starts the response before the body has arrived."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async def scenario() -> None:
        async with serve(early) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"hello"), PATIENCE)
            writer.write(b"GARBAGE\r\n\r\n")
            assert b"HTTP" not in await read_until_closed(reader), "there is no second response in the first"
            await until(lambda: not connection_server.state.tasks)

    run_scenario(scenario(), loop)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


class RejectingApp:
    """Responds without reading the body, as the guard does when it rejects a request."""

    def __init__(self, *, stop_ids: bool = True) -> None:
        self.started, self.stop_ids = 0, stop_ids

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.started += 1
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"never"})


BODIES = {
    "a long one": b"Content-Length: 1000000\r\n\r\n",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    "one that expects 100 Continue": b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n",
}


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
@pytest.mark.parametrize("name", BODIES)
def test_an_early_response_closes_the_connection_of_a_slow_body(
    loop: Loop, name: str, method: bytes, clock: Clock
) -> None:
    async def scenario() -> None:
        app = RejectingApp()
        async with serve(app) as connection_server:
            reader, writer = await connection_server.connect()
            read_task = asyncio.create_task(reader.read())
            writer.write(method + b" / HTTP/1.1\r\n" + HOST + BODIES[name])
            response = await asyncio.wait_for(read_task, PATIENCE)
            assert app.started == 1
            for _ in range(8):  # eighths are exact in floating point
                assert connection_server.state.connections
                wait_for_bytes = sum(connection_server.received)
                writer.write(b"x")
                await connection_server.wait_for_bytes(wait_for_bytes + 1)
                clock.advance(LINGER_SECONDS / 8)
            await until(lambda: not connection_server.state.connections)
            assert response.startswith(b"HTTP/1.1 403 ")
            assert b"connection: close" in response.lower()

    run_scenario(scenario(), loop)


def test_a_client_whose_body_is_rejected_receives_the_response(loop: Loop) -> None:
    """Closing a connection with unread input resets it, and the client may lose the response."""

    async def scenario() -> None:
        async with serve(RejectingApp()) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(POST + b"Content-Length: 8000000\r\n\r\n" + b"x" * 4_000_000)
            await writer.drain()
            assert (await read_until_closed(reader)).endswith(b"never")
            writer.close()
            await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)


def test_the_connection_stays_open_if_the_rejected_body_arrived(loop: Loop) -> None:
    async def scenario() -> None:
        async with serve(RejectingApp()) as connection_server:
            reader, writer = await connection_server.connect()
            for _ in range(2):
                writer.write(POST + b"Content-Length: 5\r\n\r\nhello")
                response = await asyncio.wait_for(reader.readuntil(b"never"), PATIENCE)
                assert b"connection: close" not in response.lower()

    run_scenario(scenario(), loop)


def test_a_closing_connection_is_evicted_for_a_new_one(loop: Loop) -> None:
    async def scenario() -> None:
        async with serve(RejectingApp(), max_connections=2) as connection_server:
            connections = [await connection_server.connect() for _ in range(2)]
            for reader, writer in connections:
                writer.write(POST + b"Content-Length: 1000\r\n\r\n")
                await asyncio.wait_for(reader.readuntil(b"never"), PATIENCE)
            reader, writer = await connection_server.connect()
            writer.write(REQUEST)
            assert (await asyncio.wait_for(reader.readuntil(b"never"), PATIENCE)).startswith(b"HTTP/1.1 403 ")

    run_scenario(scenario(), loop)


def test_a_half_closed_client_is_answered(loop: Loop) -> None:
    async def scenario() -> None:
        for requests in (REQUEST, REQUEST * 50, POST + b"Content-Length: 5\r\n\r\nhello"):
            async with serve(App()) as connection_server:
                reader, writer = await connection_server.connect()
                writer.write(requests)
                writer.write_eof()
                assert (await read_until_closed(reader)).count(b"hello") == requests.count(b"HTTP/1.1")
                await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)


@pytest.mark.parametrize("started", [b"", b"GET / HT", POST + b"Content-Length: 5\r\n\r\nhe", REQUEST + b"GET /"])
def test_a_half_close_during_a_request_ends_the_connection(loop: Loop, started: bytes) -> None:
    async def scenario() -> None:
        async with serve(App()) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(started)
            writer.write_eof()
            assert (await read_until_closed(reader)).count(b"hello") == started.count(REQUEST)
            await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)


class WaitingApp:
    """Responds when `response` is set, and records whether the client disconnects before."""

    def __init__(self) -> None:
        self.started, self.disconnected, self.answer = False, False, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.started = True
        answer_task = asyncio.create_task(self.answer.wait())
        while not self.answer.is_set() and not self.disconnected:
            receive_task = asyncio.create_task(receive())
            await asyncio.wait([receive_task, answer_task], return_when=asyncio.FIRST_COMPLETED)
            self.disconnected = receive_task.done() and receive_task.result()["type"] == "http.disconnect"
            receive_task.cancel()
        answer_task.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


def test_a_half_closed_client_is_answered_after_a_long_wait(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PROBE_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "RESET_SECONDS", 0.01)

    async def scenario() -> None:
        app = WaitingApp()
        async with serve(app) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(REQUEST)
            writer.write_eof()
            for _ in range(2):  # interim responses, which HTTP/1.1 clients skip
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)).startswith(b"HTTP/1.1 100 ")
            assert not app.disconnected
            app.answer.set()
            assert (await read_until_closed(reader)).endswith(b"hello")

    run_scenario(scenario(), loop)


def test_a_closed_client_is_detected(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PROBE_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "RESET_SECONDS", 0.02)

    async def scenario() -> None:
        app = WaitingApp()
        async with serve(app) as connection_server:
            _, writer = await connection_server.connect()
            writer.write(REQUEST)
            await until(lambda: app.started)
            writer.close()
            await until(lambda: app.disconnected)
            await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)


def test_unread_timeout_while_closing(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response is small enough not to pause the app, and larger than the system's buffers."""
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.05)

    async def scenario() -> None:
        app = App(b"x" * 2**23)
        async with serve(app) as connection_server:
            _, writer = await connection_server.connect()
            writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
            await until(lambda: app.started == 1)
            await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)


def test_a_slow_reader_is_disconnected_only_when_it_stops(loop: Loop) -> None:
    async def scenario() -> None:
        async with serve(App(b"x" * 2**25)) as connection_server:
            reader, writer = await connection_server.connect()
            writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            connection: Any = next(iter(connection_server.state.connections))
            for _ in range(3):
                left = connection.transport.get_write_buffer_size()
                while left - connection.transport.get_write_buffer_size() < protocol.UNREAD_BYTES:
                    await asyncio.wait_for(reader.readexactly(2**16), PATIENCE)
                connection._check_unread()
                assert connection_server.state.connections
            for _ in range(2):
                connection._check_unread()
            await until(lambda: not connection_server.state.connections)

    run_scenario(scenario(), loop)
