"""Micro-steps: whose gradients they add, in what parts, and what a graph of a step makes room for."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
from octavo.objective import Inputs, batch_loss, next_token_loss
from octavo.ops.attention import find_documents
from octavo.train.memory import MemoryPlan
from octavo.train.step import EagerStep, PlannedStep, _document_slots, micro_batches

VOCABULARY, LENGTH, CPU = 61, 12, torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def base(twins_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    _, model = twins_of(CONFIG)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=2, alpha=4, dropout=0.3)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def model(base: Decoder) -> Decoder:
    return copy.deepcopy(base)


def batch_of(rows: int = 5, *, learned: bool = True) -> Batch:
    """Rows of one, two and three documents, with padding; about half is learned."""
    torch.manual_seed(0)
    cuts = [[12], [5, 7], [4, 3, 2], [9], [1, 11]]
    document, positions = torch.full((rows, LENGTH), -1), torch.zeros(rows, LENGTH, dtype=torch.int64)
    for row in range(rows):
        start = 0
        for number, length in enumerate(cuts[row]):
            document[row, start : start + length] = 10 * row + number
            positions[row, start : start + length] = torch.arange(length)
            start += length
    ids, labels = torch.randint(VOCABULARY, (2, rows, LENGTH))
    labels[(torch.rand(rows, LENGTH) < 0.5) | (document < 0) | torch.tensor(not learned)] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=0)


def gradients(model: Decoder) -> list[Tensor | None]:
    return [parameter.grad for parameter in adapters.trained(model).values()]


@pytest.mark.parametrize("save", list(Save))
def test_a_launched_step_adds_the_gradients_of_the_loss_times_the_seed(model: Decoder, save: Save) -> None:
    batch, parameters = batch_of(), list(adapters.trained(model).values())
    expected = batch_loss(model, batch)
    theirs = torch.autograd.grad(expected, parameters)
    step = EagerStep(model, ForwardOptions(save))
    loss = step(batch, 0.25)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())  # in nats, whatever the seed
    step(batch, 0.5)  # adds to what is there
    for mine, other in zip(gradients(model), theirs, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, 0.75 * other, rtol=1e-4, atol=1e-6)


def test_a_batch_with_nothing_to_learn_leaves_gradients_alone(model: Decoder) -> None:
    batch = batch_of(learned=False)
    assert batch.trained_tokens == 0
    assert EagerStep(model)(batch, 1.0).item() == 0
    assert gradients(model) == [None] * len(gradients(model))


def test_a_launched_step_holds_nothing_between_calls(model: Decoder) -> None:
    step = EagerStep(model)
    assert step.device == CPU
    before = dict(vars(step))
    step(batch_of(), 1.0)
    step.release()
    assert vars(step) == before


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_parts_are_the_batch_and_their_losses_and_gradients_add_up(model: Decoder, rows: int) -> None:
    batch = batch_of()
    parts = list(micro_batches(batch, rows))
    assert max(len(part.ids) for part in parts) == min(rows, 5)
    for name in ("ids", "labels", "positions", "document"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum(part.trained_tokens for part in parts) == batch.trained_tokens
    assert all(part.trained_tokens == int((part.labels != IGNORE_INDEX).sum()) for part in parts)
    step, parameters = EagerStep(model, ForwardOptions(Save.INPUT)), list(adapters.trained(model).values())
    whole = batch_loss(model, batch)
    total = torch.stack([step(part, 1.0) for part in parts]).sum()
    torch.testing.assert_close(total, whole.detach())
    for mine, other in zip(gradients(model), torch.autograd.grad(whole, parameters), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_plan_that_does_not_fit_is_replaced_by_a_cheaper_one(model: Decoder) -> None:
    kept: list[Any] = []

    def noted(model: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
        kept.append((options.save, len(inputs.ids)))
        return next_token_loss(model, inputs, options)

    plans = [
        MemoryPlan((save,) * 2, rows, 2**30, None) for save, rows in ((Save.ALL, 5), (Save.INPUT, 2), (Save.INPUT, 1))
    ]
    told: list[str] = []
    following = dict(zip([plan.rows for plan in plans], [*plans[1:], None], strict=True))
    step = PlannedStep(
        model, plans[0], graphs=False, cheaper=lambda plan: following[plan.rows], warn=told.append, objective=noted
    )
    batch, parameters = batch_of(), list(adapters.trained(model).values())
    theirs = torch.autograd.grad(whole := batch_loss(model, batch), parameters)
    for number, plan in enumerate(plans):
        assert step.plan == plan
        assert len(told) == number
        model.zero_grad()
        kept.clear()
        losses = [step(part, 0.5) for part in micro_batches(batch, step.rows)]
        torch.testing.assert_close(torch.stack(losses).sum(), whole.detach())
        assert kept == [(plan.save, min(plan.rows, 5 - start)) for start in range(0, 5, plan.rows)]
        for mine, other in zip(gradients(model), theirs, strict=True):
            assert mine is not None
            torch.testing.assert_close(mine, 0.5 * other, rtol=1e-4, atol=1e-5)
        assert step.reduce_memory() == (number < 2)
    assert "micro-batches of 2 sequences" in told[0]


def test_rows_of_one_document_each_need_no_room() -> None:
    assert _document_slots(find_documents(torch.tensor([[0, 0], [1, -1]]), CPU)) == 0


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8), missing=st.integers(0, 200))
def test_room_is_one_of_few_sizes_and_twice_what_a_batch_needs(counts: list[int], missing: int) -> None:
    document = torch.stack([torch.arange(40) * count // 40 for count in counts])
    documents = find_documents(document, CPU)
    room = _document_slots(documents, missing=missing)
    if documents is None:
        assert room == 0
        return
    number = len(documents.offsets) - 1 + missing
    assert number == sum(counts) + missing
    assert room >= 2 * number
    assert room == 64 or room < 4 * (number + 1)
    assert room & (room - 1) == 0  # doubling, so that batches are of few kinds
