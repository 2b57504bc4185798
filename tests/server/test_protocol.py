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

from octavo.server import protocol
from octavo.server.protocol import HEAD_SECONDS, LINGER_SECONDS, UNREAD_SECONDS, Connection

Loop = Callable[[], asyncio.AbstractEventLoop]
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Any:
    """Makes an event loop: uvicorn takes uvloop's where it is installed."""
    return request.param


class Clock:
    """What the bounds of connections go by: it stands still until a scene lets time pass, however busy the machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[HandTimer] = []

    def runs(self, seconds: float) -> bool:
        """Whether a bound of so many seconds is waited for."""
        return any(timer.due is not None and timer.seconds == seconds for timer in self.timers)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        for timer in self.timers[:]:
            if timer.due is not None and timer.due <= self.now:
                timer.due = None
                timer.call()


class HandTimer:
    """connections._Timer by a Clock."""

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
    found = Clock()
    monkeypatch.setattr(protocol, "_Timer", partial(HandTimer, found))
    return found


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
    received: list[int]
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # A client that stops reading has taken little by then.
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
        self.writers.append(writer)
        return reader, writer

    async def arrived(self, count: int) -> None:
        """Waits until so many bytes have arrived, of all connections."""
        await until(lambda: sum(self.received) >= count)


@asynccontextmanager
async def serving(app: Any, *, most: int = 8) -> AsyncIterator[Site]:
    config = uvicorn.Config(app, log_config=None, ws="none", lifespan="off", timeout_keep_alive=9)
    config.load()
    state, received = ServerState(), list[int]()

    class Counted(Connection):
        def data_received(self, data: bytes) -> None:
            received.append(len(data))
            super().data_received(data)

    protocol = partial(Counted, config=config, server_state=state, app_state={}, most=most)
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    site = Site(server.sockets[0].getsockname()[1], state, received)
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
def test_a_head_that_does_not_come_is_not_waited_for(loop: Loop, begun: bytes, clock: Clock) -> None:
    async def scene() -> None:
        async with serving(App()) as site:
            reader, writer = await site.connect()
            if begun.startswith(REQUEST):  # a second request on a connection that was used
                writer.write(REQUEST)
                await reader.readuntil(b"hello")
            writer.write(begun.removeprefix(REQUEST))
            await site.arrived(len(begun))
            clock.passes(HEAD_SECONDS)
            assert await ended(reader) == b""
            clock.passes(LINGER_SECONDS)
            await until(lambda: not site.state.connections)

    play(scene(), loop)


def test_a_head_that_comes_byte_by_byte_has_no_longer(loop: Loop, clock: Clock) -> None:
    async def scene() -> None:
        app = App()
        async with serving(app) as site:
            reader, writer = await site.connect()
            writer.write(begun := b"GET / HTTP/1.1\r\nHost: ")
            await site.arrived(len(begun))
            for number in range(8):  # an eighth of a number is exact
                assert not reader.at_eof()
                writer.write(b"x")
                await site.arrived(len(begun) + number + 1)
                clock.passes(HEAD_SECONDS / 8)
            assert await ended(reader) == b""
            clock.passes(LINGER_SECONDS)
            await until(lambda: not site.state.connections)
            assert app.begun == 0

    play(scene(), loop)


def test_a_head_that_came_in_time_leaves_the_body_its_own(loop: Loop, clock: Clock) -> None:
    async def scene() -> None:
        app = App()
        async with serving(app) as site:
            reader, writer = await site.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6\r\n\r\n")
            await until(lambda: app.begun == 1)
            clock.passes(2 * HEAD_SECONDS)
            writer.write(b"prompt")
            assert (await asyncio.wait_for(reader.readuntil(b"hello"), PATIENCE)).startswith(b"HTTP/1.1 200")
            assert app.bodies == [b"prompt"]

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


def test_a_client_that_reads_nothing_is_cut_off(loop: Loop, clock: Clock) -> None:
    """Else its answer, and its place among the requests, would be held for as long as it likes."""

    async def scene() -> None:
        app = App(b"x" * 2**20, pieces=64)
        async with serving(app) as site:
            _, writer = await site.connect()
            writer.write(REQUEST)
            await until(lambda: clock.runs(UNREAD_SECONDS))

            def is_cut_off() -> bool:
                clock.passes(UNREAD_SECONDS)  # in the first of which the system may still take some
                return app.gone == 1

            await until(is_cut_off)
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


HOST = b"Host: localhost\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
BOTH = POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = {
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
    "a long head that is whole": (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"a" * 100_000 + b"\r\n\r\n"),
    "a long target": (431, b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "many headers": (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 101 + b"\r\n"),
    "very many headers": (431, b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 20_000 + b"\r\n"),
    "a chunk of no size": (400, CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n"),
    "a chunk of a negative size": (400, CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"),
    "a chunk that is longer than it says": (400, CHUNKED + b"2\r\nhello\r\n0\r\n\r\n"),
    "a chunk's size without end": (431, CHUNKED + b"1;" + b"a" * 100_000),
    "trailers without end": (431, CHUNKED + b"0\r\n" + b"A: b\r\n" * 20_000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_http_is_refused_in_the_shape_of_all_errors_and_ends_there(loop: Loop, name: str) -> None:
    status, garbage = REFUSED[name]

    async def scene() -> None:
        async with serving(App()) as site:
            reader, writer = await site.connect()
            writer.write(garbage + REQUEST)
            head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status), head
            assert json.loads(body)["error"]["code"] == "invalid_http", "one answer and no more"

    play(scene(), loop)


TAKEN = {
    "empty lines before it": b"\r\n\r\n" + REQUEST,
    "an empty line after a body": POST + b"Content-Length: 5\r\n\r\nhello\r\n" + REQUEST,
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "100 headers": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 99 + b"\r\n",
    "a folded header": b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n c\r\n\r\n",
    "an offer of HTTP/2": b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "an offer of a websocket": b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "chunks": CHUNKED + b"5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n",
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_http_is_answered(loop: Loop, name: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        app = App()
        async with serving(app) as site:
            _, writer = await site.connect()
            writer.write(TAKEN[name])
            await until(lambda: app.begun == TAKEN[name].count(b"HTTP/1"))
            assert not caplog.records

    play(scene(), loop)

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


class Refuses:
    """Answers before it has read the body, as the guard does where it refuses; and notes who went away."""

    def __init__(self, *, stop_ids: bool = True) -> None:
        self.begun, self.stop_ids = 0, stop_ids

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"never"})


BODIES = {
    "a long one": b"Content-Length: 1000000\r\n\r\n",
    "chunks": b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
    "one that waits to be asked for": b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n",
}


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST"])
@pytest.mark.parametrize("name", BODIES)
def test_an_answer_ends_the_connection_of_a_body_that_drips_on(
    loop: Loop, name: str, method: bytes, clock: Clock
) -> None:
    async def scene() -> None:
        app = Refuses()
        async with serving(app) as site:
            reader, writer = await site.connect()
            whole = asyncio.create_task(reader.read())
            writer.write(method + b" / HTTP/1.1\r\n" + HOST + BODIES[name])
            said = await asyncio.wait_for(whole, PATIENCE)
            assert app.begun == 1
            for _ in range(8):  # an eighth of a number is exact
                assert site.state.connections
                arrived = sum(site.received)
                writer.write(b"x")
                await site.arrived(arrived + 1)
                clock.passes(LINGER_SECONDS / 8)
            await until(lambda: not site.state.connections)
            assert said.startswith(b"HTTP/1.1 403 ")
            assert b"connection: close" in said.lower()

    play(scene(), loop)


def test_who_sends_a_body_that_is_refused_reads_why_before_the_end(loop: Loop) -> None:
    """A connection that is closed over unread bytes is reset, and the answer may be lost with it."""

    async def scene() -> None:
        async with serving(Refuses()) as site:
            reader, writer = await site.connect()
            writer.write(POST + b"Content-Length: 8000000\r\n\r\n" + b"x" * 4_000_000)
            await writer.drain()
            assert (await ended(reader)).endswith(b"never")
            writer.close()
            await until(lambda: not site.state.connections)

    play(scene(), loop)


def test_a_refused_request_that_has_arrived_in_full_leaves_the_connection_open(loop: Loop) -> None:
    async def scene() -> None:
        async with serving(Refuses()) as site:
            reader, writer = await site.connect()
            for _ in range(2):
                writer.write(POST + b"Content-Length: 5\r\n\r\nhello")
                said = await asyncio.wait_for(reader.readuntil(b"never"), PATIENCE)
                assert b"connection: close" not in said.lower()

    play(scene(), loop)


def test_a_connection_that_only_ends_makes_room_for_an_honest_one(loop: Loop) -> None:
    async def scene() -> None:
        async with serving(Refuses(), most=2) as site:
            held = [await site.connect() for _ in range(2)]
            for reader, writer in held:
                writer.write(POST + b"Content-Length: 1000\r\n\r\n")
                await asyncio.wait_for(reader.readuntil(b"never"), PATIENCE)
            reader, writer = await site.connect()
            writer.write(REQUEST)
            assert (await asyncio.wait_for(reader.readuntil(b"never"), PATIENCE)).startswith(b"HTTP/1.1 403 ")

    play(scene(), loop)


def test_a_client_that_closes_its_sending_side_is_answered(loop: Loop) -> None:
    async def scene() -> None:
        for requests in (REQUEST, REQUEST * 50, POST + b"Content-Length: 5\r\n\r\nhello"):
            async with serving(App()) as site:
                reader, writer = await site.connect()
                writer.write(requests)
                writer.write_eof()
                assert (await ended(reader)).count(b"hello") == requests.count(b"HTTP/1.1")
                await until(lambda: not site.state.connections)

    play(scene(), loop)


@pytest.mark.parametrize("begun", [b"", b"GET / HT", POST + b"Content-Length: 5\r\n\r\nhe", REQUEST + b"GET /"])
def test_one_that_closes_it_amid_a_request_is_gone(loop: Loop, begun: bytes) -> None:
    async def scene() -> None:
        async with serving(App()) as site:
            reader, writer = await site.connect()
            writer.write(begun)
            writer.write_eof()
            assert (await ended(reader)).count(b"hello") == begun.count(REQUEST)
            await until(lambda: not site.state.connections)

    play(scene(), loop)


class Waits:
    """Answers once it is told to, and notes whether the client goes away before that."""

    def __init__(self) -> None:
        self.begun, self.gone, self.answer = False, False, asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun = True
        waits = asyncio.create_task(self.answer.wait())
        while not self.answer.is_set() and not self.gone:
            asked = asyncio.create_task(receive())
            await asyncio.wait([asked, waits], return_when=asyncio.FIRST_COMPLETED)
            self.gone = asked.done() and asked.result()["type"] == "http.disconnect"
            asked.cancel()
        waits.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


def test_one_that_waits_long_with_its_sending_side_closed_is_answered_all_the_same(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "PROBE_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "RESET_SECONDS", 0.01)

    async def scene() -> None:
        app = Waits()
        async with serving(app) as site:
            reader, writer = await site.connect()
            writer.write(REQUEST)
            writer.write_eof()
            for _ in range(2):  # interim answers: HTTP/1.1's clients pass over them
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)).startswith(b"HTTP/1.1 100 ")
            assert not app.gone
            app.answer.set()
            assert (await ended(reader)).endswith(b"hello")

    play(scene(), loop)


def test_one_that_has_closed_both_sides_is_noticed(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PROBE_SECONDS", 0.02)
    monkeypatch.setattr(protocol, "RESET_SECONDS", 0.02)

    async def scene() -> None:
        app = Waits()
        async with serving(app) as site:
            _, writer = await site.connect()
            writer.write(REQUEST)
            await until(lambda: app.begun)
            writer.close()
            await until(lambda: app.gone)
            await until(lambda: not site.state.connections)

    play(scene(), loop)


def test_what_is_still_to_be_sent_at_the_end_is_not_waited_for_without_end(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little enough not to stop the app, and more than the system takes for a client that reads nothing."""
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.05)

    async def scene() -> None:
        app = App(b"x" * 2**23)
        async with serving(app) as site:
            _, writer = await site.connect()
            writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
            await until(lambda: app.begun == 1)
            await until(lambda: not site.state.connections)

    play(scene(), loop)


def test_a_client_that_takes_an_answer_slowly_is_not_cut_off_before_it_stops(loop: Loop) -> None:
    async def scene() -> None:
        async with serving(App(b"x" * 2**25)) as site:
            reader, writer = await site.connect()
            writer.write(b"GET / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            connection: Any = next(iter(site.state.connections))
            for _ in range(3):
                left = connection.transport.get_write_buffer_size()
                while left - connection.transport.get_write_buffer_size() < protocol.UNREAD_BYTES:
                    await asyncio.wait_for(reader.readexactly(2**16), PATIENCE)
                connection._check_unread()
                assert site.state.connections
            for _ in range(2):
                connection._check_unread()
            await until(lambda: not site.state.connections)

    play(scene(), loop)
