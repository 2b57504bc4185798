"""The loss of a batch: what is learned goes through the head and nothing else, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPTJConfig, LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.fused import loss
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.objective import batch_loss, inputs_of, next_token_loss
from octavo.ops import loss as ops_loss

VOCABULARY, LENGTH, CPU = 61, 9, torch.device("cpu")
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def kernels(request: pytest.FixtureRequest, twins_of: Callable[[Any], tuple[Any, Decoder]]) -> tuple[Any, Decoder]:
    theirs, ours = twins_of(CONFIGS[request.param])
    adapters.create_(ours, AdapterPlan(LoraSpec(rank=2, alpha=4)), seed=0)
    return theirs, ours


def batch_of(*, packed: bool, learned: float = 0.5) -> Batch:
    """Two rows, the second with padding; about that share of the real positions is learned."""
    torch.manual_seed(0)
    document = torch.tensor([[0] * 9, [1] * 6 + [-1] * 3])
    positions = torch.arange(LENGTH).repeat(2, 1)
    if packed:
        document = torch.tensor([[0] * 4 + [1] * 5, [2] * 5 + [3, -1, -1, -1]])
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 0, 1, 2]])
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    labels = torch.randint(VOCABULARY, (2, LENGTH))
    labels[(torch.rand(2, LENGTH) >= learned) | (document < 0)] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=0)


@torch.no_grad()
def plain_loss(theirs: Any, batch: Batch) -> Tensor:
    """Each document by itself through transformers."""
    total = torch.zeros(())
    for number in range(int(batch.document.max()) + 1):
        own = batch.document == number
        logits = theirs(batch.ids[own][None]).logits[0]
        total += F.cross_entropy(logits, batch.labels[own], reduction="sum", ignore_index=IGNORE_INDEX)
    return total


both = pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed"])


@both
@pytest.mark.parametrize("learned", [0.5, 1.0])
def test_the_loss_is_that_of_transformers_on_each_document(
    kernels: tuple[Any, Decoder], packed: bool, learned: float
) -> None:
    batch = batch_of(packed=packed, learned=learned)
    expected = plain_loss(kernels[0], batch)
    torch.testing.assert_close(batch_loss(kernels[1], batch).detach(), expected, rtol=1e-5, atol=0)
    assert (inputs_of(batch, CPU).documents is not None) == packed


def test_only_what_is_learned_goes_through_the_head(
    kernels: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    definition = ops_loss.cross_entropy_

    def noted(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
        rows.append(len(logits))
        assert (labels >= 0).all()
        return definition(logits, labels, gradient=gradient)

    monkeypatch.setattr(loss, "cross_entropy_", noted)
    batch = batch_of(packed=True)
    batch_loss(kernels[1], batch)
    assert 0 < batch.trained_tokens < 2 * LENGTH
    assert sum(rows) == batch.trained_tokens


def test_where_all_is_learned_nothing_is_gathered() -> None:
    batch = batch_of(packed=False)
    whole = replace(batch, labels=batch.ids, document=torch.zeros_like(batch.ids))
    assert inputs_of(whole, CPU).labelled is None
    assert inputs_of(batch, CPU).labelled is not None


@both
def test_padding_and_what_it_holds_change_nothing(kernels: tuple[Any, Decoder], packed: bool) -> None:
    batch = batch_of(packed=packed)
    other = replace(batch, ids=torch.where(batch.document < 0, 7, batch.ids))
    assert not torch.equal(batch.ids, other.ids)
    assert torch.equal(batch_loss(kernels[1], batch), batch_loss(kernels[1], other))


@both
def test_positions_whose_labels_are_ignored_may_go_through_the_head_as_well(
    kernels: tuple[Any, Decoder], packed: bool
) -> None:
    # As they do in a recorded step, whose shapes cannot depend on the data.
    batch = batch_of(packed=packed)
    inputs = inputs_of(batch, CPU)
    every = replace(inputs, labels=batch.labels.flatten(), labelled=None)
    parameters = list(adapters.trained(kernels[1]).values())
    options = ForwardOptions(), ForwardOptions(Save.INPUT)
    one, other = (next_token_loss(kernels[1], *each) for each in zip((inputs, every), options, strict=True))
    torch.testing.assert_close(one, other)
    for mine, theirs in zip(torch.autograd.grad(one, parameters), torch.autograd.grad(other, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_weights_scale_the_loss_of_each_label(kernels: tuple[Any, Decoder]) -> None:
    batch = batch_of(packed=True)
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0))
    weighted = replace(batch, weights=weights)
    single = [
        batch_loss(kernels[1], replace(batch, labels=torch.where(chosen, batch.labels, IGNORE_INDEX))).item()
        for chosen in (weights < 0.5, weights >= 0.5)
    ]
    halves = replace(batch, weights=torch.where(weights < 0.5, 0.25, 3.0))
    assert batch_loss(kernels[1], halves).item() == pytest.approx(0.25 * single[0] + 3 * single[1], rel=1e-5)
    counted = batch.labels != IGNORE_INDEX
    assert weighted.label_weight == pytest.approx(float(weights[counted].sum()))
    assert batch.label_weight == batch.trained_tokens == int(counted.sum())


def test_nothing_learned_is_no_failure(kernels: tuple[Any, Decoder]) -> None:
    batch = batch_of(packed=False, learned=0.0)
    assert batch.trained_tokens == 0
    total = batch_loss(kernels[1], batch)
    assert total.item() == 0
    assert not any(
        gradient.any() for gradient in torch.autograd.grad(total, list(adapters.trained(kernels[1]).values()))
    )
