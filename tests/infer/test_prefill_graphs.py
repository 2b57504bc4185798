"""Prefill of short prompts by CUDA graphs, with eager passes in place of captured ones."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests import devices

from octavo.hardware import Capabilities
from octavo.infer import prefill_graphs
from octavo.infer.engine import Engine
from octavo.infer.prefill_graphs import PrefillGraphs, Shape
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling

if TYPE_CHECKING:
    from tests.infer.conftest import Family

GREEDY = Sampling(temperature=0.0, max_new_tokens=9)
PROMPT = tuple(range(40, 80))
ADAPTERS = (None, "blocks", "embeddings")
INPUTS = [[0] * 8 + [1, 0, 0]]  # the inputs of a prompt of one token
PROMPT_LENGTHS = (1, 3, 4, 5, 8, 15, 16, 17, 30)  # around the lengths of shapes, and over the largest


class EagerGraph:
    """Runs eagerly what a graph would replay, and once when it is made, as capturing does; lists the runs."""

    runs: list[Shape]
    graph = SimpleNamespace(pool=lambda: None)

    def __init__(self, owner: PrefillGraphs, inputs: Sequence[Sequence[int]], shape: Shape, pool: Any) -> None:
        self.owner, self.shape = weakref.ref(owner), shape  # a graph refers to its tensors only
        owner.logits(torch.tensor(inputs))

    def run(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        assert [len(row) for row in inputs] == [self.shape.length + 3] * self.shape.rows
        self.runs.append(self.shape)
        owner = self.owner()
        assert owner is not None
        return owner.logits(torch.tensor(inputs))


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Replaces graphs by `EagerGraph`; the shapes that were run."""
    shapes: list[Shape] = []
    monkeypatch.setattr(EagerGraph, "runs", shapes, raising=False)
    monkeypatch.setattr(prefill_graphs, "_PrefillGraph", EagerGraph)
    monkeypatch.setattr(prefill_graphs, "kernels_run_on", lambda _: True)
    monkeypatch.setattr(prefill_graphs, "LENGTHS", (4, 8, 16, 64))  # the last is longer than a slot
    monkeypatch.setattr(prefill_graphs, "MAX_TOKENS", 32)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return shapes


def serving_engine(family: Family, **limits: Any) -> Engine:
    engine = family.engine(Limits(**{"slots": 4, "max_len": 48, "chunk": 16, **limits}))
    for name in ADAPTERS[1:]:
        engine.load_adapter(name, family.adapter(name))
    return warmed_up(engine)


def warmed_up(engine: Engine) -> Engine:
    for task in engine.warmup_tasks():
        task()
    return engine


def test_answers_are_those_of_each_request_alone(family: Family, runs: list[Shape]) -> None:
    requests = [
        Request((*PROMPT[: length - 1], 3 + n), GREEDY, adapter=ADAPTERS[n % 3])
        for n, length in enumerate(PROMPT_LENGTHS)
    ]
    engine = serving_engine(family)
    streams = [engine.submit(request) for request in requests]
    family.run_out(engine)
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]
    assert runs == [(4, 8), (2, 16), (1, 16)]  # and two prompts in chunks


@pytest.mark.parametrize(("slots", "rows"), [(1, {1}), (2, {1, 4}), (4, {1, 4}), (5, {1, 4, 8})])
def test_graphs_have_as_many_rows_as_are_useful_for_the_slots(llama: Family, slots: int, rows: set[int]) -> None:
    engine = warmed_up(llama.engine(Limits(slots=slots, max_len=48)))
    assert {shape.rows for shape in engine.scheduler.prefiller.graphs.shapes if shape.length == 4} == rows


def test_attention_ignores_the_previous_content_of_a_slot(llama: Family) -> None:
    long, short = Request(PROMPT[:16], GREEDY), Request(PROMPT[20:23], GREEDY)
    engine = serving_engine(llama, slots=1)
    for request in (long, short, long):
        stream = engine.submit(request)
        llama.run_out(engine)
        assert llama.answer(stream) == llama.alone(request)


def test_prompts_with_logprobs_are_computed_in_chunks(llama: Family, runs: list[Shape]) -> None:
    engine = serving_engine(llama)
    stream = engine.submit(Request(PROMPT[:9], GREEDY, logprobs=0, prompt_logprobs=True))
    llama.run_out(engine)
    assert len(stream.prompt) == 9
    assert runs == []


def test_an_engine_that_was_not_warmed_up_captures_nothing(llama: Family, runs: list[Shape]) -> None:
    engine = llama.engine(Limits(slots=2, max_len=48))
    request = Request(PROMPT[:7], GREEDY)
    stream = engine.submit(request)
    llama.run_out(engine)
    assert llama.answer(stream) == llama.alone(request)
    assert runs == []


def test_loading_an_adapter_captures_the_graphs_again(llama: Family, runs: list[Shape]) -> None:
    engine = warmed_up(llama.engine(Limits(slots=2, max_len=48)))
    requests = [Request(PROMPT[:7], GREEDY, adapter=name) for name in (None, "blocks")]
    first = engine.submit(requests[0])
    llama.run_out(engine)
    before = engine.scheduler.prefiller.graphs.graph(Shape(1, 8), INPUTS)
    engine.load_adapter("blocks", llama.adapter("blocks"))
    streams = [first, *(engine.submit(request) for request in requests)]
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(r) for r in (requests[0], *requests)]
    assert engine.scheduler.prefiller.graphs.graph(Shape(1, 8), INPUTS) is not before
    assert runs == [(1, 8), (4, 8)]


def test_capturing_a_graph_does_not_change_running_requests(llama: Family) -> None:
    """Capturing runs once eagerly and writes to a slot: that of the prompt that follows."""
    engine = warmed_up(llama.engine(Limits(slots=3, max_len=48)))
    running = Request(PROMPT[:8], GREEDY)
    streams = [engine.submit(running)]
    for _ in range(3):
        engine.step()
    engine.load_adapter("blocks", llama.adapter("blocks"))  # which replaces the tensors that the graphs read
    later = Request(PROMPT[20:27], GREEDY, adapter="blocks")
    streams.append(engine.submit(later))
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(running), llama.alone(later)]


@pytest.mark.parametrize("position", [2, 4], ids=["inside", "last"])
def test_nan_fails_its_request_alone(llama: Family, runs: list[Shape], position: int) -> None:
    """Even if other prompts are in the same graph, and the slot is used again."""
    engine = serving_engine(llama)
    bad, other, after = (Request(ids, GREEDY) for ids in (PROMPT[:5], PROMPT[10:16], PROMPT[20:26]))
    embedding = engine.model.embed.matrix.parts["weight"]
    row = embedding[PROMPT[position]].clone()
    embedding[PROMPT[position]] = torch.nan
    streams = [engine.submit(request) for request in (bad, other)]
    llama.run_out(engine)
    embedding[PROMPT[position]] = row
    streams.append(engine.submit(after))
    llama.run_out(engine)
    assert "not finite" in str(streams[0].error)
    assert [llama.answer(stream) for stream in streams[1:]] == [llama.alone(other), llama.alone(after)]
    assert engine.stats().failed_total == 1
    assert runs == [(4, 8), (1, 8)]


def test_waiting_prompts_share_a_graph_up_to_its_limits(llama: Family, runs: list[Shape]) -> None:
    engine = serving_engine(llama, slots=9)
    lengths = (2, 3, 4, 2, 3, 9, 8, 20, 1)
    requests = [Request(PROMPT[n : n + length], GREEDY) for n, length in enumerate(lengths)]
    streams = [engine.submit(request) for request in requests]
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(request) for request in requests]
    # Five in a graph of eight rows, which the sixth prompt is too long for. The one of 20 is computed in chunks.
    assert runs == [(8, 4), (2, 16), (1, 4)]


def test_padding_of_a_prompt_is_finite(llama: Family) -> None:
    """Padding repeats a token of the prompt: attention weights of 0 times NaN would be NaN."""
    engine = serving_engine(llama)
    engine.model.embed.matrix.parts["weight"][0] = torch.inf
    request = Request(PROMPT[:5], GREEDY)
    stream = engine.submit(request)
    llama.run_out(engine)
    assert llama.answer(stream) == llama.alone(request)


def test_an_engine_without_references_is_freed_at_once(llama: Family) -> None:
    """Its cache may have gigabytes: a reference cycle would delay freeing them until a garbage collection."""
    engine = serving_engine(llama)
    engine.submit(Request(PROMPT[:5], GREEDY))
    llama.run_out(engine)
    scheduler = engine.scheduler
    parts = (scheduler, scheduler.prefiller.graphs, scheduler.decoder, scheduler.slots)
    references = [weakref.ref(part) for part in parts]
    del scheduler, parts
    gc.disable()
    try:
        del engine
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize(("device", "used"), [(devices.A100, True), (devices.T4, False)], ids=["A100", "T4"])
def test_a_gpu_that_runs_references_for_prompts_has_no_graphs(
    device: Capabilities, used: bool, family: Family, monkeypatch: pytest.MonkeyPatch, runs: list[Shape]
) -> None:
    """These references read numbers in the GPU's memory, which no graph can capture."""
    monkeypatch.setattr(prefill_graphs, "capabilities_of", lambda _: device)
    engine, request = serving_engine(family), Request(PROMPT[:7], GREEDY, adapter="blocks")
    runs.clear()
    stream = engine.submit(request)
    family.run_out(engine)
    assert family.answer(stream) == family.alone(request)
    assert bool(runs) == used
