"""Which products are in 8 bits: what a trial finds, what it leaves alone, and what training with it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig

from octavo import adapters
from octavo.adapters import AdapterPlan
from octavo.data.loader import Batch
from octavo.layers.context import Save
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.objective import batch_loss
from octavo.ops import matmul8
from octavo.train.precision import (
    LIMIT,
    TOKENS,
    QuantError,
    keep_transposed_,
    layers,
    measure_8bit_error,
    set_precision_,
    transposed_bytes,
)

VOCABULARY, LENGTH, WIDTH = 61, 24, 64
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=96, n_layer=3, n_head=4, rotary_dim=8),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, twins_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    _, ours = twins_of(CONFIGS[request.param])
    adapters.create_(ours, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(ours).values():
        nn.init.normal_(parameter, std=0.1)
    return ours.train()


def batch_of(rows: int = 3, length: int = LENGTH) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(VOCABULARY, (2, rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, length)
    return Batch(ids, labels, positions, torch.zeros_like(ids), ("f:1",), labels.numel(), epoch=0, index=0)


def learned(model: Decoder, save: Save = Save.ALL) -> tuple[Tensor, Tensor]:
    """(loss, all gradients)."""
    model.zero_grad()
    loss = batch_loss(model, batch_of(), save=save)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in adapters.trained(model).values() if p.grad is not None])


def of(model: Decoder, kind: str) -> str:
    """The name of the second block's inner or outer product."""
    names = [name for name, _ in layers(model) if name.startswith("1.")]
    return names[0] if kind == "inner" else names[-1]


def test_the_products_of_all_blocks_can_be_in_eight_bits_and_the_head_is_not_one(model: Decoder) -> None:
    names = [name for name, _ in layers(model)]
    each = 3 if hasattr(model.blocks[0], "fc_out") else 4
    assert len(names) == len(set(names)) == 3 * each
    assert model.head not in [layer for _, layer in layers(model)]


def test_layers_that_a_card_could_not_read_stay_exact(twins_of: Callable[[Any], tuple[Any, Decoder]]) -> None:
    odd = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4
    )
    _, model = twins_of(odd)
    assert [name for name, _ in layers(model)] == ["0.qkv", "0.out", "0.gate_up"]  # 88 inputs of down are no 16s


def test_a_trial_tells_what_each_layer_costs_and_changes_no_gradient(model: Decoder) -> None:
    _, wanted = learned(model)
    model.zero_grad()
    costs = measure_8bit_error(model, batch_of())
    assert costs.keys() == {name for name, _ in layers(model)}
    assert all(0 < cost.forward < 0.05 for cost in costs.values())
    assert costs[of(model, "inner").replace("1.", "0.")].backward is None  # nothing is trained in front of it
    assert sum(cost.backward is None for cost in costs.values()) == 1
    assert all(0.005 < cost.backward < 0.08 for cost in costs.values() if cost.backward is not None)
    assert all(layer.probe is None for _, layer in layers(model))
    _, again = learned(model)
    assert torch.equal(again, wanted)


def test_a_trial_reads_little(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    hidden: Callable[..., Tensor] = type(model).hidden

    def watched(self: Decoder, ids: Tensor, **named: Any) -> Tensor:
        read.append(ids.shape)
        return hidden(self, ids, **named)

    monkeypatch.setattr(type(model), "hidden", watched)
    measure_8bit_error(model, batch_of(2, TOKENS + 50))
    assert read == [(1, TOKENS)]


def test_a_trial_that_fails_leaves_no_layer_in_it(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.train.precision.loss_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_8bit_error(model, batch_of())
    assert all(layer.probe is None for _, layer in layers(model))


@pytest.mark.parametrize("count", [0, 1, 40])
def test_channels_that_are_far_out_for_every_token_are_taken_apart_where_they_are_few(
    twins_of: Callable[[Any], tuple[Any, Decoder]], count: int
) -> None:
    """As in trained models: some numbers of the residual stream are large whatever the token is."""
    _, model = twins_of(CONFIGS["llama"])
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    model.train()
    model.embed.matrix.parts["weight"][:, :count] = 8.0
    costs = measure_8bit_error(model, batch_of())
    qkv = costs["0.qkv"]
    assert (qkv.forward > LIMIT) is (count > 0)
    assert qkv.acceptable is (count < 40)
    assert qkv.splits_outliers is (count == 1)
    assert (0 in qkv.channels) or count != 1
    assert count == 40 or not costs["0.down"].splits_outliers


@pytest.mark.parametrize(("forward", "backward", "outliers", "acceptable", "splits_outliers"), [
    (LIMIT, LIMIT, LIMIT, True, False), (LIMIT * 1.01, 0.0, LIMIT, False, False), (0.0, LIMIT * 1.01, 0, False, False),
    (0.0, None, 0.0, True, False), (0.0, math.nan, 0.0, False, False), (math.nan, 0.0, math.nan, False, False),
    (math.inf, 0.0, math.inf, False, False), (0.0, math.inf, 0.0, False, False),
    (LIMIT * 1.5, None, LIMIT * 0.7, True, True), (LIMIT * 4, None, LIMIT * 1.5, False, True),
    (LIMIT * 0.9, 0.0, LIMIT * 0.4, True, True), (LIMIT * 0.9, 0.0, LIMIT * 0.5, True, False),
    (math.inf, 0.0, LIMIT, True, True), (LIMIT * 2, 0.0, math.nan, False, False),
])  # fmt: skip
def test_a_layer_over_the_limit_either_way_is_unfair_and_half_the_error_is_worth_a_side_product(
    forward: float, backward: float | None, outliers: float, acceptable: bool, splits_outliers: bool
) -> None:
    cost = QuantError(forward, backward, outliers)
    assert (cost.acceptable, cost.splits_outliers) == (acceptable, splits_outliers)


def test_channels_are_taken_apart_in_the_layers_that_are_named(model: Decoder) -> None:
    inner, outer = of(model, "inner"), of(model, "outer")
    set_precision_(model, exact=[outer], outliers={inner: [3, 5], outer: [1]})
    own = dict(layers(model))
    outliers = own[inner].outliers
    assert outliers is not None
    assert outliers.channels.tolist() == [3, 5]
    assert (outliers.others == 0).nonzero().flatten().tolist() == [3, 5]
    assert own[outer].outliers is None
    _, rough = learned(model)
    set_precision_(model)
    assert all(layer.outliers is None for layer in own.values())
    _, plain = learned(model)
    assert not torch.equal(rough, plain)


@pytest.mark.parametrize("save", list(Save))
def test_training_in_eight_bits_learns_nearly_the_same(model: Decoder, save: Save) -> None:
    loss, exact = learned(model, save)
    set_precision_(model)
    rough_loss, rough = learned(model, save)
    assert rough_loss != loss
    assert float(abs(rough_loss / loss - 1)) < 0.01
    assert float(torch.cosine_similarity(rough, exact, dim=0)) > 0.98
    assert float(rough.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


def test_evaluation_is_exact_whatever_training_computes(model: Decoder) -> None:
    model.eval()
    with torch.no_grad():
        wanted = batch_loss(model, batch_of())
        set_precision_(model)
        assert torch.equal(batch_loss(model, batch_of()), wanted)
        model.train()
        assert not torch.equal(batch_loss(model, batch_of()), wanted)


def test_layers_named_exact_are_so_and_all_can_be_put_back(model: Decoder) -> None:
    loss, exact = learned(model)
    names = [name for name, _ in layers(model)]
    set_precision_(model, exact=names[:2])
    assert [name for name, layer in layers(model) if not layer.use_8bit] == names[:2]
    set_precision_(model, exact=names)
    assert learned(model)[0] == loss
    set_precision_(model)
    set_precision_(model, wanted=False)
    assert torch.equal(learned(model)[1], exact)


def test_a_product_of_two_layers_is_in_eight_bits_only_if_both_are(
    twins_of: Callable[[Any], tuple[Any, Decoder]],
) -> None:
    _, model = twins_of(CONFIGS["gptj"])
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    model.train()
    loss = batch_loss(model, batch_of())
    outer = [name for name, _ in layers(model) if not name.endswith("in_proj")]
    inner = [name for name, _ in layers(model) if name.endswith("in_proj")]
    for one in ("out_proj", "fc_out"):
        mixed = copy.deepcopy(model)
        set_precision_(mixed, exact=inner + [name for name in outer if name.endswith(one)])
        assert torch.equal(batch_loss(mixed, batch_of()), loss)
    set_precision_(model, exact=inner)
    assert not torch.equal(batch_loss(model, batch_of()), loss)


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_weights_that_are_kept_transposed_change_no_bit_and_are_not_written_again(
    scheme: str, twins_of: Callable[..., tuple[Any, Decoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = twins_of(CONFIGS["gptj"], scheme=scheme)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.train()
    exact = next(name for name, _ in layers(model) if name.endswith("in_proj"))
    set_precision_(model, exact=[exact])
    _, expected = learned(model)
    keep_transposed_(model, True)
    held = {name: layer.transposed[0] for name, layer in layers(model) if layer.transposed is not None}
    assert held.keys() == {name for name, _ in layers(model)} - {exact}
    assert sum(each.nbytes for each in held.values()) == transposed_bytes(model)
    with monkeypatch.context() as patch:
        patch.setattr(matmul8, "transpose_into", lambda *_: pytest.fail("written again"))
        _, found = learned(model)
    assert torch.equal(found, expected)
    keep_transposed_(model, False)
    assert all(layer.transposed is None for _, layer in layers(model))


@pytest.mark.parametrize("scheme", ["none", "int8", "dynamic8", "nf4"])
def test_every_scheme_can_be_multiplied_in_eight_bits(
    scheme: str, twins_of: Callable[..., tuple[Any, Decoder]]
) -> None:
    _, model = twins_of(CONFIGS["llama"], scheme=scheme)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.train()
    _, exact = learned(model)
    set_precision_(model)
    _, rough = learned(model)
    assert not torch.equal(rough, exact)
    assert float(torch.cosine_similarity(rough, exact, dim=0)) > 0.98
