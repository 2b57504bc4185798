"""LoRA: new factors change nothing, train in one flat buffer, and merge into the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.lora import FlatGroup, LoraSpec, attach_, flatten_, gradients_in_place, lora_of, merged_rows
from octavo.ops.quantize import SCHEMES

COLUMNS = 8
GROUP = {"gate_proj": 6, "up_proj": 6}
SPEC = LoraSpec(rank=3, alpha=6.0)


def matrix_of(outputs: dict[str, int]) -> FrozenMatrix:
    matrix = FrozenMatrix(COLUMNS, outputs)
    matrix.allocate(SCHEMES["none"], torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, rows in outputs.items():
        matrix.put(name, {"weight": torch.randn(rows, COLUMNS, generator=generator)})
    return matrix


def linear() -> FrozenLinear:
    layer = FrozenLinear(matrix_of(GROUP), bias=["up_proj"])
    layer.bias_of("up_proj").fill_(0.5)
    return layer


def embedding() -> FrozenEmbedding:
    return FrozenEmbedding(matrix_of({"wte": 9}))


def attached(spec: LoraSpec = SPEC, seed: int = 1) -> FrozenLinear:
    layer, generator = linear(), torch.Generator().manual_seed(seed)
    for key in GROUP:
        attach_(layer, key, spec, generator=generator)
    return layer


def randomise(layer: nn.Module) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))


def test_new_lora_changes_no_output() -> None:
    x, ids = torch.randn(4, COLUMNS), torch.arange(9)[None]
    assert torch.equal(attached()(x), linear()(x))
    table = embedding()
    before = table(ids)
    attach_(table, "wte", SPEC, generator=torch.Generator())
    assert torch.equal(table(ids), before)


def test_new_lora_has_a_gradient_in_the_first_step() -> None:
    layer = attached()
    torch.autograd.backward(layer(torch.randn(4, COLUMNS)).square().sum())
    for lora in lora_of([layer]):
        assert lora.b.grad is not None
        assert lora.b.grad.abs().max() > 0
    table = embedding()
    attach_(table, "wte", SPEC, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(table(torch.arange(9)[None]).square().sum())
    (lora,) = lora_of([table])
    assert lora.a.grad is not None
    assert lora.a.grad.abs().max() > 0


def test_a_is_drawn_from_the_seed_within_its_bound() -> None:
    first, again, other = attached(), attached(), attached(seed=2)
    for mine, same, different in zip(*(lora_of([x]) for x in (first, again, other)), strict=True):
        assert torch.equal(mine.a, same.a)
        assert not torch.equal(mine.a, different.a)
        assert 0 < mine.a.abs().max() <= 1 / math.sqrt(COLUMNS)
        assert mine.a.dtype == mine.b.dtype == torch.float32


def test_scaling_is_alpha_over_the_rank_or_its_root() -> None:
    assert LoraSpec(rank=16, alpha=32).scaling == 2
    assert LoraSpec(rank=16, alpha=32, rslora=True).scaling == 8


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_an_invalid_spec_is_an_error(wrong: dict[str, float]) -> None:
    with pytest.raises(AdapterError, match="must be at least"):
        LoraSpec(**wrong)  # type: ignore[arg-type]


def flattened() -> tuple[FrozenLinear, list[FlatGroup]]:
    layer = attached()
    randomise(layer)
    assert layer.bias is not None
    layer.bias.requires_grad_()
    return layer, flatten_(dict(layer.named_parameters()))


def test_flattening_keeps_values_and_separates_biases_from_matrices() -> None:
    layer = attached()
    randomise(layer)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    groups = flatten_(dict(layer.named_parameters()))
    assert [group.decays for group in groups] == [True, False]
    assert sorted(name for group in groups for name in group.names) == sorted(before)
    assert groups[1].names == ("bias",)
    for group in groups:
        expected = torch.cat([before[name].reshape(-1) for name in group.names])
        assert torch.equal(group.values, expected)
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert torch.equal(parameter, before[name])


def test_parameters_follow_their_buffer() -> None:
    layer, groups = flattened()
    x = torch.randn(4, COLUMNS)
    before = layer(x)
    with torch.no_grad():
        for group in groups:
            group.values.zero_()
    assert not any(parameter.any() for parameter in layer.parameters())
    assert not torch.equal(layer(x), before)


def test_gradients_are_added_up_in_their_buffer() -> None:
    layer, groups = flattened()
    kernel = attached()
    randomise(kernel)
    assert kernel.bias is not None
    kernel.bias.requires_grad_()
    for seed in (0, 1):  # two micro-batches
        x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(seed))
        torch.autograd.backward(layer(x).square().sum())
        torch.autograd.backward(kernel(x).square().sum())
        assert gradients_in_place(groups)
    plain = dict(kernel.named_parameters())
    for group in groups:
        wanted = [plain[name].grad for name in group.names]
        assert group.values.grad is not None
        torch.testing.assert_close(group.values.grad, torch.cat([g.reshape(-1) for g in wanted if g is not None]))
        group.values.grad.zero_()
        assert not any(p.grad.any() for p in group.parameters if p.grad is not None)


def test_an_embeddings_gradient_stays_in_its_buffer_too() -> None:
    table = embedding()
    attach_(table, "wte", SPEC, generator=torch.Generator().manual_seed(0))
    groups = flatten_(dict(table.named_parameters()))
    torch.autograd.backward(table(torch.arange(9)[None]).square().sum())
    assert gradients_in_place(groups)
    (group,) = groups
    assert group.values.grad is not None
    assert group.values.grad.any()


def test_a_gradient_outside_its_buffer_is_detected() -> None:
    layer, groups = flattened()
    groups[0].parameters[1].grad = None
    assert not gradients_in_place(groups)
    torch.autograd.backward(layer(torch.randn(4, COLUMNS)).sum())
    assert not gradients_in_place(groups)


def test_merged_rows_give_the_output_of_the_layer() -> None:
    layer = attached()
    randomise(layer)
    assert layer.bias is not None
    x = torch.randn(4, COLUMNS)
    merged = torch.cat([merged_rows(layer, key, layer.matrix.of(key)["weight"]) for key in GROUP])
    bias = torch.cat([torch.zeros(6), layer.bias])
    torch.testing.assert_close(x @ merged.T + bias, layer(x))


def test_merged_rows_of_an_embedding_are_its_rows() -> None:
    table = embedding()
    attach_(table, "wte", SPEC, generator=torch.Generator().manual_seed(0))
    randomise(table)
    merged = merged_rows(table, "wte", table.matrix.of("wte")["weight"])
    torch.testing.assert_close(merged, table(torch.arange(9)))


def test_rows_without_lora_merge_to_themselves_in_float32() -> None:
    weight: Tensor = torch.randn(6, COLUMNS).bfloat16()
    merged = merged_rows(linear(), "up_proj", weight)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, weight.float())
