"""Which products are in 8 bits: what a trial finds, what it leaves alone, and what training with it learns."""

from __future__ import annotations

import json
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
from octavo.layers.context import ForwardOptions, Save
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder
from octavo.objective import batch_loss, next_token_loss
from octavo.ops import matmul8
from octavo.train.precision import (
    LIMIT,
    TOKENS,
    Precision,
    QuantError,
    all_8bit,
    chosen_precision,
    layers,
    matmul8_of,
    measure_8bit_error,
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
    return Batch(ids, labels, positions, torch.zeros_like(ids), (("f:1",),) * rows, epoch=0, index=0)


def learned(
    model: Decoder, save: Save = Save.ALL, precision: Precision | None = None, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, all gradients) of a pass with this precision."""
    model.zero_grad()
    loss = loss_in(model, precision or Precision(), save, transposed=transposed)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in adapters.trained(model).values() if p.grad is not None])


def loss_in(model: Decoder, precision: Precision, save: Save = Save.ALL, *, transposed: bool = False) -> Tensor:
    options = ForwardOptions(save, matmul8=matmul8_of(model, precision, transposed=transposed))
    return batch_loss(model, batch_of(), options)


def without(model: Decoder, *exact: str) -> Precision:
    """All layers in 8 bits but these."""
    return Precision({name: () for name, _ in layers(model) if name not in exact})


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
    costs = measure_8bit_error(model, batch_of(), next_token_loss)
    assert costs.keys() == {name for name, _ in layers(model)}
    assert all(0 < cost.forward < 0.05 for cost in costs.values())
    assert costs[of(model, "inner").replace("1.", "0.")].backward is None  # nothing is trained in front of it
    assert sum(cost.backward is None for cost in costs.values()) == 1
    assert all(0.005 < cost.backward < 0.08 for cost in costs.values() if cost.backward is not None)
    _, again = learned(model)
    assert torch.equal(again, wanted)


def test_a_trial_reads_little(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    hidden: Callable[..., Tensor] = type(model).hidden

    def watched(self: Decoder, ids: Tensor, **named: Any) -> Tensor:
        read.append(ids.shape)
        return hidden(self, ids, **named)

    monkeypatch.setattr(type(model), "hidden", watched)
    measure_8bit_error(model, batch_of(2, TOKENS + 50), next_token_loss)
    assert read == [(1, TOKENS)]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_channels_that_are_far_out_for_every_token_are_taken_apart_where_they_are_few(
    twins_of: Callable[[Any], tuple[Any, Decoder]], count: int
) -> None:
    """As in trained models: some numbers of the residual stream are large whatever the token is."""
    _, model = twins_of(CONFIGS["llama"])
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    model.train()
    model.embed.matrix.parts["weight"][:, :count] = 8.0
    costs = measure_8bit_error(model, batch_of(), next_token_loss)
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


def test_outlier_channels_stay_exact_in_the_layers_that_have_them(model: Decoder) -> None:
    inner, outer = of(model, "inner"), of(model, "outer")
    precision = Precision({**without(model, outer).outliers, inner: (3, 5)})
    made = matmul8_of(model, precision)
    assert outer not in made
    outliers = made[inner].outliers
    assert outliers is not None
    assert outliers.channels.tolist() == [3, 5]
    assert (outliers.prescale == 0).nonzero().flatten().tolist() == [3, 5]
    assert all(spec.outliers is None for name, spec in made.items() if name != inner)
    assert not torch.equal(learned(model, precision=precision)[1], learned(model, precision=without(model, outer))[1])


def test_the_choice_follows_the_errors() -> None:
    errors = {
        "good": QuantError(0.01, 0.02),
        "outliers": QuantError(0.2, None, 0.01, (3, 7)),
        "bad": QuantError(0.01, 1.0),
    }
    assert chosen_precision(errors) == Precision({"good": (), "outliers": (3, 7)})
    assert chosen_precision(errors, forced=True) == Precision({"good": (), "outliers": (3, 7), "bad": ()})


def test_a_precision_is_the_same_after_json() -> None:
    precision = Precision({"0.qkv": (), "1.down": (4, 9)})
    assert Precision.from_json(json.loads(json.dumps(precision.to_json()))) == precision


@pytest.mark.parametrize("save", list(Save))
def test_training_in_8_bits_has_nearly_the_same_gradients(model: Decoder, save: Save) -> None:
    loss, exact = learned(model, save)
    rough_loss, rough = learned(model, save, all_8bit(model))
    assert rough_loss != loss
    assert float(abs(rough_loss / loss - 1)) < 0.01
    assert float(torch.cosine_similarity(rough, exact, dim=0)) > 0.98
    assert float(rough.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


def test_a_pass_is_exact_unless_it_is_given_a_precision(model: Decoder) -> None:
    loss, exact = learned(model)
    assert learned(model, precision=all_8bit(model))[0] != loss
    assert torch.equal(learned(model)[1], exact)
    assert torch.equal(learned(model, precision=without(model, *(name for name, _ in layers(model))))[1], exact)


def test_a_matmul_of_two_layers_is_in_8_bits_only_if_both_are(
    twins_of: Callable[[Any], tuple[Any, Decoder]],
) -> None:
    _, model = twins_of(CONFIGS["gptj"])
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    model.train()
    loss = batch_loss(model, batch_of())
    outer = [name for name, _ in layers(model) if not name.endswith("in_proj")]
    inner = [name for name, _ in layers(model) if name.endswith("in_proj")]
    for one in ("out_proj", "fc_out"):
        mixed = without(model, *inner, *(name for name in outer if name.endswith(one)))
        assert torch.equal(loss_in(model, mixed), loss)
    assert not torch.equal(loss_in(model, without(model, *inner)), loss)


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_transposed_weights_change_no_bit_and_are_not_written_again(
    scheme: str, twins_of: Callable[..., tuple[Any, Decoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = twins_of(CONFIGS["gptj"], scheme=scheme)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.train()
    exact = next(name for name, _ in layers(model) if name.endswith("in_proj"))
    precision = without(model, exact)
    _, expected = learned(model, precision=precision)
    made = matmul8_of(model, precision, transposed=True)
    assert made.keys() == {name for name, _ in layers(model)} - {exact}
    stored = [spec.transposed[0].nbytes for spec in made.values() if spec.transposed is not None]
    assert sum(stored) == transposed_bytes(model, precision)
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(matmul8, "transpose_into", lambda *_: pytest.fail("written again"))
        batch_loss(model, batch_of(), ForwardOptions(matmul8=made)).backward()
    found = torch.cat([p.grad.flatten() for p in adapters.trained(model).values() if p.grad is not None])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scheme", ["none", "int8", "dynamic8", "nf4"])
def test_every_scheme_can_be_multiplied_in_8_bits(scheme: str, twins_of: Callable[..., tuple[Any, Decoder]]) -> None:
    _, model = twins_of(CONFIGS["llama"], scheme=scheme)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.train()
    _, exact = learned(model)
    _, rough = learned(model, precision=all_8bit(model))
    assert not torch.equal(rough, exact)
    assert float(torch.cosine_similarity(rough, exact, dim=0)) > 0.98
