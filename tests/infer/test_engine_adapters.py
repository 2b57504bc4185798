"""Several adapters in one batch: each request's answer is that of a model with only its adapter applied."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch

from octavo.adapters import Adapter, apply_
from octavo.errors import AdapterError
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear

if TYPE_CHECKING:
    from tests.infer.conftest import Family

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
LONG = Sampling(temperature=0.0, max_new_tokens=500)
SAMPLED = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=9, seed=5)
PROMPT = tuple(range(40, 61))
ADAPTERS = (None, "blocks", "embeddings")
MIXED = [
    Request((*PROMPT[:length], 7), sampling, adapter=adapter)
    for length, sampling in ((2, GREEDY), (17, SAMPLED), (9, GREEDY))
    for adapter in ADAPTERS
]


def serving_engine(family: Family, scheme: str = "none", **limits: Any) -> Engine:
    """An engine with the adapters "blocks" and "embeddings"."""
    engine = family.engine(Limits(**{"slots": 4, "max_len": 48, "chunk": 6, **limits}), family.model(scheme))
    for name in ("blocks", "embeddings"):
        engine.load_adapter(name, family.adapter(name))
    return engine


def stored(engine: Engine) -> set[str]:
    """The adapters with values in the bank of any layer."""
    layers = [
        module
        for module in engine.model.modules()
        if isinstance(module, FrozenLinear | FrozenEmbedding) and module.bank
    ]
    return {
        name
        for layer in layers
        for name, adapter_id in engine.scheduler.adapters.ids.items()
        if layer.bank is not None and layer.bank.b[adapter_id].any()
    }


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *product(["llama", "tied", "gptj"], ["none", "int8", "nf4"]),
        *product(["qwen3", "smollm3", "olmo2", "gemma2", "gemma3", "neox", "gpt_neo", "gpt2"], ["int8"]),
    ],
)
def test_each_row_uses_the_adapter_of_its_request(families: dict[str, Family], name: str, scheme: str) -> None:
    family = families[name]
    engine = serving_engine(family, scheme)
    streams = [engine.submit(request) for request in MIXED]
    family.run_out(engine)
    expected = [family.alone(request, scheme) for request in MIXED]
    assert [family.answer(stream) for stream in streams] == expected
    assert len({answer.token_ids for answer in expected}) == len(expected)  # every adapter changes the answer


def test_log_probabilities_are_those_of_the_adapter(family: Family) -> None:
    """With chunks of one token, and with one chunk among requests for other adapters."""
    logprobs = []
    for chunk, others in ((1, False), (48, True)):
        engine = serving_engine(family, chunk=chunk)
        if others:
            for request in MIXED[:3]:
                engine.submit(request)
        streams = [
            engine.submit(Request(PROMPT, GREEDY, adapter=adapter, logprobs=0, prompt_logprobs=True))
            for adapter in ADAPTERS
        ]
        family.run_out(engine)
        answers = [[*stream.prompt[1:], *stream] for stream in streams]
        logprobs.append(torch.tensor([[token.logprob for token in tokens] for tokens in answers]))
    torch.testing.assert_close(logprobs[0], logprobs[1], rtol=0.0, atol=1e-4)
    assert ((logprobs[0][:, :20] - logprobs[0][:1, :20]).abs().amax(dim=1)[1:] > 0.1).all()


def test_only_replaced_tensors_invalidate_captured_graphs(family: Family) -> None:
    engine = family.engine(Limits(slots=2, max_len=48))
    counts = [engine.scheduler.adapters.changes]

    def changed() -> bool:
        counts.append(engine.scheduler.adapters.changes)
        return counts[-1] != counts[-2]

    for name, expected in (("blocks", True), ("embeddings", True)):
        engine.load_adapter(name, family.adapter(name))
        assert changed() is expected
    engine.remove_adapter("embeddings")
    assert not changed()
    engine.load_adapter("embeddings", family.adapter("embeddings"))  # with the same id
    assert not changed()
    request = Request((*PROMPT[:11], 7), GREEDY, adapter="embeddings")
    stream = engine.submit(request)
    family.run_out(engine)
    assert family.answer(stream) == family.alone(request)
    engine.remove_adapter("blocks")
    assert not changed()
    engine.remove_adapter("embeddings")  # the last one: the banks are freed
    assert changed()


def test_adapters_are_loaded_and_removed_while_requests_run(family: Family) -> None:
    engine = family.engine(Limits(slots=4, max_len=48, chunk=6))
    requests = [Request((*PROMPT[:11], 7), GREEDY), Request((*PROMPT[:11], 8), GREEDY, adapter="blocks"), *MIXED]
    streams = [engine.submit(requests[0])]
    for _ in range(3):
        engine.step()
    engine.load_adapter("blocks", family.adapter("blocks"))
    streams.append(engine.submit(requests[1]))
    engine.step()
    engine.load_adapter("embeddings", family.adapter("embeddings"))
    assert engine.adapters().keys() == {"blocks", "embeddings"} == stored(engine)
    streams += [engine.submit(request) for request in MIXED]
    last = engine.submit(Request(PROMPT[3:], LONG))
    streams.append(last)
    requests.append(last.request)
    while engine.adapters().keys() == {"blocks", "embeddings"}:
        engine.step()
        with suppress(AdapterError):  # until its last request is done
            engine.remove_adapter("embeddings")
    assert engine.stats().running
    assert engine.adapters().keys() == {"blocks"} == stored(engine)
    family.run_out(engine)
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]


def test_an_adapter_in_use_is_not_removed(llama: Family) -> None:
    engine = serving_engine(llama, slots=1)
    streams = [engine.submit(Request(PROMPT, GREEDY, adapter=name)) for name in ("blocks", "embeddings", "embeddings")]
    engine.step()
    with pytest.raises(AdapterError, match="1 requests are using the adapter 'blocks'"):
        engine.remove_adapter("blocks")
    with pytest.raises(AdapterError, match="2 requests are using the adapter 'embeddings'"):
        engine.remove_adapter("embeddings")
    llama.run_out(engine)
    for stream in streams:
        assert llama.answer(stream) == llama.alone(stream.request)
    engine.remove_adapter("blocks")
    for call in (lambda: engine.remove_adapter("blocks"), lambda: engine.submit(streams[0].request)):
        with pytest.raises(AdapterError, match="no adapter 'blocks' here") as caught:
            call()
        assert caught.value.hint == "There are: base, embeddings."


def test_a_draining_adapter_finishes_its_requests_and_accepts_no_more(llama: Family) -> None:
    engine = serving_engine(llama, slots=1)
    streams = [engine.submit(Request(PROMPT, GREEDY, adapter="blocks")) for _ in range(2)]
    engine.step()
    assert engine.drain_adapter("blocks") is engine.drain_adapter("blocks")
    assert (list(engine.adapters()), list(engine.draining())) == (["embeddings"], ["blocks"])
    with pytest.raises(AdapterError, match="no adapter 'blocks' here"):
        engine.submit(streams[0].request)
    with pytest.raises(AdapterError, match="taken"):
        engine.load_adapter("blocks", llama.adapter("blocks"))
    with pytest.raises(AdapterError, match="2 requests are using"):
        engine.remove_adapter("blocks")
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(stream.request) for stream in streams]
    engine.remove_adapter("blocks")
    assert (engine.draining(), stored(engine)) == ({}, {"embeddings"})
    with pytest.raises(AdapterError, match="no adapter 'blocks' here"):
        engine.drain_adapter("blocks")
    engine.load_adapter("blocks", llama.adapter("blocks"))
    assert engine.adapters().keys() == {"embeddings", "blocks"}


def test_cached_tokens_of_an_adapter_are_not_reused_for_another_nor_for_its_successor(llama: Family) -> None:
    engine = serving_engine(llama, slots=2)
    for count, name in enumerate(["embeddings", None, "blocks"], 1):
        stream = engine.submit(Request(PROMPT, GREEDY, adapter=name))
        llama.run_out(engine)
        assert llama.answer(stream) == llama.alone(stream.request)
        assert engine.stats().reused_tokens_total == 0
        assert engine.stats().finished_total == count
    engine.remove_adapter("blocks")
    engine.load_adapter("blocks", llama.adapter("embeddings"))
    stream = engine.submit(Request(PROMPT, GREEDY, adapter="blocks"))
    llama.run_out(engine)
    assert llama.answer(stream) == llama.alone(Request(PROMPT, GREEDY, adapter="embeddings"))
    assert engine.stats().reused_tokens_total == 0


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(families: dict[str, Family]) -> None:
    llama = families["llama"]
    engine = serving_engine(llama)
    before = engine.adapters()
    for name, adapter, match in (
        (
            "new",
            families["gptj"].adapter("blocks"),
            "does not belong to this model: there is no module for transformer",
        ),
        (
            "new",
            llama.adapter("norms"),
            r"adapter new has trained norms, biases or full weights \(model.*only LoRA can be served",
        ),
        ("base", llama.adapter("blocks"), "name 'base' is taken"),
        ("blocks", llama.adapter("embeddings"), "name 'blocks' is taken"),
    ):
        with pytest.raises(AdapterError, match=match) as caught:
            engine.load_adapter(name, adapter)
        assert caught.value.hint
        assert engine.adapters() == before
        assert stored(engine) == {"blocks", "embeddings"}
    with pytest.raises(AdapterError, match="no adapter 'new' here"):
        engine.submit(Request(PROMPT, GREEDY, adapter="new"))
    streams = [engine.submit(request) for request in MIXED[:3]]
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(request) for request in MIXED[:3]]


def broken(adapter: Adapter, *, embedding: bool = False, column: int | None = None) -> Adapter:
    """A copy of an adapter whose matmuls overflow, by the first A of a linear or an embedding, or a column of that."""
    name = next(name for name in adapter.lora if (name in adapter.embeddings) is embedding)
    a, b, scaling = adapter.lora[name]
    a = a.clone()
    a[:, slice(None) if column is None else column] = 3e38
    return replace(adapter, lora={**adapter.lora, name: (a, b, scaling)})


def finite(engine: Engine) -> bool:
    return all(
        bool(tensor.isfinite().all()) for group in engine.scheduler.slots.cache.groups.values() for tensor in group
    )


def test_an_adapter_with_nan_activations_does_not_change_other_requests(family: Family) -> None:
    """Its NaN must not stay in a slot either: attention multiplies masked values by 0."""
    engine = serving_engine(family, chunk=8)
    engine.load_adapter("broken", broken(family.adapter("blocks")))
    bad = [
        Request(PROMPT, GREEDY, adapter="broken"),
        Request(PROMPT[:3], SAMPLED, adapter="broken"),
        Request(PROMPT, GREEDY, adapter="broken", logprobs=1, prompt_logprobs=True),
    ]
    streams = [engine.submit(request) for request in (MIXED[0], bad[0], MIXED[1], bad[1], bad[2], *MIXED[2:])]
    while not streams[1].error:
        engine.step()
        assert finite(engine)
    assert engine.stats().steps_total == 1  # in the first of its three chunks
    family.run_out(engine)
    for stream in streams:
        actual = family.answer(stream)
        if stream.request.adapter == "broken":
            assert (actual.finish_reason, actual.token_ids) == ("error", ())
            assert "not finite" in stream.error
        else:
            assert actual == family.alone(stream.request)
    assert engine.stats().failed_total == 3
    assert finite(engine)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_answer_with_nan_after_some_tokens_fails_alone(family: Family, ahead: bool) -> None:
    """One token's row of the adapter overflows, and the answer contains that token: in each of the slots."""
    token_ids = family.alone(MIXED[2]).token_ids
    position = next(n for n, token in enumerate(token_ids) if n > 2 and token not in (*MIXED[2].prompt, *token_ids[:n]))
    adapter = broken(family.adapter("embeddings"), embedding=True, column=token_ids[position])
    for slot in range(3):
        engine = serving_engine(family, slots=3)
        engine.scheduler.decoder.launches_ahead = ahead
        engine.load_adapter("broken", adapter)
        requests = [MIXED[0], MIXED[6], MIXED[3], MIXED[7]]
        requests.insert(slot, Request(MIXED[2].prompt, GREEDY, adapter="broken"))
        streams = [engine.submit(request) for request in requests]
        while engine.stats().running or engine.stats().waiting:
            engine.step()
            assert finite(engine) or engine.scheduler._in_flight
        assert finite(engine)
        bad = streams.pop(slot)
        actual = family.answer(bad)
        assert (actual.token_ids, actual.finish_reason) == (token_ids[: position + 1], "error")
        assert "not finite" in bad.error
        assert [family.answer(stream) for stream in streams] == [family.alone(stream.request) for stream in streams]


def test_a_model_with_an_applied_trainable_adapter_is_served_with_it(family: Family) -> None:
    model = family.model()
    apply_(model, family.adapter("norms"))
    engine = family.engine(Limits(slots=2, max_len=48, chunk=6), model)
    engine.load_adapter("blocks", family.adapter("blocks"))
    streams = [engine.submit(Request((*PROMPT[:9], number), GREEDY)) for number in range(4)]
    family.run_out(engine)
    for stream in streams:
        assert family.answer(stream) == family.alone(replace(stream.request, adapter="norms"))
    assert not engine.scheduler.slots.cache.keys(
        0
    ).requires_grad  # else each step would keep the graphs of all previous ones
