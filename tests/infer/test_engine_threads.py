"""The engine's thread: submissions from many threads, an orderly stop, and errors that reach all waiting readers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from time import perf_counter
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor

from octavo.errors import AdapterError
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, QueueFullError, Request, Stream, Token
from octavo.infer.sample import Sampling

if TYPE_CHECKING:
    from tests.infer.conftest import Family

PROMPT = tuple(range(40, 61))
GREEDY = Sampling(temperature=0.0, max_new_tokens=10)
LONG = Sampling(temperature=0.0, max_new_tokens=500)
TIMEOUT_SECONDS = 60  # after which a thread counts as stuck
LIMITS = Limits(slots=8, max_len=48, chunk=8, queue=64)

Started = Callable[..., Engine]


@pytest.fixture
def started(llama: Family) -> Iterator[Started]:
    """Engines whose thread runs until the end of the test."""
    engines: list[Engine] = []

    def start(limits: Limits = LIMITS, engine: Engine | None = None) -> Engine:
        engines.append(engine or llama.engine(limits))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop(0.0)
    assert not any(thread.name == "octavo-engine" for thread in threading.enumerate())


def outcome(stream: Stream) -> tuple[str, tuple[int, ...]]:
    """(finish reason, ids) of a stream, read from another thread."""
    ids: list[int] = []
    while True:
        token = stream.next(timeout=TIMEOUT_SECONDS)
        if token.token_id >= 0:
            ids.append(token.token_id)
        if token.finish_reason is not None:
            return token.finish_reason, tuple(ids)


@pytest.mark.parametrize("ahead", [False, True])
def test_sixteen_threads_receive_64_answers(llama: Family, started: Started, ahead: bool) -> None:
    engine = started()
    engine.scheduler.decoder.launches_ahead = ahead
    engine.load_adapter("blocks", llama.adapter("blocks"))
    requests = [
        Request((*PROMPT[: 1 + number % 20], number), GREEDY, adapter="blocks" if number % 3 == 0 else None)
        for number in range(64)
    ]
    expected = [llama.alone(request) for request in requests]

    def submit(number: int) -> list[tuple[str, tuple[int, ...]]]:
        streams = [engine.submit(request) for request in requests[number::16]]
        return [outcome(stream) for stream in streams]

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(submit, number) for number in range(16)]
        while wait(answers, timeout=0.01).not_done:
            stats = engine.stats()
            assert 0 <= stats.running <= 8
            assert 0 <= stats.cache_tokens_used <= stats.cache_tokens_total
    for number, answer in enumerate(answers):
        assert answer.result() == [(one.finish_reason, one.token_ids) for one in expected[number::16]]
    engine.stop(TIMEOUT_SECONDS)
    stats = engine.stats()
    assert (stats.requests_total, stats.finished_total, stats.running, stats.waiting) == (64, 64, 0, 0)


def test_stop_finishes_submitted_requests_and_refuses_new_ones(llama: Family, started: Started) -> None:
    engine = started(Limits(slots=2, max_len=48))
    streams = [engine.submit(Request((*PROMPT, number), GREEDY)) for number in range(5)]
    engine.stop(TIMEOUT_SECONDS)
    for stream in streams:
        assert llama.answer(stream) == llama.alone(stream.request)
    with pytest.raises(QueueFullError, match="stopping"):
        engine.submit(Request(PROMPT, GREEDY))
    engine.stop(0.0)


def test_stop_without_grace_time_cancels_all_requests(llama: Family, started: Started) -> None:
    """Called during a step, it takes effect before the next one: a waiter has precedence over the engine loop."""
    engine = llama.engine(Limits(slots=3, max_len=48, chunk=8))
    requests = [Request(PROMPT[:3], LONG), Request(PROMPT[:4], LONG), *[Request(PROMPT, LONG)] * 18]
    streams = [engine.submit(request) for request in requests]
    in_a_step, gate = threading.Event(), threading.Event()

    def hold() -> None:
        if not in_a_step.is_set() and streams[1].first_token is not None and engine.scheduler.prefiller.active:
            in_a_step.set()
            assert gate.wait(TIMEOUT_SECONDS)

    streams[0].notify(hold)
    started(engine=engine)
    assert in_a_step.wait(TIMEOUT_SECONDS)
    before = engine.stats()
    assert (before.running, before.waiting) == (3, 17)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(engine.stop, 0.0)
        deadline = perf_counter() + TIMEOUT_SECONDS
        while not engine._next_lock.locked():
            assert perf_counter() < deadline
            wait([stopped], timeout=0.001)
        gate.set()
        stopped.result(TIMEOUT_SECONDS)
    assert [outcome(stream)[0] for stream in streams] == ["cancelled"] * 20
    stats = engine.stats()
    assert (stats.requests_total, stats.cancelled_total) == (20, 20)
    assert (stats.running, stats.waiting, stats.cache_tokens_used) == (0, 0, 0)
    assert stats.steps_total == before.steps_total + 2  # the current one, and the one that drops the requests


def test_an_idle_engine_stops_before_its_grace_time(started: Started) -> None:
    engine = started()
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(engine.stop, threading.TIMEOUT_MAX)
        try:
            stopped.result(TIMEOUT_SECONDS)
        finally:
            engine.stop(0.0)


def test_an_error_in_the_model_fails_active_requests_and_the_engine_continues(
    llama: Family, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised with one request running, one in prefill and one waiting."""
    engine = llama.engine(Limits(slots=3, max_len=48, chunk=4))
    hidden, passes = engine.model.hidden, []

    def failing(ids: Tensor, **options: Any) -> Tensor:
        passes.append(ids.shape)
        if len(passes) == 9:
            raise RuntimeError("out of memory")
        return hidden(ids, **options)

    monkeypatch.setattr(engine.model, "hidden", failing)
    requests = [Request(PROMPT[:3], GREEDY), Request(PROMPT, GREEDY), Request(PROMPT, GREEDY)]
    streams = [engine.submit(request) for request in requests]
    started(engine=engine)
    outcomes = [outcome(stream) for stream in streams]
    again = engine.submit(requests[1])
    assert outcome(again) == outcomes[2] == (llama.alone(requests[1]).finish_reason, llama.alone(requests[1]).token_ids)
    assert [reason for reason, _ in outcomes] == ["error", "error", "length"]
    assert outcomes[0][1] == llama.alone(requests[0]).token_ids[: len(outcomes[0][1])] != ()
    assert [stream.error for stream in streams] == ["RuntimeError: out of memory"] * 2 + [""]
    engine.stop(TIMEOUT_SECONDS)
    stats = engine.stats()
    assert (stats.requests_total, stats.finished_total, stats.failed_total) == (4, 2, 2)
    assert stats.cache_tokens_used == 0
    assert stats.reused_tokens_total == 3 + 20  # by the second and the last request, not after the error


def test_a_request_that_finished_in_a_failed_step_gets_no_error(
    llama: Family, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine(LIMITS)
    streams = [
        engine.submit(Request(PROMPT, Sampling(temperature=0.0, max_new_tokens=4))),
        *[engine.submit(Request((*PROMPT, number), GREEDY)) for number in (1, 2)],
    ]
    emit = engine.scheduler._emit

    def failing(active: Any, token: Token) -> None:
        if active.stream is streams[1] and engine.stats().finished_total:
            raise RuntimeError("out of memory")
        emit(active, token)

    monkeypatch.setattr(engine.scheduler, "_emit", failing)
    started(engine=engine)
    assert [outcome(stream)[0] for stream in streams] == ["length", "error", "error"]
    engine.stop(TIMEOUT_SECONDS)
    assert [stream.ready() for stream in streams] == [[], [], []]
    assert streams[0].error == ""
    assert (engine.stats().finished_total, engine.stats().failed_total) == (1, 2)


def test_a_permanent_error_fails_every_request(
    llama: Family, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine(Limits(slots=2, max_len=48))
    monkeypatch.setattr(engine.scheduler.slots, "reuse_prefix", lambda *_: 1 / 0)  # during admission
    streams = [engine.submit(Request(PROMPT, GREEDY)) for _ in range(4)]
    started(engine=engine)
    assert [outcome(stream) for stream in streams] == [("error", ())] * 4
    engine.stop(TIMEOUT_SECONDS)
    assert engine.stats().failed_total == 4


def closed_listener() -> None:
    raise RuntimeError("the loop is closed")


def test_a_failing_listener_cancels_its_request_only(llama: Family, started: Started) -> None:
    engine = llama.engine(LIMITS)
    streams = [engine.submit(Request((*PROMPT, number), LONG)) for number in range(3)]
    streams[1].notify(closed_listener)
    started(engine=engine)
    assert outcome(streams[1])[0] == "cancelled"
    for number in (0, 2):
        expected = llama.alone(streams[number].request)
        assert outcome(streams[number]) == (expected.finish_reason, expected.token_ids)


def test_adapters_are_loaded_and_removed_between_the_steps_of_a_busy_engine(llama: Family, started: Started) -> None:
    """It stays busy until then: every token submits another request."""
    engine, changed = started(), threading.Event()

    def submit() -> None:
        if not changed.is_set() and not engine.stats().waiting:
            engine.submit(Request((*PROMPT[:4], engine.stats().requests_total), LONG)).notify(submit)

    def change() -> None:
        for _ in range(2):
            engine.load_adapter("blocks", llama.adapter("blocks"))
            engine.remove_adapter("blocks")

    for _ in range(8):
        engine.submit(Request(PROMPT[:4], LONG)).notify(submit)
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(change).result(TIMEOUT_SECONDS)
            assert engine.stats().running
        finally:
            changed.set()


def test_of_several_concurrent_adapters_of_one_name_one_is_loaded(llama: Family, started: Started) -> None:
    engine = started()
    adapters = [llama.adapter("blocks"), llama.adapter("embeddings")] * 4
    barrier = threading.Barrier(len(adapters))

    def load(number: int) -> bool:
        barrier.wait(TIMEOUT_SECONDS)
        try:
            engine.load_adapter("new", adapters[number])
        except AdapterError:
            return False
        return True

    with ThreadPoolExecutor(len(adapters)) as pool:
        loaded = list(pool.map(load, range(len(adapters))))
    assert sum(loaded) == 1
    assert engine.adapters()["new"].sha256 == adapters[loaded.index(True)].sha256
