"""Computing again in backward must really act: blocks run twice, little is kept, and no gradient changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig

from octavo.layers.lora import LoraSpec
from octavo.models import Model
from octavo.objective import Through
from octavo.ops.loss import frozen_cross_entropy_sum
from octavo.store import adapter
from octavo.store.adapter import AdapterPlan
from octavo.train.memory import keep_all, policy, recompute

VOCABULARY, LENGTH, LAYERS = 61, 48, 4
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, rotary_dim=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, twins_of: Callable[[Any], tuple[Any, Model]]) -> Model:
    _, ours = twins_of(CONFIGS[request.param])
    adapter.create_(ours, AdapterPlan(LoraSpec(rank=4, alpha=8, dropout=0.3)), seed=0)
    for parameter in adapter.trained(ours).values():
        nn.init.normal_(parameter, std=0.1)
    return ours.train()


def loss_of(model: Model, through: Through) -> Tensor:
    torch.manual_seed(5)  # of the dropout
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(VOCABULARY, (2, LENGTH), generator=generator) for _ in range(2))
    document = torch.arange(LENGTH).expand(2, LENGTH) // 20  # packed, so that there is a mask
    hidden = model.hidden(ids, document=document, through=through)
    return frozen_cross_entropy_sum(hidden.flatten(0, 1), labels.flatten(), model.head, vocabulary=VOCABULARY)


def gradients(model: Model, through: Through) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss_of(model, through))
    trained = adapter.trained(model)
    found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    assert found.keys() == trained.keys()
    return found


def test_gradients_are_the_same_to_the_bit_with_dropout_on(model: Model) -> None:
    kept, again = gradients(model, keep_all), gradients(model, recompute)
    assert all(torch.equal(gradient, again[name]) for name, gradient in kept.items())
    assert all(gradient.any() for gradient in kept.values())


def test_dropout_is_on_in_what_is_compared(model: Model) -> None:
    quiet = copy.deepcopy(model).eval()
    assert not torch.equal(loss_of(model, keep_all), loss_of(quiet, keep_all))


def test_every_block_runs_once_more_in_backward(model: Model) -> None:
    calls: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda block, _, i=i: calls.append(i)) for i, block in enumerate(model.blocks)
    ]
    loss = loss_of(model, recompute)
    assert calls == [*range(LAYERS)]
    torch.autograd.backward(loss)
    assert calls == [*range(LAYERS), *reversed(range(LAYERS))]
    calls.clear()
    torch.autograd.backward(loss_of(model, keep_all))
    assert calls == [*range(LAYERS)]
    for hook in hooks:
        hook.remove()


def kept_bytes(model: Model, through: Through) -> int:
    """Bytes of the storages that the graph holds for backward, the model's own apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, through)  # alive while counting, so that no address is used twice
    assert loss.requires_grad
    return sum(found.values())


def test_little_more_than_the_blocks_inputs_is_kept(model: Model) -> None:
    one_input_bytes = 2 * LENGTH * 32 * 4
    everything, little = kept_bytes(model, keep_all), kept_bytes(model, recompute)
    assert little < everything / 4
    # The inputs of the blocks and of the last norm, the head's gradient, rotary table and mask.
    assert LAYERS * one_input_bytes <= little < (LAYERS + 5) * one_input_bytes


@torch.no_grad()
def test_without_gradients_nothing_is_computed_again(model: Model) -> None:
    torch.testing.assert_close(loss_of(model, recompute), loss_of(model, keep_all), rtol=0, atol=0)


def test_the_policy_is_the_one_asked_for() -> None:
    assert policy(checkpointing=True) is recompute
    assert policy(checkpointing=False) is keep_all
