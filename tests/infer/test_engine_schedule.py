"""Any schedule of submitting, cancelling, stepping and changing adapters gives the answers of each request alone.

In float64, in which the order of a sum does not change the likeliest token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import AdapterError
from octavo.infer.requests import Limits, QueueFullError, Request
from octavo.infer.sample import Sampling

if TYPE_CHECKING:
    from tests.infer.conftest import Family

START = tuple(range(60, 80))
REQUESTS = [
    Request(prompt, sampling, adapter=adapter)
    for prompt, sampling, adapter in (
        ((5,), Sampling(temperature=0.0, max_new_tokens=8), None),
        (START[:7], Sampling(temperature=1.0, max_new_tokens=5, seed=1), None),
        (START, Sampling(temperature=0.0, max_new_tokens=1), None),
        ((*START[:12], 7, 8), Sampling(temperature=0.0, max_new_tokens=6, repetition_penalty=1.4), None),
        ((*START, *START), Sampling(temperature=0.0, max_new_tokens=99), None),
        (START[:9], Sampling(temperature=0.0, max_new_tokens=7), "blocks"),
        ((*START[:9], 3), Sampling(temperature=1.5, top_k=30, max_new_tokens=4, seed=2), "blocks"),
        (START, Sampling(temperature=0.0, max_new_tokens=6), "embeddings"),
        ((4,), Sampling(temperature=1.5, top_p=0.9, max_new_tokens=9, seed=3), "embeddings"),
    )
]
NUMBERS = st.integers(0, 30)
STEPS = st.lists(
    st.one_of(
        *[st.tuples(st.just("submit"), st.integers(0, len(REQUESTS) - 1))] * 3,
        *[st.tuples(st.just("step"), st.integers(1, 6))] * 2,
        st.tuples(st.just("cancel"), NUMBERS),
        st.tuples(st.just("load"), st.sampled_from(["blocks", "embeddings"])),
        st.tuples(st.just("remove"), st.sampled_from(["blocks", "embeddings"])),
    ),
    min_size=8,
    max_size=40,
)


@pytest.mark.parametrize("examples", [25, pytest.param(100, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_any_schedule_gives_the_answers_of_each_alone(families: dict[str, Family], name: str, examples: int) -> None:
    family = families[name]
    model = family.model(dtype=torch.float64)

    @settings(max_examples=examples, deadline=None)
    @given(steps=STEPS, slots=st.integers(1, 4), chunk=st.sampled_from([1, 3, 5, 64]), ahead=st.booleans())
    def check(steps: list[tuple[str, int | str]], slots: int, chunk: int, ahead: bool) -> None:
        engine = family.engine(Limits(slots=slots, max_len=48, chunk=chunk, queue=5), model)
        engine.scheduler.decoder.launches_ahead = ahead  # as on a GPU
        streams, cancelled = [], set()
        for kind, value in steps:
            if kind == "submit":
                request = REQUESTS[int(value)]
                try:
                    streams.append(engine.submit(request))
                except QueueFullError:
                    assert engine.stats().waiting == 5 + slots - engine.stats().running
                except AdapterError:
                    assert request.adapter not in engine.adapters()
            elif kind == "step":
                for _ in range(int(value)):
                    engine.step()
            elif kind == "cancel" and streams:
                number = int(value) % len(streams)
                streams[number].cancel()
                cancelled.add(number)
            elif kind == "load" and value not in engine.adapters():
                engine.load_adapter(str(value), family.adapter(str(value)))
            elif kind == "remove" and value in engine.adapters():
                try:
                    engine.remove_adapter(str(value))
                except AdapterError:
                    assert any(stream.request.adapter == value for stream in streams)
            stats = engine.stats()
            assert stats.running <= slots
            assert stats.cache_tokens_used <= slots * 48
        family.run_out(engine)
        reasons = []
        for number, stream in enumerate(streams):
            actual, expected = family.answer(stream), family.alone(stream.request, dtype=torch.float64)
            reasons.append(actual.finish_reason)
            if actual.finish_reason == "cancelled":
                assert number in cancelled
                assert actual.token_ids == expected.token_ids[: len(actual.token_ids)]
            else:
                assert actual == expected
        stats = engine.stats()
        assert stats.requests_total == len(streams) == stats.finished_total + stats.cancelled_total
        assert (stats.cancelled_total, stats.failed_total) == (reasons.count("cancelled"), 0)
        assert stats.cache_tokens_used == 0
        for adapter in engine.adapters():
            engine.remove_adapter(adapter)

    check()
