"""The engine over a cache that holds a part of a request only: the bits are those of a cache that holds all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.infer.test_batch_invariance import CONTEXT, TILE, Answer, answers_of, requests, serving_engine
from tests.infer.test_prefill_graphs import EagerGraph

from octavo.infer import prefill_graphs
from octavo.infer.prefill_graphs import Shape
from octavo.layers import kv_store
from octavo.ops import tiles

if TYPE_CHECKING:
    from tests.infer.conftest import Family

CHUNK = TILE  # a window of 6 positions: 10 are held, of up to 39


@pytest.fixture(autouse=True)
def tiles_of_four_tokens(prefill_tiles_of_one_token: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "PREFILL_TILE", TILE)


@pytest.fixture(params=["mistral", "gemma2", "gemma3"])
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def unbounded(family: Family, scheme: str, dtype: torch.dtype) -> list[Answer]:
    """The answers of each request alone, over a cache of all positions."""
    engine = serving_engine(family, scheme, dtype, slots=1, chunk=TILE)
    cache = engine.scheduler.slots.cache
    assert cache.held == [cache.max_len] * 2
    return [answers_of(engine, family, [request])[0] for request in requests()]


@pytest.mark.parametrize(
    ("family", "scheme", "dtype"),
    [("mistral", "int8", torch.bfloat16), ("gemma2", "none", torch.float32), ("gemma3", "none", torch.float32)],
    ids=str,
    indirect=["family"],
)
def test_batched_answers_have_the_bits_of_each_alone_in_a_cache_of_all_positions(
    family: Family, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, alone = requests(), unbounded(family, scheme, dtype)
    monkeypatch.setattr(kv_store, "CHUNK", CHUNK)
    for slots, chunk in ((1, TILE), (5, 3 * TILE), (3, 9 * TILE)):  # the last two are longer than CHUNK
        engine = serving_engine(family, scheme, dtype, slots=slots, chunk=chunk)
        assert min(engine.scheduler.slots.cache.held) == 6 + CHUNK
        assert answers_of(engine, family, batch) == alone
        assert answers_of(engine, family, batch[::-1]) == alone[::-1]
        again = [answers_of(engine, family, [request, request]) for request in batch]
        assert again == [[answer, answer] for answer in alone]
        # Answers of 6 tokens exceed CHUNK, but a prompt that is prefilled next to its copy is reused.
        assert slots == 1 or engine.stats().reused_tokens_total > 0


def test_prompts_prefilled_in_one_padded_pass_have_the_same_bits(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA graphs compute them, in shapes of several windows."""
    runs: list[Shape] = []
    monkeypatch.setattr(EagerGraph, "runs", runs, raising=False)
    monkeypatch.setattr(prefill_graphs, "_PrefillGraph", EagerGraph)
    monkeypatch.setattr(prefill_graphs, "kernels_run_on", lambda _: True)
    monkeypatch.setattr(prefill_graphs, "LENGTHS", (36,))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    answers = []
    for chunk in (kv_store.CHUNK, CHUNK):
        monkeypatch.setattr(kv_store, "CHUNK", chunk)
        engine = serving_engine(family, "none", torch.float32, slots=5)
        for task in engine.scheduler.prefiller.graphs.warmup_tasks():
            task()
        answers.append(answers_of(engine, family, requests()))
        assert min(engine.scheduler.slots.cache.held) == min(6 + chunk, CONTEXT)
    assert answers[0] == answers[1]
    assert max(shape.rows for shape in runs) > 1
