"""The choice of 8-bit matmuls: measured errors, selected layers, and gradients of training with them."""

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
from octavo.layers import linear8
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

VOCAB_SIZE, SEQ_LEN, WIDTH = 61, 24, 64
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gptj": GPTJConfig(vocab_size=VOCAB_SIZE, n_embd=WIDTH, n_inner=96, n_layer=3, n_head=4, rotary_dim=8),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest, models_of: Callable[[Any], tuple[Any, Decoder]]) -> Decoder:
    _, ours = models_of(CONFIGS[request.param])
    adapters.create_(ours, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(ours).values():
        nn.init.normal_(parameter, std=0.1)
    return ours.train()


def batch_of(rows: int = 3, length: int = SEQ_LEN) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(VOCAB_SIZE, (2, rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, length)
    return Batch(ids, labels, positions, torch.zeros_like(ids), (("f:1",),) * rows, epoch=0, index=0)


def loss_and_gradients(
    model: Decoder, save: Save = Save.ALL, precision: Precision | None = None, *, transposed: int = 0
) -> tuple[Tensor, Tensor]:
    """(loss, all gradients as one vector) of a pass with this precision."""
    model.zero_grad()
    loss = loss_in(model, precision or Precision(), save, transposed=transposed)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in adapters.trained(model).values() if p.grad is not None])


def loss_in(model: Decoder, precision: Precision, save: Save = Save.ALL, *, transposed: int = 0) -> Tensor:
    options = ForwardOptions(save, matmul8=matmul8_of(model, precision, transposed=transposed))
    return batch_loss(model, batch_of(), options)


def without(model: Decoder, *exact: str) -> Precision:
    """All layers in 8 bits, except `exact`."""
    return Precision({name: () for name, _ in layers(model) if name not in exact})


def layer_name(model: Decoder, kind: str) -> str:
    """The name of the first ("inner") or last ("outer") matmul of the second block."""
    names = [name for name, _ in layers(model) if name.startswith("1.")]
    return names[0] if kind == "inner" else names[-1]


def test_all_matmuls_of_blocks_can_use_8_bits_and_the_head_cannot(model: Decoder) -> None:
    names = [name for name, _ in layers(model)]
    per_block = 3 if hasattr(model.blocks[0], "fc_out") else 4
    assert len(names) == len(set(names)) == 3 * per_block
    assert model.head not in [layer for _, layer in layers(model)]


def test_layers_with_sizes_that_are_no_multiple_of_16_stay_exact(
    models_of: Callable[[Any], tuple[Any, Decoder]],
) -> None:
    odd = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=88, num_hidden_layers=1, num_attention_heads=4
    )
    _, model = models_of(odd)
    assert [name for name, _ in layers(model)] == ["0.qkv", "0.out", "0.gate_up"]  # down has 88 inputs


def test_the_error_of_every_layer_is_measured_and_gradients_do_not_change(model: Decoder) -> None:
    _, expected = loss_and_gradients(model)
    model.zero_grad()
    errors = measure_8bit_error(model, batch_of(), next_token_loss)
    assert errors.keys() == {name for name, _ in layers(model)}
    assert all(0 < error.forward < 0.05 for error in errors.values())
    assert errors[layer_name(model, "inner").replace("1.", "0.")].backward is None  # no trained layer before it
    assert sum(error.backward is None for error in errors.values()) == 1
    assert all(0.005 < error.backward < 0.08 for error in errors.values() if error.backward is not None)
    _, gradients = loss_and_gradients(model)
    assert torch.equal(gradients, expected)


def test_the_error_measurement_uses_one_short_sequence(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    hidden: Callable[..., Tensor] = type(model).hidden

    def recording_hidden(self: Decoder, ids: Tensor, **options: Any) -> Tensor:
        shapes.append(ids.shape)
        return hidden(self, ids, **options)

    monkeypatch.setattr(type(model), "hidden", recording_hidden)
    measure_8bit_error(model, batch_of(2, TOKENS + 50), next_token_loss)
    assert shapes == [(1, TOKENS)]


@pytest.mark.parametrize("count", [0, 1, 40])
def test_few_outlier_channels_are_split_and_many_keep_the_layer_exact(
    models_of: Callable[[Any], tuple[Any, Decoder]], count: int
) -> None:
    """As in trained models, some channels of the residual stream are large for every token."""
    _, model = models_of(CONFIGS["llama"])
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    model.train()
    model.embed.matrix.parts["weight"][:, :count] = 8.0
    errors = measure_8bit_error(model, batch_of(), next_token_loss)
    qkv = errors["0.qkv"]
    assert (qkv.forward > LIMIT) is (count > 0)
    assert qkv.acceptable is (count < 40)
    assert qkv.splits_outliers is (count == 1)
    assert (0 in qkv.channels) or count != 1
    assert count == 40 or not errors["0.down"].splits_outliers


@pytest.mark.parametrize(("forward", "backward", "outliers", "acceptable", "splits_outliers"), [
    (LIMIT, LIMIT, LIMIT, True, False), (LIMIT * 1.01, 0.0, LIMIT, False, False), (0.0, LIMIT * 1.01, 0, False, False),
    (0.0, None, 0.0, True, False), (0.0, math.nan, 0.0, False, False), (math.nan, 0.0, math.nan, False, False),
    (math.inf, 0.0, math.inf, False, False), (0.0, math.inf, 0.0, False, False),
    (LIMIT * 1.5, None, LIMIT * 0.7, True, True), (LIMIT * 4, None, LIMIT * 1.5, False, True),
    (LIMIT * 0.9, 0.0, LIMIT * 0.4, True, True), (LIMIT * 0.9, 0.0, LIMIT * 0.5, True, False),
    (math.inf, 0.0, LIMIT, True, True), (LIMIT * 2, 0.0, math.nan, False, False),
])  # fmt: skip
def test_errors_decide_whether_a_layer_is_acceptable_and_splits_outliers(
    forward: float, backward: float | None, outliers: float, acceptable: bool, splits_outliers: bool
) -> None:
    error = QuantError(forward, backward, outliers)
    assert (error.acceptable, error.splits_outliers) == (acceptable, splits_outliers)


def test_outlier_channels_stay_exact_in_the_layers_that_have_them(model: Decoder) -> None:
    inner, outer = layer_name(model, "inner"), layer_name(model, "outer")
    precision = Precision({**without(model, outer).outliers, inner: (3, 5)})
    specs = matmul8_of(model, precision)
    assert outer not in specs
    outliers = specs[inner].outliers
    assert outliers is not None
    assert outliers.channels.tolist() == [3, 5]
    assert (outliers.prescale == 0).nonzero().flatten().tolist() == [3, 5]
    assert all(spec.outliers is None for name, spec in specs.items() if name != inner)
    assert not torch.equal(
        loss_and_gradients(model, precision=precision)[1], loss_and_gradients(model, precision=without(model, outer))[1]
    )


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
def test_gradients_with_8_bit_matmuls_are_close_to_exact(model: Decoder, save: Save) -> None:
    loss, exact = loss_and_gradients(model, save)
    loss_8bit, gradients_8bit = loss_and_gradients(model, save, all_8bit(model))
    assert loss_8bit != loss
    assert float(abs(loss_8bit / loss - 1)) < 0.01
    assert float(torch.cosine_similarity(gradients_8bit, exact, dim=0)) > 0.98
    assert float(gradients_8bit.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("save", list(Save))
def test_with_8_bits_in_forward_only_backward_is_exact(
    model: Decoder, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the same loss, closer to the exact one than with 8 bits in both."""
    _, exact = loss_and_gradients(model, save)
    loss, both = loss_and_gradients(model, save, all_8bit(model))
    monkeypatch.setattr(linear8, "grad_input_8bit", lambda *_: pytest.fail("8 bits in backward"))
    precision = all_8bit(model, forward_only=True)
    forward_loss, forward = loss_and_gradients(model, save, precision, transposed=3)
    assert torch.equal(forward_loss, loss)
    assert (forward - exact).norm() < (both - exact).norm()
    assert transposed_bytes(model, precision, 3) == 0


def test_with_8_bits_in_forward_only_no_error_of_backward_is_measured(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = measure_8bit_error(model, batch_of(), next_token_loss)
    monkeypatch.setattr(linear8, "grad_input_8bit", lambda *_: pytest.fail("8 bits in backward"))
    errors = measure_8bit_error(model, batch_of(), next_token_loss, forward_only=True)
    assert {name: error.forward for name, error in errors.items()} == {n: error.forward for n, error in both.items()}
    assert all(error.backward is None for error in errors.values())
    assert any(error.backward is not None for error in both.values())
    assert chosen_precision(errors, forward_only=True).forward_only


def test_a_pass_is_exact_unless_it_is_given_a_precision(model: Decoder) -> None:
    loss, exact = loss_and_gradients(model)
    assert loss_and_gradients(model, precision=all_8bit(model))[0] != loss
    assert torch.equal(loss_and_gradients(model)[1], exact)
    assert torch.equal(
        loss_and_gradients(model, precision=without(model, *(name for name, _ in layers(model))))[1], exact
    )


def test_a_matmul_of_two_layers_is_in_8_bits_only_if_both_are(
    models_of: Callable[[Any], tuple[Any, Decoder]],
) -> None:
    _, model = models_of(CONFIGS["gptj"])
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
def test_stored_transposed_weights_give_identical_gradients_without_a_transposition(
    scheme: str, models_of: Callable[..., tuple[Any, Decoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = models_of(CONFIGS["gptj"], scheme=scheme)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.train()
    exact = next(name for name, _ in layers(model) if name.endswith("in_proj"))
    precision = without(model, exact)
    _, expected = loss_and_gradients(model, precision=precision)
    layers_stored = len(model.blocks)
    specs = matmul8_of(model, precision, transposed=layers_stored)
    assert specs.keys() == {name for name, _ in layers(model)} - {exact}
    stored = [spec.transposed[0].nbytes for spec in specs.values() if spec.transposed is not None]
    assert sum(stored) == transposed_bytes(model, precision, layers_stored)
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(matmul8, "transpose_into", lambda *_: pytest.fail("transposed again"))
        batch_loss(model, batch_of(), ForwardOptions(matmul8=specs)).backward()
    gradients = torch.cat([p.grad.flatten() for p in adapters.trained(model).values() if p.grad is not None])
    assert torch.equal(gradients, expected)


@pytest.mark.parametrize("scheme", ["none", "int8", "dynamic8", "nf4", "nf4-double"])
def test_every_scheme_can_be_multiplied_in_8_bits(scheme: str, models_of: Callable[..., tuple[Any, Decoder]]) -> None:
    _, model = models_of(CONFIGS["llama"], scheme=scheme)
    adapters.create_(model, AdapterPlan(LoraSpec(rank=4, alpha=8)), seed=0)
    for parameter in adapters.trained(model).values():
        nn.init.normal_(parameter, std=0.1)
    model.train()
    _, exact = loss_and_gradients(model)
    _, gradients_8bit = loss_and_gradients(model, precision=all_8bit(model))
    assert not torch.equal(gradients_8bit, exact)
    assert float(torch.cosine_similarity(gradients_8bit, exact, dim=0)) > 0.98
