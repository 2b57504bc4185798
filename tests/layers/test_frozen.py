"""Frozen layers: a group equals its members, stored tensors come out as they went in, and dropout acts on LoRA only."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.lora import put_
from octavo.ops.quantize import SCHEMES, dequantize
from octavo.runtime import dispatch

CPU = torch.device("cpu")
GROUP = {"q_proj": 6, "k_proj": 3, "v_proj": 5}
every_scheme = pytest.mark.parametrize("name", list(SCHEMES))
# Columns with which blocks end within a name's rows, at their end (nf4), and at their end (dynamic8, nf4).
every_width = pytest.mark.parametrize("columns", [7, 64, 4096])


def weights_of(outputs: Mapping[str, int], columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, columns, generator=generator) for name, rows in outputs.items()}


def matrix_of(weights: Mapping[str, Tensor], scheme: str = "none", dtype: torch.dtype = torch.float32) -> FrozenMatrix:
    columns = next(iter(weights.values())).shape[1]
    matrix = FrozenMatrix(columns, {name: len(weight) for name, weight in weights.items()})
    matrix.allocate(SCHEMES[scheme], dtype, CPU)
    for name, weight in weights.items():
        matrix.put(name, SCHEMES[scheme].quantize(weight.to(dtype) if scheme == "none" else weight))
    return matrix


def random_lora(rows: int, columns: int, rank: int = 2, scaling: float = 0.5) -> Lora:
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
    return Lora(a, b, scaling)


@every_scheme
@every_width
def test_a_group_is_its_members_stacked(name: str, columns: int) -> None:
    weights = weights_of(GROUP, columns)
    group = FrozenLinear(matrix_of(weights, name))
    members = [FrozenLinear(matrix_of({key: weight}, name)) for key, weight in weights.items()]
    unpacked, scale = group.matrix.unpack(torch.float32)
    restored = unpacked if scale is None else unpacked * scale[:, None]
    scheme = SCHEMES[name]
    expected = [dequantize(scheme, scheme.quantize(w), (len(w), columns)) for w in weights.values()]
    assert torch.equal(restored, torch.cat(expected))
    x = torch.randn(3, columns)
    together = torch.cat([member(x) for member in members], dim=-1)
    torch.testing.assert_close(group(x), together, rtol=1e-5, atol=1e-3 if columns > 64 else 1e-5)


@every_scheme
@every_width
def test_stored_tensors_come_out_as_they_went_in(name: str, columns: int) -> None:
    weights = weights_of(GROUP, columns)
    matrix = matrix_of(weights, name)
    for key, weight in weights.items():
        parts = SCHEMES[name].quantize(weight)
        out = matrix.of(key)
        assert out.keys() == parts.keys()
        assert all(torch.equal(out[part], parts[part]) for part in parts)


@every_scheme
@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_filling_columns_of_a_wider_matrix_writes_all_names_rounded_once(
    name: str, columns: int, dtype: torch.dtype
) -> None:
    weights, scheme = weights_of(GROUP, columns), SCHEMES[name]
    matrix = matrix_of(weights, name, dtype)
    buffer = torch.full((sum(GROUP.values()), columns + 5), 9.0, dtype=dtype)
    matrix.fill(buffer[:, 2 : columns + 2])
    parts = [scheme.quantize(w.to(dtype) if name == "none" else w) for w in weights.values()]
    exact = [dequantize(scheme, one, (len(w), columns)) for one, w in zip(parts, weights.values(), strict=True)]
    assert torch.equal(buffer[:, 2 : columns + 2], torch.cat(exact).to(dtype))
    assert (buffer[:, [0, 1, -3, -2, -1]] == 9).all()


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The names of the kernels that are called on the meta device."""
    names: list[str] = []
    dispatch.OP_OBSERVERS.append(observer := lambda name, _: names.append(name))
    yield names
    dispatch.OP_OBSERVERS.remove(observer)


@pytest.mark.parametrize(
    ("outputs", "columns", "launches"),
    [({"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}, 4096, 1), ({"q_proj": 576, "k_proj": 192}, 576, 2)],
    ids=["whole blocks", "parts of blocks"],
)
def test_a_stack_under_nf4_double_is_small_and_dequantized_without_a_copy(
    outputs: dict[str, int], columns: int, launches: int, launched: list[str]
) -> None:
    matrix = FrozenMatrix(columns, outputs)
    matrix.allocate(SCHEMES["nf4-double"], torch.bfloat16, torch.device("meta"))
    values = sum(outputs.values()) * columns
    exact = 4 + 8 / 64 + 64 / 16384  # bits a weight, and one code table for the stack
    assert matrix.stored_bytes == pytest.approx(values * exact / 8 + 1024, abs=launches * 8)
    unpacked, scale = matrix.unpack(torch.bfloat16)
    assert (tuple(unpacked.shape), scale) == (matrix.shape, None)
    matrix.fill(torch.empty(matrix.shape, dtype=torch.bfloat16, device="meta"))
    assert launched == ["nf4_double_into"] * (2 * launches)


def test_a_fused_linear_reads_a_layer_without_a_copy() -> None:
    weights = weights_of(GROUP, 7)
    layer = FrozenLinear(matrix_of(weights), bias=["k_proj", "v_proj"])
    put_(layer, "v_proj", random_lora(5, 7), dropout=0.5)
    frozen = layer.eval().spec()
    assert (frozen.rows, frozen.columns, frozen.bias_start, frozen.dropout) == (14, 7, 6, 0.0)
    assert frozen.bias is layer.bias
    (lora,) = frozen.lora
    assert (lora.start, lora.stop, lora.scaling) == (9, 14, 0.5)
    assert lora.a is layer.lora["v_proj"].a
    assert lora.b is layer.lora["v_proj"].b
    out = torch.empty(14, 7)
    frozen.fill(out)
    assert torch.equal(out, torch.cat(list(weights.values())))
    assert layer.train().spec().dropout == 0.5


@every_scheme
def test_putting_one_name_does_not_change_the_others(name: str) -> None:
    weights = weights_of(GROUP, 7)
    matrix = matrix_of(weights, name)
    before = {key: {part: t.clone() for part, t in matrix.of(key).items()} for key in ("q_proj", "v_proj")}
    matrix.put("k_proj", SCHEMES[name].quantize(torch.full((3, 7), 9.0)))
    for key, parts in before.items():
        assert all(torch.equal(matrix.of(key)[part], old) for part, old in parts.items())


@every_scheme
def test_stored_bytes_are_those_of_the_stored_tensors(name: str) -> None:
    matrix = matrix_of(weights_of({"only": 5}, 7), name)
    assert matrix.stored_bytes == sum(part.nbytes for part in matrix.parts.values())


@every_scheme
def test_conversion_to_another_dtype_does_not_change_the_stored_tensors(name: str) -> None:
    matrix = matrix_of(weights_of({"only": 5}, 70), name)
    before = {part: tensor.clone() for part, tensor in matrix.parts.items()}
    layer = FrozenLinear(matrix, bias=["only"]).to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    for part, tensor in matrix.parts.items():
        assert tensor.dtype == before[part].dtype
        assert torch.equal(tensor, before[part])


def test_moving_to_another_device_moves_the_parts() -> None:
    layer = FrozenLinear(matrix_of(weights_of({"only": 5}, 70), "int8")).to("meta")
    assert {part.device.type for part in layer.matrix.parts.values()} == {"meta"}
    assert {part.dtype for part in layer.matrix.parts.values()} == {torch.int8, torch.float32}


@pytest.mark.parametrize("biased", [["q_proj"], ["k_proj", "v_proj"], list(GROUP)], ids=str)
def test_a_bias_is_added_to_the_rows_of_its_names(biased: list[str]) -> None:
    weights = weights_of(GROUP, 7)
    layer = FrozenLinear(matrix_of(weights), bias=biased)
    expected = {key: torch.randn(rows) if key in biased else torch.zeros(rows) for key, rows in GROUP.items()}
    for key in biased:
        layer.bias_of(key).copy_(expected[key])
    x = torch.randn(4, 7)
    reference = x @ torch.cat(list(weights.values())).T + torch.cat(list(expected.values()))
    torch.testing.assert_close(layer(x), reference)


def test_biases_with_a_gap_between_them_are_an_error() -> None:
    with pytest.raises(AssertionError, match="adjacent"):
        FrozenLinear(FrozenMatrix(7, GROUP), bias=["q_proj", "v_proj"])


def test_each_name_has_its_own_lora() -> None:
    weights = weights_of(GROUP, 7)
    layer = FrozenLinear(matrix_of(weights))
    x = torch.randn(4, 7)
    base = layer(x).split(list(GROUP.values()), dim=-1)
    for key in ("v_proj", "q_proj"):  # in another order than the rows
        put_(layer, key, random_lora(GROUP[key], 7), dropout=0.0)
    tuned = layer(x).split(list(GROUP.values()), dim=-1)
    for key, before, after in zip(GROUP, base, tuned, strict=True):
        lora = random_lora(GROUP[key], 7)
        added = 0.5 * (x @ lora.a.T) @ lora.b.T if key != "k_proj" else torch.zeros_like(before)
        torch.testing.assert_close(after, before + added)


def test_a_layer_is_trained_if_it_has_lora_or_a_trained_bias() -> None:
    frozen_only, biased, with_lora = (FrozenLinear(matrix_of(weights_of(GROUP, 7)), bias=GROUP) for _ in range(3))
    assert biased.bias is not None
    biased.bias.requires_grad_()
    put_(with_lora, "q_proj", random_lora(6, 7), dropout=0.0)
    assert [layer.trained for layer in (frozen_only, biased, with_lora)] == [False, True, True]
    assert {name for name, _ in with_lora.named_parameters()} == {"bias", "lora.q_proj.a", "lora.q_proj.b"}


def test_dropout_acts_in_train_mode_and_on_lora_only() -> None:
    layer = FrozenLinear(matrix_of(weights_of({"only": 5}, 40)))
    x = torch.randn(3, 40)
    base = layer.reference(x)
    lora = random_lora(5, 40)
    put_(layer, "only", lora, dropout=0.5)
    tuned = layer.eval().reference(x)
    torch.testing.assert_close(tuned, base + 0.5 * x @ lora.a.T @ lora.b.T)
    layer.train()
    torch.manual_seed(0)
    first = layer.reference(x)
    assert not torch.equal(first, tuned)
    assert not torch.equal(first, layer.reference(x))  # another mask
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(first, base + 0.5 * dropped @ lora.a.T @ lora.b.T)
    with torch.no_grad():
        lora.b.zero_()
    assert torch.equal(layer.reference(x), base)  # the frozen matmul reads x itself


def test_gradients_pass_through_the_dropped_input() -> None:
    layer = FrozenLinear(matrix_of(weights_of({"only": 5}, 40))).train()
    lora = random_lora(5, 40)
    put_(layer, "only", lora, dropout=0.5)
    x = torch.randn(3, 40, requires_grad=True)
    torch.manual_seed(0)
    ours = torch.autograd.grad(layer.reference(x).square().sum(), [x, lora.a, lora.b])
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    weight = layer.matrix.parts["weight"]
    composed = x @ weight.T + 0.5 * dropped @ lora.a.T @ lora.b.T
    theirs = torch.autograd.grad(composed.square().sum(), [x, lora.a, lora.b])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_names_of_one_matrix_share_the_mask_of_their_input() -> None:
    weight = torch.randn(5, 40)
    layer = FrozenLinear(matrix_of({"one": weight, "two": weight})).train()
    for key in ("one", "two"):
        put_(layer, key, random_lora(5, 40), dropout=0.5)
    one, two = layer(torch.randn(3, 40)).chunk(2, dim=-1)
    torch.testing.assert_close(one, two)


@every_scheme
def test_an_embedding_gathers_rows_in_the_compute_type(name: str) -> None:
    table = torch.randn(9, 70)
    embedding = FrozenEmbedding(matrix_of({"wte": table}, name, torch.bfloat16))
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    rows = embedding(ids)
    matrix, scale = embedding.matrix.unpack(torch.bfloat16)
    whole = matrix if scale is None else (matrix * scale[:, None]).bfloat16()
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, whole[ids])


def test_lora_of_an_embedding_is_a_low_rank_change_of_its_matrix() -> None:
    table = torch.randn(9, 6)
    embedding = FrozenEmbedding(matrix_of({"wte": table}))
    lora = random_lora(6, 9)  # A (r, V), B (d, r)
    put_(embedding, "wte", lora, dropout=0.9)  # as in PEFT, an embedding takes none
    ids = torch.tensor([[0, 8, 3], [3, 3, 1]])
    ours = embedding.train()(ids)
    changed = table + 0.5 * (lora.b @ lora.a).T
    torch.testing.assert_close(ours, changed[ids])
    mine = torch.autograd.grad(ours.square().sum(), [lora.a, lora.b])
    theirs = torch.autograd.grad(changed[ids].square().sum(), [lora.a, lora.b])
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert not mine[0][:, [2, 4, 5, 6, 7]].any()  # tokens that do not occur


def test_a_tied_head_is_the_embeddings_matrix() -> None:
    table = matrix_of(weights_of({"wte": 9}, 6))
    model = nn.ModuleDict({"embed": FrozenEmbedding(table), "head": FrozenLinear(table)})
    x = torch.randn(2, 6)
    table.put("wte", {"weight": torch.full((9, 6), 2.0)})
    torch.testing.assert_close(model["head"](x), 2 * x.sum(dim=-1, keepdim=True).expand(2, 9))
    assert torch.equal(model["embed"](torch.tensor([[4]])), torch.full((1, 1, 6), 2.0))
    kernel = copy.deepcopy(model)
    assert kernel["head"].matrix is kernel["embed"].matrix
    assert kernel["head"].matrix is not table


def test_lora_on_a_tied_head_does_not_change_the_embedding() -> None:
    table = matrix_of(weights_of({"wte": 9}, 6))
    embedding, head = FrozenEmbedding(table), FrozenLinear(table)
    before = embedding(torch.arange(9)[None])
    put_(head, "wte", random_lora(9, 6), dropout=0.0)
    assert torch.equal(embedding(torch.arange(9)[None]), before)
