"""The engine's own thread: many askers at once, an end in good order, and errors that reach whoever waits."""

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
PATIENCE = 60  # seconds until a thread counts as stuck
LIMITS = Limits(slots=8, max_len=48, chunk=8, queue=64)

Started = Callable[..., Engine]


@pytest.fixture
def started(llama: Family) -> Iterator[Started]:
    """Engines whose thread runs until the test is over."""
    engines: list[Engine] = []

    def start(limits: Limits = LIMITS, engine: Engine | None = None) -> Engine:
        engines.append(engine or llama.engine(limits))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop(0.0)
    assert not any(thread.name == "octavo-engine" for thread in threading.enumerate())


def heard(stream: Stream) -> tuple[str, tuple[int, ...]]:
    """(reason, ids) of a stream, as another thread hears them."""
    ids: list[int] = []
    while True:
        token = stream.next(timeout=PATIENCE)
        if token.token_id >= 0:
            ids.append(token.token_id)
        if token.finish_reason is not None:
            return token.finish_reason, tuple(ids)


@pytest.mark.parametrize("ahead", [False, True])
def test_sixteen_threads_hear_64_answers(llama: Family, started: Started, ahead: bool) -> None:
    engine = started()
    engine._decoder.runs_ahead = ahead
    engine.load_adapter("blocks", llama.adapter("blocks"))
    requests = [
        Request((*PROMPT[: 1 + number % 20], number), GREEDY, adapter="blocks" if number % 3 == 0 else None)
        for number in range(64)
    ]
    wanted = [llama.alone(request) for request in requests]

    def ask(number: int) -> list[tuple[str, tuple[int, ...]]]:
        streams = [engine.submit(request) for request in requests[number::16]]
        return [heard(stream) for stream in streams]

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, number) for number in range(16)]
        while wait(answers, timeout=0.01).not_done:
            stats = engine.stats()
            assert 0 <= stats.running <= 8
            assert 0 <= stats.cache_tokens_used <= stats.cache_tokens_total
    for number, answer in enumerate(answers):
        assert answer.result() == [(one.finish_reason, one.token_ids) for one in wanted[number::16]]
    engine.stop(PATIENCE)
    stats = engine.stats()
    assert (stats.requests_total, stats.finished_total, stats.running, stats.waiting) == (64, 64, 0, 0)


def test_stopping_finishes_what_is_at_work_and_refuses_the_rest(llama: Family, started: Started) -> None:
    engine = started(Limits(slots=2, max_len=48))
    streams = [engine.submit(Request((*PROMPT, number), GREEDY)) for number in range(5)]
    engine.stop(PATIENCE)
    for stream in streams:
        assert llama.answer(stream) == llama.alone(stream.request)
    with pytest.raises(QueueFullError, match="stopping"):
        engine.submit(Request(PROMPT, GREEDY))
    engine.stop(0.0)


def test_stopping_at_once_cancels_what_is_at_work(llama: Family, started: Started) -> None:
    """Asked for in the midst of a step, it comes before the next: whoever waits for the model has the turn."""
    engine = llama.engine(Limits(slots=3, max_len=48, chunk=8))
    requests = [Request(PROMPT[:3], LONG), Request(PROMPT[:4], LONG), *[Request(PROMPT, LONG)] * 18]
    streams = [engine.submit(request) for request in requests]
    in_a_step, gate = threading.Event(), threading.Event()

    def hold() -> None:
        if not in_a_step.is_set() and streams[1].first_token is not None and engine._reader.runs:
            in_a_step.set()
            assert gate.wait(PATIENCE)

    streams[0].notify(hold)
    started(engine=engine)
    assert in_a_step.wait(PATIENCE)
    before = engine.stats()
    assert (before.running, before.waiting) == (3, 17)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(engine.stop, 0.0)
        patience = perf_counter() + PATIENCE
        while not engine._turn.locked():
            assert perf_counter() < patience
            wait([stopped], timeout=0.001)
        gate.set()
        stopped.result(PATIENCE)
    assert [heard(stream)[0] for stream in streams] == ["cancelled"] * 20
    stats = engine.stats()
    assert (stats.requests_total, stats.cancelled_total) == (20, 20)
    assert (stats.running, stats.waiting, stats.cache_tokens_used) == (0, 0, 0)
    assert stats.steps_total == before.steps_total + 2  # the one it was in, and the one that drops them


def test_an_idle_engine_uses_nothing_of_its_grace_time(started: Started) -> None:
    engine = started()
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(engine.stop, threading.TIMEOUT_MAX)
        try:
            stopped.result(PATIENCE)
        finally:
            engine.stop(0.0)


def test_a_fault_in_the_model_ends_what_is_at_work_and_the_engine_goes_on(
    llama: Family, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in a pass over running requests, a prompt at work beside them and another waiting."""
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
    found = [heard(stream) for stream in streams]
    again = engine.submit(requests[1])
    assert heard(again) == found[2] == (llama.alone(requests[1]).finish_reason, llama.alone(requests[1]).token_ids)
    assert [reason for reason, _ in found] == ["error", "error", "length"]
    assert found[0][1] == llama.alone(requests[0]).token_ids[: len(found[0][1])] != ()
    assert [stream.error for stream in streams] == ["RuntimeError: out of memory"] * 2 + [""]
    engine.stop(PATIENCE)
    stats = engine.stats()
    assert (stats.requests_total, stats.finished_total, stats.failed_total) == (4, 2, 2)
    assert stats.cache_tokens_used == 0
    assert stats.reused_tokens_total == 3 + 20  # by the second and the last: after a step that failed nothing is


def test_who_is_done_in_a_step_that_fails_is_told_of_no_error(
    llama: Family, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine(LIMITS)
    streams = [
        engine.submit(Request(PROMPT, Sampling(temperature=0.0, max_new_tokens=4))),
        *[engine.submit(Request((*PROMPT, number), GREEDY)) for number in (1, 2)],
    ]
    tell = engine._tell

    def failing(run: Any, told: Token) -> None:
        if run.stream is streams[1] and engine.stats().finished_total:
            raise RuntimeError("out of memory")
        tell(run, told)

    monkeypatch.setattr(engine, "_tell", failing)
    started(engine=engine)
    assert [heard(stream)[0] for stream in streams] == ["length", "error", "error"]
    engine.stop(PATIENCE)
    assert [stream.ready() for stream in streams] == [[], [], []]
    assert streams[0].error == ""
    assert (engine.stats().finished_total, engine.stats().failed_total) == (1, 2)


def test_a_fault_that_stays_ends_every_request(
    llama: Family, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine(Limits(slots=2, max_len=48))
    monkeypatch.setattr(engine._slots, "begin", lambda *_: 1 / 0)  # where a request is in neither queue nor slot
    streams = [engine.submit(Request(PROMPT, GREEDY)) for _ in range(4)]
    started(engine=engine)
    assert [heard(stream) for stream in streams] == [("error", ())] * 4
    engine.stop(PATIENCE)
    assert engine.stats().failed_total == 4


def gone() -> None:
    raise RuntimeError("the loop is closed")


def test_a_listener_that_fails_is_cancelled_and_no_one_else(llama: Family, started: Started) -> None:
    engine = llama.engine(LIMITS)
    streams = [engine.submit(Request((*PROMPT, number), LONG)) for number in range(3)]
    streams[1].notify(gone)
    started(engine=engine)
    assert heard(streams[1])[0] == "cancelled"
    for number in (0, 2):
        wanted = llama.alone(streams[number].request)
        assert heard(streams[number]) == (wanted.finish_reason, wanted.token_ids)


def test_adapters_are_changed_between_the_steps_of_a_busy_engine(llama: Family, started: Started) -> None:
    """It is busy for as long as it takes: with each token that it gives, it is asked for more."""
    engine, changed = started(), threading.Event()

    def ask() -> None:
        if not changed.is_set() and not engine.stats().waiting:
            engine.submit(Request((*PROMPT[:4], engine.stats().requests_total), LONG)).notify(ask)

    def change() -> None:
        for _ in range(2):
            engine.load_adapter("blocks", llama.adapter("blocks"))
            engine.remove_adapter("blocks")

    for _ in range(8):
        engine.submit(Request(PROMPT[:4], LONG)).notify(ask)
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(change).result(PATIENCE)
            assert engine.stats().running
        finally:
            changed.set()


def test_of_two_adapters_of_one_name_one_is_refused(llama: Family, started: Started) -> None:
    engine = started()
    folders = [llama.adapter("blocks"), llama.adapter("tables")] * 4
    barrier = threading.Barrier(len(folders))

    def load(number: int) -> bool:
        barrier.wait(PATIENCE)
        try:
            engine.load_adapter("own", folders[number])
        except AdapterError:
            return False
        return True

    with ThreadPoolExecutor(len(folders)) as pool:
        loaded = list(pool.map(load, range(len(folders))))
    assert sum(loaded) == 1
    assert engine.adapters()["own"].folder == folders[loaded.index(True)]
