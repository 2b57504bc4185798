"""Streams read from the event loop: clients that go away, time that runs out, engines that fail or are full."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.server.clients import PATIENCE, Client, play, skip, until

from octavo.infer.requests import Request, Stream, Token
from octavo.infer.sample import Sampling
from octavo.server import generation
from octavo.server.errors import ApiError
from octavo.server.generation import Generation
from octavo.server.metrics import Metrics

Open = Callable[..., Any]

BY_HAND = {"by_hand": True}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the king", "max_tokens": 8, "stream": False},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}], "max_tokens": 8, "stream": False},
    "/prompt/": {"input": "the king", "length": "10", "temperature": "0"},
}
STREAMED = {path: {**body, "stream": True} for path, body in ASKED.items() if "stream" in body}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_client_that_goes_away_frees_its_slot_at_once(opened: Open, path: str, steps: int) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND)
        for body in (ASKED[path], STREAMED.get(path)):
            if body is None:
                continue
            client = Client(setting.app, path, body)
            await until(lambda: len(setting.engine.runs) == 1)
            for _ in range(steps):
                setting.engine.step()
            stream = setting.engine.runs[0].stream
            assert not stream.cancelled
            client.gone.set()
            await asyncio.wait_for(client.task, PATIENCE)  # no token comes that would tell: it ends by itself
            assert stream.cancelled
            assert b"[DONE]" not in client.received
            setting.engine.step()
            assert setting.engine.runs == []
            assert setting.app.state.service.metrics.gone == setting.engine.cancelled

    play(scene())


def test_all_answers_of_a_client_that_went_away_are_cancelled(opened: Open) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND)
        client = Client(setting.app, "/v1/completions", {"prompt": ["the", "of"], "n": 2})
        await until(lambda: len(setting.engine.runs) == 4)
        client.gone.set()
        await asyncio.wait_for(client.task, PATIENCE)
        setting.engine.step()
        assert setting.engine.cancelled == 4

    play(scene())


def test_a_stream_comes_token_by_token(opened: Open) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND)
        client = Client(setting.app, "/v1/completions", STREAMED["/v1/completions"])
        await until(lambda: len(setting.engine.runs) == 1)
        for number in range(1, 9):
            setting.engine.step()
            await until(lambda: client.received.count(b"data: {") == number)  # noqa: B023
        await asyncio.wait_for(client.task, PATIENCE)
        assert client.whole
        assert client.received.endswith(b"data: [DONE]\n\n")

    play(scene())


def test_tokens_from_another_thread_wake_the_loop_and_many_streams_need_no_threads(opened: Open) -> None:
    async def scene() -> None:
        setting = opened(engine={**BY_HAND, "slots": 64}, slots=64)
        body = {"prompt": "the king", "max_tokens": 30, "stream": True}
        clients = [Client(setting.app, "/v1/completions", body) for _ in range(64)]
        await until(lambda: len(setting.engine.runs) == 64)
        before = threading.active_count()
        engine = threading.Thread(target=lambda: [setting.engine.step() for _ in range(30)])
        engine.start()
        await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), PATIENCE)
        assert threading.active_count() <= before + 1
        engine.join()
        assert all(client.whole and client.received.count(b"data: {") == 30 for client in clients)

    play(scene())


def test_an_overloaded_server_says_when_to_come_again(opened: Open) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND)
        clients = [Client(setting.app, "/v1/completions", ASKED["/v1/completions"]) for _ in range(4)]
        await until(lambda: len(setting.engine.runs) == 4)
        late = Client(setting.app, "/v1/completions", STREAMED["/v1/completions"])
        await late.task
        assert (late.status, late.headers[b"retry-after"]) == (429, b"2")
        assert json.loads(late.received)["error"]["type"] == "rate_limit_error"
        for _ in range(16):
            setting.engine.step()
        await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), PATIENCE)
        assert [client.status for client in clients] == [200] * 4

    play(scene())


def test_of_several_answers_none_is_begun_if_not_all_can_be(opened: Open) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND)
        first = Client(setting.app, "/v1/completions", ASKED["/v1/completions"])
        await until(lambda: len(setting.engine.runs) == 1)
        late = Client(setting.app, "/v1/completions", {"prompt": "the", "n": 4})
        await late.task
        assert late.status == 429
        assert [run.stream.cancelled for run in setting.engine.runs] == [False, True, True, True]
        first.gone.set()
        await first.task

    play(scene())


def test_more_answers_at_once_than_there_is_ever_room_for_is_a_wrong_request(setting: Any) -> None:
    status, error = setting.refusal("/v1/completions", prompt="the", n=5)
    assert status == 400
    assert "4 at most" in error["message"]


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_that_takes_too_long_ends_and_frees_its_slot(opened: Open, path: str) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND, request_seconds=900)
        client = Client(setting.app, path, ASKED[path])
        await until(lambda: len(setting.engine.runs) == 1)
        skip(900)
        await client.task
        assert client.status == 503
        assert client.headers[b"retry-after"] == b"2"
        assert json.loads(client.received)["error"]["code"] == "timeout"
        assert setting.engine.runs[0].stream.cancelled

    play(scene())


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_that_takes_too_long_ends_with_an_error_and_not_as_if_done(opened: Open, path: str) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND, request_seconds=900)
        client = Client(setting.app, path, STREAMED[path])
        await until(lambda: len(setting.engine.runs) == 1)
        setting.engine.step()
        await until(lambda: b"data: " in client.received)
        skip(900)
        await client.task
        assert client.status == 200
        assert client.whole
        last = client.received.decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert b"[DONE]" not in client.received
        assert setting.engine.runs[0].stream.cancelled

    play(scene())


def test_time_runs_out_even_while_tokens_keep_coming() -> None:
    async def read_on(work: Generation) -> None:
        async for _ in work.tokens():
            stream.put(Token(5, "a"))
            skip(1)

    stream = Stream(Request((1,), Sampling()))

    async def scene() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            return {}

        with Generation([stream], receive, fingerprint="", metrics=Metrics(), seconds=900) as work:
            stream.put(Token(5, "a"))
            with pytest.raises(ApiError, match="longer"):
                await read_on(work)
        assert stream.cancelled

    play(scene())


def test_a_client_that_reads_nothing_is_cut_off(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SENDING_SECONDS", 5)

    async def scene() -> None:
        setting = opened(engine=BY_HAND, request_seconds=900)
        client = Client(setting.app, "/v1/completions", STREAMED["/v1/completions"])
        client.reads.clear()
        await until(lambda: len(setting.engine.runs) == 1)
        skip(905)
        await asyncio.wait_for(client.task, PATIENCE)
        assert setting.engine.runs[0].stream.cancelled

    play(scene())


@pytest.mark.parametrize("path", ASKED)
def test_a_failing_engine_is_a_500_that_tells_nothing_of_the_inside(
    opened: Open, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    setting = opened(engine={"fails": True})
    answer = setting.client.post(path, json=ASKED[path])
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer.text
    assert "/secret/path" in caplog.text, "the operator is told"
    if path in STREAMED:
        text = setting.client.post(path, json=STREAMED[path]).text
        assert '"server_error"' in text
        assert "secret" not in text
        assert "[DONE]" not in text


@pytest.mark.parametrize("path", ASKED)
def test_an_engine_that_stops_is_a_503(opened: Open, path: str) -> None:
    async def scene() -> None:
        setting = opened(engine=BY_HAND)
        client = Client(setting.app, path, ASKED[path])
        await until(lambda: len(setting.engine.runs) == 1)
        setting.engine.runs[0].stream.cancel()  # as Engine.stop does once the grace time is over
        setting.engine.step()
        await client.task
        assert (client.status, client.headers[b"retry-after"]) == (503, b"2")
        assert json.loads(client.received)["error"]["code"] == "stopping"

    play(scene())


def test_a_loop_that_is_gone_does_not_disturb_the_engine() -> None:
    stream = Stream(Request((1,), Sampling()))

    async def scene() -> None:
        Generation([stream], asyncio.Event().wait, fingerprint="", metrics=Metrics(), seconds=9)  # type: ignore[arg-type]

    play(scene())
    stream.put(Token(5, "a"))
    assert stream.ready() == [Token(5, "a")]
