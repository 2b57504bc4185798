"""Several adapters in one batch: each request's answer is that of a model that wears its adapter alone."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.adapters import apply_
from octavo.errors import AdapterError
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request
from octavo.infer.sample import Sampling
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.store.peft import TENSORS, read

if TYPE_CHECKING:
    from tests.infer.conftest import Family

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
LONG = Sampling(temperature=0.0, max_new_tokens=500)
DRAWN = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=9, seed=5)
PROMPT = tuple(range(40, 61))
ADAPTERS = (None, "blocks", "tables")
MIXED = [
    Request((*PROMPT[:length], 7), sampling, adapter=adapter)
    for length, sampling in ((2, GREEDY), (17, DRAWN), (9, GREEDY))
    for adapter in ADAPTERS
]


def serving(family: Family, scheme: str = "none", **limits: Any) -> Engine:
    """An engine that holds the adapters "blocks" and "tables"."""
    engine = family.engine(Limits(**{"slots": 4, "max_len": 48, "chunk": 6, **limits}), family.model(scheme))
    for name in ("blocks", "tables"):
        engine.load_adapter(name, family.adapter(name))
    return engine


def on(engine: Engine) -> set[str]:
    """The adapters of which any layer of the model holds numbers."""
    layers = [
        module
        for module in engine.model.modules()
        if isinstance(module, FrozenLinear | FrozenEmbedding) and module.bank
    ]
    return {
        name
        for layer in layers
        for name, number in engine._routing.served.items()
        if layer.bank is not None and layer.bank.b[number].any()
    }


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*product(["llama", "tied", "gptj"], ["none", "int8", "nf4"]), ("qwen3", "int8"), ("neox", "int8")],
)
def test_each_row_goes_through_its_own_adapter(families: dict[str, Family], name: str, scheme: str) -> None:
    family = families[name]
    engine = serving(family, scheme)
    streams = [engine.submit(request) for request in MIXED]
    family.run_out(engine)
    wanted = [family.alone(request, scheme) for request in MIXED]
    assert [family.answer(stream) for stream in streams] == wanted
    assert len({answer.token_ids for answer in wanted}) == len(wanted)  # each adapter says something else


def test_log_probabilities_are_those_of_the_adapter(family: Family) -> None:
    """With a chunk for each token, and all at once beside requests of others."""
    scores = []
    for chunk, others in ((1, False), (48, True)):
        engine = serving(family, chunk=chunk)
        if others:
            for request in MIXED[:3]:
                engine.submit(request)
        streams = [
            engine.submit(Request(PROMPT, GREEDY, adapter=adapter, logprobs=0, prompt_logprobs=True))
            for adapter in ADAPTERS
        ]
        family.run_out(engine)
        told = [[*stream.prompt[1:], *stream] for stream in streams]
        scores.append(torch.tensor([[token.logprob for token in tokens] for tokens in told]))
    torch.testing.assert_close(scores[0], scores[1], rtol=0.0, atol=1e-4)
    assert ((scores[0][:, :20] - scores[0][:1, :20]).abs().amax(dim=1)[1:] > 0.1).all()


def test_only_other_tensors_make_what_was_recorded_useless(family: Family) -> None:
    engine = family.engine(Limits(slots=2, max_len=48))
    counts = [engine._routing.changes]

    def changed() -> bool:
        counts.append(engine._routing.changes)
        return counts[-1] != counts[-2]

    for name, wanted in (("blocks", True), ("tables", True)):
        engine.load_adapter(name, family.adapter(name))
        assert changed() is wanted
    engine.remove_adapter("tables")
    assert not changed()
    engine.load_adapter("tables", family.adapter("tables"))  # where it was before
    assert not changed()
    request = Request((*PROMPT[:11], 7), GREEDY, adapter="tables")
    stream = engine.submit(request)
    family.run_out(engine)
    assert family.answer(stream) == family.alone(request)
    engine.remove_adapter("blocks")
    assert not changed()
    engine.remove_adapter("tables")  # the banks go with the last
    assert changed()


def test_adapters_come_and_go_while_requests_run(family: Family) -> None:
    engine = family.engine(Limits(slots=4, max_len=48, chunk=6))
    requests = [Request((*PROMPT[:11], 7), GREEDY), Request((*PROMPT[:11], 8), GREEDY, adapter="blocks"), *MIXED]
    streams = [engine.submit(requests[0])]
    for _ in range(3):
        engine.step()
    engine.load_adapter("blocks", family.adapter("blocks"))
    streams.append(engine.submit(requests[1]))
    engine.step()
    engine.load_adapter("tables", family.adapter("tables"))
    assert engine.adapters().keys() == {"blocks", "tables"} == on(engine)
    streams += [engine.submit(request) for request in MIXED]
    last = engine.submit(Request(PROMPT[3:], LONG))
    streams.append(last)
    requests.append(last.request)
    while engine.adapters().keys() == {"blocks", "tables"}:
        engine.step()
        with suppress(AdapterError):  # until its last request is done
            engine.remove_adapter("tables")
    assert engine.stats().running
    assert engine.adapters().keys() == {"blocks"} == on(engine)
    family.run_out(engine)
    assert [family.answer(stream) for stream in streams] == [family.alone(request) for request in requests]


def test_an_adapter_in_use_stays(llama: Family) -> None:
    engine = serving(llama, slots=1)
    streams = [engine.submit(Request(PROMPT, GREEDY, adapter=name)) for name in ("blocks", "tables", "tables")]
    engine.step()
    with pytest.raises(AdapterError, match="1 requests are using the adapter 'blocks'"):
        engine.remove_adapter("blocks")
    with pytest.raises(AdapterError, match="2 requests are using the adapter 'tables'"):
        engine.remove_adapter("tables")
    llama.run_out(engine)
    for stream in streams:
        assert llama.answer(stream) == llama.alone(stream.request)
    engine.remove_adapter("blocks")
    for call in (lambda: engine.remove_adapter("blocks"), lambda: engine.submit(streams[0].request)):
        with pytest.raises(AdapterError, match="no adapter 'blocks' here") as caught:
            call()
        assert caught.value.hint == "There are: base, tables."


def test_a_draining_adapter_finishes_what_it_has_and_takes_no_more(llama: Family) -> None:
    engine = serving(llama, slots=1)
    streams = [engine.submit(Request(PROMPT, GREEDY, adapter="blocks")) for _ in range(2)]
    engine.step()
    assert engine.drain_adapter("blocks") is engine.drain_adapter("blocks")
    assert (list(engine.adapters()), list(engine.draining())) == (["tables"], ["blocks"])
    with pytest.raises(AdapterError, match="no adapter 'blocks' here"):
        engine.submit(streams[0].request)
    with pytest.raises(AdapterError, match="taken"):
        engine.load_adapter("blocks", llama.adapter("blocks"))
    with pytest.raises(AdapterError, match="2 requests are using"):
        engine.remove_adapter("blocks")
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(stream.request) for stream in streams]
    engine.remove_adapter("blocks")
    assert (engine.draining(), on(engine)) == ({}, {"tables"})
    with pytest.raises(AdapterError, match="no adapter 'blocks' here"):
        engine.drain_adapter("blocks")
    engine.load_adapter("blocks", llama.adapter("blocks"))
    assert engine.adapters().keys() == {"tables", "blocks"}


def test_nothing_of_one_adapter_is_reused_for_another_nor_for_its_successor(llama: Family) -> None:
    engine = serving(llama, slots=2)
    for count, name in enumerate(["tables", None, "blocks"], 1):
        stream = engine.submit(Request(PROMPT, GREEDY, adapter=name))
        llama.run_out(engine)
        assert llama.answer(stream) == llama.alone(stream.request)
        assert engine.stats().reused_tokens_total == 0
        assert engine.stats().finished_total == count
    engine.remove_adapter("blocks")
    engine.load_adapter("blocks", llama.adapter("tables"))
    stream = engine.submit(Request(PROMPT, GREEDY, adapter="blocks"))
    llama.run_out(engine)
    assert llama.answer(stream) == llama.alone(Request(PROMPT, GREEDY, adapter="tables"))
    assert engine.stats().reused_tokens_total == 0


def test_what_does_not_fit_is_refused_and_changes_nothing(families: dict[str, Family], tmp_path: Path) -> None:
    llama = families["llama"]
    engine = serving(llama)
    before = engine.adapters()
    for name, folder, match in (
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
        ("new", tmp_path, "holds no adapter"),
        ("base", llama.adapter("blocks"), "name 'base' is taken"),
        ("blocks", llama.adapter("tables"), "name 'blocks' is taken"),
    ):
        with pytest.raises(AdapterError, match=match) as caught:
            engine.load_adapter(name, folder)
        assert caught.value.hint
        assert engine.adapters() == before
        assert on(engine) == {"blocks", "tables"}
    with pytest.raises(AdapterError, match="no adapter 'new' here"):
        engine.submit(Request(PROMPT, GREEDY, adapter="new"))
    streams = [engine.submit(request) for request in MIXED[:3]]
    llama.run_out(engine)
    assert [llama.answer(stream) for stream in streams] == [llama.alone(request) for request in MIXED[:3]]


def broken(source: Path, target: Path, half: str, *, column: int | None = None) -> Path:
    """A copy of an adapter whose products overflow, in the first tensor of a kind or in one of its columns.

    One that holds NaN itself is refused when it is read.
    """
    folder = Path(shutil.copytree(source, target))
    tensors = load_file(folder / TENSORS)
    tensor = next(tensor for name, tensor in tensors.items() if half in name)
    tensor[:, slice(None) if column is None else column] = 3e38
    save_file(tensors, folder / TENSORS)
    (folder / "octavo.json").write_text("{}")  # without the hash of what was there
    return folder


def finite(engine: Engine) -> bool:
    return all(bool(store.isfinite().all()) for store in (engine._slots.cache.keys, engine._slots.cache.values))


def test_an_adapter_that_is_not_finite_hurts_no_one_else(family: Family, tmp_path: Path) -> None:
    """Its NaN must neither stop the others nor stay in a slot, where even a masked place would spoil a sum."""
    engine = serving(family, chunk=8)
    engine.load_adapter("broken", broken(family.adapter("blocks"), tmp_path / "broken", "lora_A"))
    bad = [
        Request(PROMPT, GREEDY, adapter="broken"),
        Request(PROMPT[:3], DRAWN, adapter="broken"),
        Request(PROMPT, GREEDY, adapter="broken", logprobs=1, prompt_logprobs=True),
    ]
    streams = [engine.submit(request) for request in (MIXED[0], bad[0], MIXED[1], bad[1], bad[2], *MIXED[2:])]
    while not streams[1].error:
        engine.step()
        assert finite(engine)
    assert engine.stats().steps_total == 1  # with the first of its three chunks
    family.run_out(engine)
    for stream in streams:
        found = family.answer(stream)
        if stream.request.adapter == "broken":
            assert (found.finish_reason, found.token_ids) == ("error", ())
            assert "not finite" in stream.error
        else:
            assert found == family.alone(stream.request)
    assert engine.stats().failed_total == 3
    assert finite(engine)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_ceases_to_be_finite_in_the_midst_of_an_answer_ends_alone(
    family: Family, tmp_path: Path, ahead: bool
) -> None:
    """The adapter's row of one token is NaN, and the answer comes to that token: in each of the slots."""
    whole = family.alone(MIXED[2]).token_ids
    place = next(n for n, token in enumerate(whole) if n > 2 and token not in (*MIXED[2].prompt, *whole[:n]))
    folder = broken(family.adapter("tables"), tmp_path / "broken", "lora_embedding_A", column=whole[place])
    for slot in range(3):
        engine = serving(family, slots=3)
        engine._decoder.runs_ahead = ahead
        engine.load_adapter("broken", folder)
        requests = [MIXED[0], MIXED[6], MIXED[3], MIXED[7]]
        requests.insert(slot, Request(MIXED[2].prompt, GREEDY, adapter="broken"))
        streams = [engine.submit(request) for request in requests]
        while engine.stats().running or engine.stats().waiting:
            engine.step()
            assert finite(engine) or engine._in_flight
        assert finite(engine)
        bad = streams.pop(slot)
        found = family.answer(bad)
        assert (found.token_ids, found.finish_reason) == (whole[: place + 1], "error")
        assert "not finite" in bad.error
        assert [family.answer(stream) for stream in streams] == [family.alone(stream.request) for stream in streams]


def test_a_model_that_wears_an_adapter_and_could_train_on_is_served_as_it_is(family: Family) -> None:
    model = family.model()
    apply_(model, read(family.adapter("norms")))
    engine = family.engine(Limits(slots=2, max_len=48, chunk=6), model)
    engine.load_adapter("blocks", family.adapter("blocks"))
    streams = [engine.submit(Request((*PROMPT[:9], number), GREEDY)) for number in range(4)]
    family.run_out(engine)
    for stream in streams:
        assert family.answer(stream) == family.alone(replace(stream.request, adapter="norms"))
    assert not engine._slots.cache.keys.requires_grad  # else each step would keep all that were before it
