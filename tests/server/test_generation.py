"""Reading token streams: client disconnects, timeouts, failing and overloaded engines."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.server.clients import PATIENCE, Client, advance_clock, run_scenario, until

from octavo.infer.requests import Request, Stream, Token
from octavo.infer.sample import Sampling
from octavo.server import generation
from octavo.server.errors import ApiError
from octavo.server.generation import Generation
from octavo.server.metrics import Metrics

OpenServer = Callable[..., Any]

MANUAL = {"manual": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the king", "max_tokens": 8, "stream": False},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}], "max_tokens": 8, "stream": False},
    "/prompt/": {"input": "the king", "length": "10", "temperature": "0"},
}
STREAMED = {path: {**body, "stream": True} for path, body in BODIES.items() if "stream" in body}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_disconnect_frees_the_slot_immediately(open_server: OpenServer, path: str, steps: int) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL)
        for body in (BODIES[path], STREAMED.get(path)):
            if body is None:
                continue
            client = Client(server.app, path, body)
            await until(lambda: len(server.engine.active) == 1)
            for _ in range(steps):
                server.engine.step()
            stream = server.engine.active[0].stream
            assert not stream.cancelled
            client.disconnected.set()
            await asyncio.wait_for(client.task, PATIENCE)  # ends without another token
            assert stream.cancelled
            assert b"[DONE]" not in client.received
            server.engine.step()
            assert server.engine.active == []
            assert server.app.state.service.metrics.disconnected == server.engine.cancelled

    run_scenario(scenario())


def test_a_disconnect_cancels_all_choices(open_server: OpenServer) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL)
        client = Client(server.app, "/v1/completions", {"prompt": ["the", "of"], "n": 2})
        await until(lambda: len(server.engine.active) == 4)
        client.disconnected.set()
        await asyncio.wait_for(client.task, PATIENCE)
        server.engine.step()
        assert server.engine.cancelled == 4

    run_scenario(scenario())


def test_a_stream_sends_each_token_immediately(open_server: OpenServer) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL)
        client = Client(server.app, "/v1/completions", STREAMED["/v1/completions"])
        await until(lambda: len(server.engine.active) == 1)
        for number in range(1, 9):
            server.engine.step()
            await until(lambda: client.received.count(b"data: {") == number)  # noqa: B023
        await asyncio.wait_for(client.task, PATIENCE)
        assert client.complete
        assert client.received.endswith(b"data: [DONE]\n\n")

    run_scenario(scenario())


def test_many_streams_need_no_additional_threads(open_server: OpenServer) -> None:
    async def scenario() -> None:
        server = open_server(engine={**MANUAL, "slots": 64}, slots=64)
        body = {"prompt": "the king", "max_tokens": 30, "stream": True}
        clients = [Client(server.app, "/v1/completions", body) for _ in range(64)]
        await until(lambda: len(server.engine.active) == 64)
        before = threading.active_count()
        engine = threading.Thread(target=lambda: [server.engine.step() for _ in range(30)])
        engine.start()
        await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), PATIENCE)
        assert threading.active_count() <= before + 1
        engine.join()
        assert all(client.complete and client.received.count(b"data: {") == 30 for client in clients)

    run_scenario(scenario())


def test_an_overloaded_server_sends_retry_after(open_server: OpenServer) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL)
        clients = [Client(server.app, "/v1/completions", BODIES["/v1/completions"]) for _ in range(4)]
        await until(lambda: len(server.engine.active) == 4)
        late = Client(server.app, "/v1/completions", STREAMED["/v1/completions"])
        await late.task
        assert (late.status, late.headers[b"retry-after"]) == (429, b"2")
        assert json.loads(late.received)["error"]["type"] == "rate_limit_error"
        for _ in range(16):
            server.engine.step()
        await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), PATIENCE)
        assert [client.status for client in clients] == [200] * 4

    run_scenario(scenario())


def test_either_all_choices_of_a_request_start_or_none(open_server: OpenServer) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL)
        first = Client(server.app, "/v1/completions", BODIES["/v1/completions"])
        await until(lambda: len(server.engine.active) == 1)
        late = Client(server.app, "/v1/completions", {"prompt": "the", "n": 4})
        await late.task
        assert late.status == 429
        assert [run.stream.cancelled for run in server.engine.active] == [False, True, True, True]
        first.disconnected.set()
        await first.task

    run_scenario(scenario())


def test_more_choices_than_slots_and_queue_is_400(server: Any) -> None:
    status, error = server.error("/v1/completions", prompt="the", n=5)
    assert status == 400
    assert "limit is 4" in error["message"]


@pytest.mark.parametrize("path", BODIES)
def test_a_timeout_is_503_and_frees_the_slot(open_server: OpenServer, path: str) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL, request_seconds=900)
        client = Client(server.app, path, BODIES[path])
        await until(lambda: len(server.engine.active) == 1)
        advance_clock(900)
        await client.task
        assert client.status == 503
        assert client.headers[b"retry-after"] == b"2"
        assert json.loads(client.received)["error"]["code"] == "timeout"
        assert server.engine.active[0].stream.cancelled

    run_scenario(scenario())


@pytest.mark.parametrize("path", STREAMED)
def test_a_timeout_of_a_stream_ends_it_with_an_error(open_server: OpenServer, path: str) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL, request_seconds=900)
        client = Client(server.app, path, STREAMED[path])
        await until(lambda: len(server.engine.active) == 1)
        server.engine.step()
        await until(lambda: b"data: " in client.received)
        advance_clock(900)
        await client.task
        assert client.status == 200
        assert client.complete
        last = client.received.decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert b"[DONE]" not in client.received
        assert server.engine.active[0].stream.cancelled

    run_scenario(scenario())


def test_the_timeout_applies_while_tokens_arrive() -> None:
    async def read_tokens(generation_under_test: Generation) -> None:
        async for _ in generation_under_test.tokens():
            stream.put(Token(5, "a"))
            advance_clock(1)

    stream = Stream(Request((1,), Sampling()))

    async def scenario() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        with Generation([stream], receive, fingerprint="", metrics=Metrics(), seconds=900) as generation_under_test:
            stream.put(Token(5, "a"))
            with pytest.raises(ApiError, match="longer"):
                await read_tokens(generation_under_test)
        assert stream.cancelled

    run_scenario(scenario())


def test_a_client_that_does_not_read_is_disconnected(open_server: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SEND_SECONDS", 5)

    async def scenario() -> None:
        server = open_server(engine=MANUAL, request_seconds=900)
        client = Client(server.app, "/v1/completions", STREAMED["/v1/completions"])
        client.reading.clear()
        await until(lambda: len(server.engine.active) == 1)
        advance_clock(905)
        await asyncio.wait_for(client.task, PATIENCE)
        assert server.engine.active[0].stream.cancelled

    run_scenario(scenario())


@pytest.mark.parametrize("path", BODIES)
def test_an_engine_failure_is_500_without_internal_details(
    open_server: OpenServer, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = open_server(engine={"failing": True})
    response = server.client.post(path, json=BODIES[path])
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text
    assert "/secret/path" in caplog.text, "the log has the details"
    if path in STREAMED:
        text = server.client.post(path, json=STREAMED[path]).text
        assert '"server_error"' in text
        assert "secret" not in text
        assert "[DONE]" not in text


@pytest.mark.parametrize("path", BODIES)
def test_a_stopping_engine_is_503(open_server: OpenServer, path: str) -> None:
    async def scenario() -> None:
        server = open_server(engine=MANUAL)
        client = Client(server.app, path, BODIES[path])
        await until(lambda: len(server.engine.active) == 1)
        server.engine.active[0].stream.cancel()  # as Engine.stop does after the grace time
        server.engine.step()
        await client.task
        assert (client.status, client.headers[b"retry-after"]) == (503, b"2")
        assert json.loads(client.received)["error"]["code"] == "stopping"

    run_scenario(scenario())


def test_a_closed_loop_does_not_affect_the_engine() -> None:
    stream = Stream(Request((1,), Sampling()))

    async def scenario() -> None:
        Generation([stream], asyncio.Event().wait, fingerprint="", metrics=Metrics(), seconds=9)  # type: ignore[arg-type]

    run_scenario(scenario())
    stream.put(Token(5, "a"))
    assert stream.ready() == [Token(5, "a")]
