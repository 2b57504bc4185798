"""The loss of a batch: only labelled positions go through the head; documents and padding do not affect each other."""

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

VOCAB_SIZE, SEQ_LEN, CPU = 61, 9, torch.device("cpu")
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> tuple[Any, Decoder]:
    theirs, ours = models_of(CONFIGS[request.param])
    adapters.create_(ours, AdapterPlan(LoraSpec(rank=2, alpha=4)), seed=0)
    return theirs, ours


def batch_of(*, packed: bool, labelled: float = 0.5) -> Batch:
    """Two rows, the second with padding; `labelled` is the fraction of tokens with a label."""
    torch.manual_seed(0)
    document = torch.tensor([[0] * 9, [1] * 6 + [-1] * 3])
    positions = torch.arange(SEQ_LEN).repeat(2, 1)
    if packed:
        document = torch.tensor([[0] * 4 + [1] * 5, [2] * 5 + [3, -1, -1, -1]])
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 0, 1, 2]])
    ids = torch.randint(VOCAB_SIZE, (2, SEQ_LEN))
    labels = torch.randint(VOCAB_SIZE, (2, SEQ_LEN))
    labels[(torch.rand(2, SEQ_LEN) >= labelled) | (document < 0)] = IGNORE_INDEX
    return Batch(ids, labels, positions, document, (("f:1",),) * len(ids), epoch=0, index=0)


@torch.no_grad()
def plain_loss(theirs: Any, batch: Batch) -> Tensor:
    """The sum of transformers' losses of the single documents."""
    total = torch.zeros(())
    for number in range(int(batch.piece.max()) + 1):
        document = batch.piece == number
        logits = theirs(batch.ids[document][None]).logits[0]  # (T, V)
        total += F.cross_entropy(logits, batch.labels[document], reduction="sum", ignore_index=IGNORE_INDEX)
    return total


one_document_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["one document per row", "packed"])


@one_document_and_packed
@pytest.mark.parametrize("labelled", [0.5, 1.0])
def test_the_loss_is_the_sum_of_transformers_losses_of_the_documents(
    models: tuple[Any, Decoder], packed: bool, labelled: float
) -> None:
    batch = batch_of(packed=packed, labelled=labelled)
    expected = plain_loss(models[0], batch)
    torch.testing.assert_close(batch_loss(models[1], batch).detach(), expected, rtol=1e-5, atol=0)
    assert (inputs_of(batch, CPU).documents is not None) == packed


def test_only_labelled_positions_go_through_the_head(
    models: tuple[Any, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    reference = ops_loss.cross_entropy_

    def recording_cross_entropy(logits: Tensor, labels: Tensor, *, gradient: bool, softcap: float | None) -> Tensor:
        rows.append(len(logits))
        assert (labels >= 0).all()
        return reference(logits, labels, gradient=gradient, softcap=softcap)

    monkeypatch.setattr(loss, "cross_entropy_", recording_cross_entropy)
    batch = batch_of(packed=True)
    batch_loss(models[1], batch)
    assert 0 < batch.trained_tokens < 2 * SEQ_LEN
    assert sum(rows) == batch.trained_tokens


def test_no_positions_are_gathered_if_all_have_labels() -> None:
    batch = batch_of(packed=False)
    all_labelled = replace(batch, labels=batch.ids, piece=torch.zeros_like(batch.ids))
    assert inputs_of(all_labelled, CPU).labelled is None
    assert inputs_of(batch, CPU).labelled is not None


@one_document_and_packed
def test_the_ids_of_padding_do_not_change_the_loss(models: tuple[Any, Decoder], packed: bool) -> None:
    batch = batch_of(packed=packed)
    other = replace(batch, ids=torch.where(batch.piece < 0, 7, batch.ids))
    assert not torch.equal(batch.ids, other.ids)
    assert torch.equal(batch_loss(models[1], batch), batch_loss(models[1], other))


@one_document_and_packed
def test_ignored_positions_that_go_through_the_head_do_not_change_the_loss(
    models: tuple[Any, Decoder], packed: bool
) -> None:
    # As in a step with CUDA graphs, whose shapes cannot depend on the data.
    batch = batch_of(packed=packed)
    inputs = inputs_of(batch, CPU)
    every = replace(inputs, labels=batch.labels.flatten(), labelled=None)
    parameters = list(adapters.trained(models[1]).values())
    options = ForwardOptions(), ForwardOptions(Save.INPUT)
    gathered, full = (
        next_token_loss(models[1], *arguments) for arguments in zip((inputs, every), options, strict=True)
    )
    torch.testing.assert_close(gathered, full)
    expected = torch.autograd.grad(full, parameters)
    for gradient, wanted in zip(torch.autograd.grad(gathered, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_label_weights_scale_the_loss_of_their_labels(models: tuple[Any, Decoder]) -> None:
    batch = batch_of(packed=True)
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0))
    weighted = replace(batch, weights=weights)
    single = [
        batch_loss(models[1], replace(batch, labels=torch.where(chosen, batch.labels, IGNORE_INDEX))).item()
        for chosen in (weights < 0.5, weights >= 0.5)
    ]
    halves = replace(batch, weights=torch.where(weights < 0.5, 0.25, 3.0))
    assert batch_loss(models[1], halves).item() == pytest.approx(0.25 * single[0] + 3 * single[1], rel=1e-5)
    counted = batch.labels != IGNORE_INDEX
    assert weighted.label_weight == pytest.approx(float(weights[counted].sum()))
    assert batch.label_weight == batch.trained_tokens == int(counted.sum())


def test_a_batch_without_labels_has_a_loss_of_zero(models: tuple[Any, Decoder]) -> None:
    batch = batch_of(packed=False, labelled=0.0)
    assert batch.trained_tokens == 0
    total = batch_loss(models[1], batch)
    assert total.item() == 0
    assert not any(
        gradient.any() for gradient in torch.autograd.grad(total, list(adapters.trained(models[1]).values()))
    )
