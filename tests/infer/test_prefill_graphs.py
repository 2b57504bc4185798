"""Prompts that are read whole, as a card does: here with the step that is recorded there, launched as it is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from octavo.infer import prefill_graphs
from octavo.infer.engine import Engine
from octavo.infer.prefill_graphs import PrefillGraphs, Shape
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling

if TYPE_CHECKING:
    from tests.infer.conftest import Family

GREEDY = Sampling(temperature=0.0, max_new_tokens=9)
PROMPT = tuple(range(40, 80))
ADAPTERS = (None, "blocks", "tables")
LINE = [[0] * 8 + [1, 0, 0]]  # a prompt of one token
LENGTHS = (1, 3, 4, 5, 8, 15, 16, 17, 30)  # around the sizes, and over the largest


class Unrecorded:
    """Computes anew what a graph would replay, and once when it is made, as recording does; counts how often."""

    runs: list[Shape]
    graph = SimpleNamespace(pool=lambda: None)

    def __init__(self, own: PrefillGraphs, given: Sequence[Sequence[int]], shape: Shape, pool: Any) -> None:
        self.own, self.shape = weakref.ref(own), shape  # a graph knows its tensors alone
        own.found(torch.tensor(given))

    def run(self, given: Sequence[Sequence[int]]) -> torch.Tensor:
        assert [len(line) for line in given] == [self.shape.size + 3] * self.shape.rows
        self.runs.append(self.shape)
        own = self.own()
        assert own is not None
        return own.found(torch.tensor(given))


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Puts the above in the place of graphs; the shapes that were run."""
    made: list[Shape] = []
    monkeypatch.setattr(Unrecorded, "runs", made, raising=False)
    monkeypatch.setattr(prefill_graphs, "_Recorded", Unrecorded)
    monkeypatch.setattr(prefill_graphs, "kernels_run_on", lambda _: True)
    monkeypatch.setattr(prefill_graphs, "SIZES", (4, 8, 16, 64))  # no slot has room for the last
    monkeypatch.setattr(prefill_graphs, "MOST", 32)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return made


def serving(family: Family, **limits: Any) -> Engine:
    engine = family.engine(Limits(**{"slots": 4, "max_len": 48, "chunk": 16, **limits}))
    for name in ADAPTERS[1:]:
        engine.load_adapter(name, family.adapter(name))
    return prepared(engine)


def prepared(engine: Engine) -> Engine:
    for piece in engine.warmup_tasks():
        piece()
    return engine


def test_answers_are_those_of_each_request_alone(family: Family, runs: list[Shape]) -> None:
    requests = [
        Request((*PROMPT[: length - 1], 3 + n), GREEDY, adapter=ADAPTERS[n % 3]) for n, length in enumerate(LENGTHS)
    ]
    engine = serving(family)
    streams = [engine.submit(request) for request in requests]
    family.run_out(engine)
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]
    assert runs == [(4, 8), (2, 16), (1, 16)]  # and two in chunks


@pytest.mark.parametrize(("slots", "rows"), [(1, {1}), (2, {1, 4}), (4, {1, 4}), (5, {1, 4, 8})])
def test_graphs_are_of_as_many_prompts_as_there_are_slots(llama: Family, slots: int, rows: set[int]) -> None:
    engine = prepared(llama.engine(Limits(slots=slots, max_len=48)))
    assert {shape.rows for shape in engine._reader.prompts.shapes if shape.size == 4} == rows


def test_what_stood_in_a_slot_before_is_not_seen(llama: Family) -> None:
    long, short = Request(PROMPT[:16], GREEDY), Request(PROMPT[20:23], GREEDY)
    engine = serving(llama, slots=1)
    for request in (long, short, long):
        stream = engine.submit(request)
        llama.run_out(engine)
        assert llama.answer(stream) == llama.alone(request)


def test_what_is_told_of_a_prompt_is_read_in_chunks(llama: Family, runs: list[Shape]) -> None:
    engine = serving(llama)
    stream = engine.submit(Request(PROMPT[:9], GREEDY, logprobs=0, prompt_logprobs=True))
    llama.run_out(engine)
    assert len(stream.prompt) == 9
    assert runs == []


def test_an_engine_that_was_not_prepared_records_nothing(llama: Family, runs: list[Shape]) -> None:
    engine = llama.engine(Limits(slots=2, max_len=48))
    request = Request(PROMPT[:7], GREEDY)
    stream = engine.submit(request)
    llama.run_out(engine)
    assert llama.answer(stream) == llama.alone(request)
    assert runs == []


def test_adapters_that_come_and_go_are_recorded_anew(llama: Family, runs: list[Shape]) -> None:
    engine = prepared(llama.engine(Limits(slots=2, max_len=48)))
    asked = [Request(PROMPT[:7], GREEDY, adapter=name) for name in (None, "blocks")]
    first = engine.submit(asked[0])
    llama.run_out(engine)
    before = engine._reader.prompts.recorded(Shape(1, 8), LINE)
    engine.load_adapter("blocks", llama.adapter("blocks"))
    streams = [first, *(engine.submit(request) for request in asked)]
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(r) for r in (asked[0], *asked)]
    assert engine._reader.prompts.recorded(Shape(1, 8), LINE) is not before
    assert runs == [(1, 8), (4, 8)]


def test_a_graph_that_is_recorded_in_between_leaves_running_requests_as_they_are(llama: Family) -> None:
    """Recording computes once for real, into a slot: into that of the prompt which is about to be read."""
    engine = prepared(llama.engine(Limits(slots=3, max_len=48)))
    running = Request(PROMPT[:8], GREEDY)
    streams = [engine.submit(running)]
    for _ in range(3):
        engine.step()
    engine.load_adapter("blocks", llama.adapter("blocks"))  # its tensors are others than those that graphs know
    later = Request(PROMPT[20:27], GREEDY, adapter="blocks")
    streams.append(engine.submit(later))
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(running), llama.alone(later)]


@pytest.mark.parametrize("place", [2, 4], ids=["inside", "last"])
def test_numbers_that_are_not_finite_fail_their_request_alone(llama: Family, runs: list[Shape], place: int) -> None:
    """Also where others are read along with it, and where the slot is taken again."""
    engine = serving(llama)
    bad, beside, after = (Request(ids, GREEDY) for ids in (PROMPT[:5], PROMPT[10:16], PROMPT[20:26]))
    table = engine.model.embed.matrix.parts["weight"]
    kept = table[PROMPT[place]].clone()
    table[PROMPT[place]] = torch.nan
    streams = [engine.submit(request) for request in (bad, beside)]
    llama.run_out(engine)
    table[PROMPT[place]] = kept
    streams.append(engine.submit(after))
    llama.run_out(engine)
    assert "not finite" in str(streams[0].error)
    assert [llama.answer(stream) for stream in streams[1:]] == [llama.alone(beside), llama.alone(after)]
    assert engine.stats().failed_total == 1
    assert runs == [(4, 8), (1, 8)]


def test_waiting_prompts_are_read_at_once_as_far_as_a_graph_holds_them(llama: Family, runs: list[Shape]) -> None:
    engine = serving(llama, slots=9)
    lengths = (2, 3, 4, 2, 3, 9, 8, 20, 1)
    asked = [Request(PROMPT[n : n + length], GREEDY) for n, length in enumerate(lengths)]
    streams = [engine.submit(request) for request in asked]
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(request) for request in asked]
    # Five in a graph of eight; a sixth of nine tokens would be too much for it. The one of 20 is read in chunks.
    assert runs == [(8, 4), (2, 16), (1, 4)]


def test_what_lies_behind_a_prompt_does_not_fail_it(llama: Family) -> None:
    """It is filled up with what is finite if the prompt is: zero weights times NaN would be NaN."""
    engine = serving(llama)
    engine.model.embed.matrix.parts["weight"][0] = torch.inf
    request = Request(PROMPT[:5], GREEDY)
    stream = engine.submit(request)
    llama.run_out(engine)
    assert llama.answer(stream) == llama.alone(request)


def test_an_engine_that_is_let_go_is_gone_at_once(llama: Family) -> None:
    """On a card its cache is gigabytes: a cycle would hold them until it happens to be collected."""
    engine = serving(llama)
    engine.submit(Request(PROMPT[:5], GREEDY))
    llama.run_out(engine)
    kept = weakref.ref(engine._reader.prompts), weakref.ref(engine._decoder), weakref.ref(engine._slots)
    gc.disable()
    try:
        del engine
        assert [one() for one in kept] == [None] * 3
    finally:
        gc.enable()
