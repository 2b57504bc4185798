"""EagerStep, PlannedStep, micro-batches, and the number of document slots in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.objective import Inputs, batch_loss, inputs_of, next_token_loss
from octavo.ops.attention import find_documents
from octavo.train.memory import MemoryPlan
from octavo.train.step import EagerStep, GraphStep, PlannedStep, _document_slots, _Graph, micro_batches

VOCAB_SIZE, SEQ_LEN, CPU = 61, 12, torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def base(models_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    _, model = models_of(CONFIG)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=2, alpha=4, dropout=0.3)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def model(base: Decoder) -> Decoder:
    return copy.deepcopy(base)


def batch_of(rows: int = 5, *, labelled: bool = True) -> Batch:
    """Rows of one, two and three documents, with padding; about half of the tokens have a label."""
    torch.manual_seed(0)
    cuts = [[12], [5, 7], [4, 3, 2], [9], [1, 11]]
    document, positions = torch.full((rows, SEQ_LEN), -1), torch.zeros(rows, SEQ_LEN, dtype=torch.int64)
    for row in range(rows):
        start = 0
        for number, length in enumerate(cuts[row]):
            document[row, start : start + length] = 10 * row + number
            positions[row, start : start + length] = torch.arange(length)
            start += length
    ids, labels = torch.randint(VOCAB_SIZE, (2, rows, SEQ_LEN))
    labels[(torch.rand(rows, SEQ_LEN) < 0.5) | (document < 0) | torch.tensor(not labelled)] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=0)


def gradients(model: Decoder) -> list[Tensor | None]:
    return [parameter.grad for parameter in adapters.trained(model).values()]


@pytest.mark.parametrize("save", list(Save))
def test_an_eager_step_adds_the_gradients_of_the_scaled_loss(model: Decoder, save: Save) -> None:
    batch, parameters = batch_of(), list(adapters.trained(model).values())
    expected_loss = batch_loss(model, batch)
    expected = torch.autograd.grad(expected_loss, parameters)
    step = EagerStep(model, ForwardOptions(save))
    loss = step(batch, 0.25)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss.detach())  # in nats, without the scale
    step(batch, 0.5)  # adds to the gradients of the first call
    for actual, gradient in zip(gradients(model), expected, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, 0.75 * gradient, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_does_not_change_gradients(model: Decoder) -> None:
    batch = batch_of(labelled=False)
    assert batch.trained_tokens == 0
    assert EagerStep(model)(batch, 1.0).item() == 0
    assert gradients(model) == [None] * len(gradients(model))


def test_an_eager_step_stores_nothing_between_calls(model: Decoder) -> None:
    step = EagerStep(model)
    assert step.device == CPU
    before = dict(vars(step))
    step(batch_of(), 1.0)
    step.release()
    assert vars(step) == before


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_micro_batches_sum_to_the_loss_and_gradients_of_the_batch(model: Decoder, rows: int) -> None:
    batch = batch_of()
    split = list(micro_batches(batch, rows))
    assert max(len(micro_batch.ids) for micro_batch in split) == min(rows, 5)
    for name in ("ids", "labels", "positions", "piece"):
        assert torch.equal(torch.cat([getattr(micro_batch, name) for micro_batch in split]), getattr(batch, name))
    assert sum(micro_batch.trained_tokens for micro_batch in split) == batch.trained_tokens
    assert all(micro_batch.trained_tokens == int((micro_batch.labels != IGNORE_INDEX).sum()) for micro_batch in split)
    step, parameters = EagerStep(model, ForwardOptions(Save.INPUT)), list(adapters.trained(model).values())
    expected = batch_loss(model, batch)
    total = torch.stack([step(micro_batch, 1.0) for micro_batch in split]).sum()
    torch.testing.assert_close(total, expected.detach())
    for actual, gradient in zip(gradients(model), torch.autograd.grad(expected, parameters), strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


def test_reduce_memory_selects_the_next_smaller_plan(model: Decoder) -> None:
    calls: list[Any] = []

    def recording_loss(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        calls.append((options.save, len(inputs.ids)))
        return next_token_loss(model, inputs, options)

    plans = [
        MemoryPlan((save,) * 2, rows, 2**30, None) for save, rows in ((Save.ALL, 5), (Save.INPUT, 2), (Save.INPUT, 1))
    ]
    warnings: list[str] = []
    following = dict(zip([plan.rows for plan in plans], [*plans[1:], None], strict=True))
    step = PlannedStep(
        model,
        plans[0],
        graphs=False,
        cheaper=lambda plan: following[plan.rows],
        warn=warnings.append,
        objective=recording_loss,
    )
    batch, parameters = batch_of(), list(adapters.trained(model).values())
    expected_loss = batch_loss(model, batch)
    expected = torch.autograd.grad(expected_loss, parameters)
    for number, plan in enumerate(plans):
        assert step.plan == plan
        assert len(warnings) == number
        model.zero_grad()
        calls.clear()
        losses = [step(micro_batch, 0.5) for micro_batch in micro_batches(batch, step.rows)]
        torch.testing.assert_close(torch.stack(losses).sum(), expected_loss.detach())
        assert calls == [(plan.save, min(plan.rows, 5 - start)) for start in range(0, 5, plan.rows)]
        for actual, gradient in zip(gradients(model), expected, strict=True):
            assert actual is not None
            torch.testing.assert_close(actual, 0.5 * gradient, rtol=1e-4, atol=1e-5)
        assert step.reduce_memory() == (number < 2)
    assert "micro-batches of 2 sequences" in warnings[0]


def test_without_a_cheaper_plan_the_run_continues_without_graphs(model: Decoder) -> None:
    warnings: list[str] = []
    plan = MemoryPlan((Save.INPUT,) * 2, 1, 2**30, None)
    step = PlannedStep(model, plan, graphs=True, cheaper=lambda _: None, warn=warnings.append)
    assert isinstance(step._make(), GraphStep)
    assert step.reduce_memory()
    assert "without CUDA graphs" in warnings[0]
    assert isinstance(step._make(), EagerStep)
    assert not step.reduce_memory()
    assert step.plan == plan


def test_rows_of_one_document_need_no_document_slots() -> None:
    assert _document_slots(find_documents(torch.tensor([[0, 0], [1, -1]]), CPU)) == 0


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), missing=st.integers(0, 200), more=st.integers(0, 999)
)
def test_document_slots_hold_the_documents_and_are_few_sizes_up_to_the_most_documents(
    counts: list[int], missing: int, more: int
) -> None:
    """A slot without a document takes memory in FlashAttention's backward; each size is a graph."""
    document = torch.stack([torch.arange(40) * count // 40 for count in counts])
    documents = find_documents(document, CPU)
    slots = _document_slots(documents, missing=missing)
    if documents is None:
        assert slots == 0
        return
    number = len(documents.offsets) - 1 + missing
    assert number == sum(counts) + missing <= slots
    assert slots == 64 or slots < 2 * number
    assert slots & (slots - 1) == 0
    most = number + more
    assert _document_slots(documents, most, missing=missing) == min(slots, most)
    assert _document_slots(documents, number - 1, missing=missing) == number  # of data with more than was said


def test_a_graph_has_no_more_slots_than_its_plan_has_documents(model: Decoder) -> None:
    plan = MemoryPlan((Save.INPUT,) * 2, 3, 2**30, None)
    for documents, most in ((5, 15), (1, None)):
        step = PlannedStep(
            model, plan, graphs=True, cheaper=lambda _: None, warn=lambda _: None, documents=documents
        )._make()
        assert isinstance(step, GraphStep)
        assert step.most_documents == most


@pytest.mark.parametrize("limited", [False, True])
def test_under_a_limit_a_graph_reserves_the_forecast_of_its_blocks(model: Decoder, limited: bool) -> None:
    plan = MemoryPlan((Save.INPUT,) * 2, 3, 2**30, None, large_bytes=2**28)
    step = PlannedStep(model, plan, graphs=True, cheaper=lambda _: None, warn=lambda _: None, limited=limited)._make()
    assert isinstance(step, GraphStep)
    assert step.reserved_bytes == (2**28 if limited else 0)


def test_counting_dropout_masks_derives_nothing_from_the_documents_of_the_graph(model: Decoder) -> None:
    """A replay would read what was derived from the documents before the capture."""
    inputs = inputs_of(batch_of(), CPU)
    assert inputs.documents is not None
    graph: Any = SimpleNamespace(loss_scale=torch.zeros(()))
    assert _Graph._count_masks(graph, EagerStep(model.train()), inputs) > 0
    assert set(vars(inputs.documents)) == {"number", "offsets", "longest"}


def test_the_kind_of_a_micro_batch_has_the_slots_of_its_graph(model: Decoder) -> None:
    for most, slots in ((None, 64), (12, 12)):
        seen: set[Any] = set()
        GraphStep(EagerStep(model, rows=5), seen, most)(
            batch_of(), 1.0
        )  # of 11 documents, with the padding; it is eager
        assert seen == {(slots, False)}
