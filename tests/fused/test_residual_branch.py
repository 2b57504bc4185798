"""A residual branch made of layers against its reference under autograd: the output and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.fused.plain import plain_branch
from torch import Tensor, nn

from octavo.fused.attention import Attention
from octavo.fused.branch import residual_branch
from octavo.fused.mixers import Geglu, Gelu, Mixer, Swiglu
from octavo.layers.context import ForwardContext, Save
from octavo.layers.frozen import FrozenLinear, Lora
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.lora import put_
from octavo.layers.norm import GemmaRmsNorm, LayerNorm, RmsNorm
from octavo.ops.attention import find_documents
from octavo.ops.linear_spec import Matmul8
from octavo.ops.quantize import SCHEMES
from octavo.ops.rotary import ROTATE_HALF, ROTATE_INTERLEAVED, rotary_table

BATCH, LENGTH, WIDTH, MLP_WIDTH = 2, 7, 40, 56  # blocks of 64 end within rows and within names
HEADS, HEAD_SIZE = 4, 10
DOCUMENT = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3, 4, 4, 4, 4, -1, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 0, 1]])


@dataclass
class Layers:
    """The layers of a branch: the arguments of `residual_branch`."""

    norm: LayerNorm | RmsNorm | None
    inner: FrozenLinear
    mixers: tuple[Mixer, ...]
    outer: tuple[FrozenLinear, ...]
    post_norm: LayerNorm | RmsNorm | None = None
    scale: float = 1.0
    head_norms: tuple[RmsNorm, RmsNorm] | None = None  # of q and k
    other_residual: bool = False  # is a function of x here, so that both gradients add up in that to x

    @property
    def norms(self) -> list[LayerNorm | RmsNorm]:
        return [norm for norm in (self.norm, self.post_norm, *(self.head_norms or ())) if norm is not None]

    @property
    def all(self) -> nn.ModuleList:
        return nn.ModuleList([*self.norms, self.inner, *self.outer])

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.all.named_parameters() if p.requires_grad}

    def run(self, x: Tensor, *, save: Save | None, packed: bool, use_8bit: bool = False) -> Tensor:
        """`residual_branch`, or if `save` is None the reference."""
        documents = find_documents(DOCUMENT, DOCUMENT.device) if packed else None
        frequencies = torch.tensor([0.9, 0.4, 0.2, 0.1, 0.05])[: 2 if isinstance(self.norm, LayerNorm) else 5]
        table = rotary_table(POSITIONS if packed else torch.arange(LENGTH)[None], frequencies)
        matmul8 = {"": Matmul8()} if use_8bit else {}  # the layers here have no path
        context = ForwardContext(BATCH, LENGTH, table, documents, matmul8=matmul8)
        mixers = self.mixers
        if self.head_norms is not None:
            assert isinstance(mixers[0], Attention)
            mixers = (replace(mixers[0], norms=(self.head_norms[0].spec(), self.head_norms[1].spec())),)
        parts = self.norm, self.inner, mixers, self.outer
        residual = torch.sin(x) if self.other_residual else None
        named: dict[str, Any] = {"residual": residual, "post_norm": self.post_norm, "scale": self.scale}
        if save is None:
            return plain_branch(x, *parts, context, **named)
        return residual_branch(x, *parts, context.at(0, save), **named)


def linear(columns: int, outputs: dict[str, int], scheme: str, dtype: torch.dtype, **biases: Any) -> FrozenLinear:
    """A layer with the given biases, and LoRA on each name but k_proj."""
    matrix = FrozenMatrix(columns, outputs)
    matrix.allocate(SCHEMES[scheme], dtype, torch.device("cpu"))
    layer = FrozenLinear(matrix, **biases)
    for number, (name, rows) in enumerate(outputs.items()):
        weight = torch.randn(rows, columns) / columns**0.5
        matrix.put(name, SCHEMES[scheme].quantize(weight.to(dtype) if scheme == "none" else weight))
        if name != "k_proj":
            rank = 2 + number
            a, b = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) / rank
            put_(layer, name, Lora(a, b, 0.5), dropout=0.0)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def gptj(scheme: str, dtype: torch.dtype) -> Layers:
    stack_a = {"q_proj": WIDTH, "k_proj": WIDTH, "v_proj": WIDTH, "fc_in": MLP_WIDTH}
    return Layers(
        LayerNorm(WIDTH, 1e-5),
        linear(WIDTH, stack_a, scheme, dtype, bias=["fc_in"]),
        (Attention(HEADS, HEADS, HEAD_SIZE, ROTATE_INTERLEAVED), Gelu(MLP_WIDTH)),
        (
            linear(WIDTH, {"out_proj": WIDTH}, scheme, dtype),
            linear(MLP_WIDTH, {"fc_out": WIDTH}, scheme, dtype, bias=["fc_out"]),
        ),
    )


def llama_attention(scheme: str, dtype: torch.dtype) -> Layers:
    stack_a = {"q_proj": WIDTH, "k_proj": 2 * HEAD_SIZE, "v_proj": 2 * HEAD_SIZE}
    return Layers(
        RmsNorm(WIDTH, 1e-5),
        linear(WIDTH, stack_a, scheme, dtype, bias=list(stack_a)),
        (Attention(HEADS, 2, HEAD_SIZE, ROTATE_HALF),),
        (linear(WIDTH, {"o_proj": WIDTH}, scheme, dtype),),
    )


def llama_mlp(scheme: str, dtype: torch.dtype) -> Layers:
    return Layers(
        RmsNorm(WIDTH, 1e-5),
        linear(WIDTH, {"gate_proj": MLP_WIDTH, "up_proj": MLP_WIDTH}, scheme, dtype),
        (Swiglu(MLP_WIDTH),),
        (linear(MLP_WIDTH, {"down_proj": WIDTH}, scheme, dtype, bias=["down_proj"]),),
    )


def neox_mlp(scheme: str, dtype: torch.dtype) -> Layers:
    return Layers(
        LayerNorm(WIDTH, 1e-5),
        linear(WIDTH, {"dense_h_to_4h": MLP_WIDTH}, scheme, dtype, bias=["dense_h_to_4h"]),
        (Gelu(MLP_WIDTH),),
        (linear(MLP_WIDTH, {"dense_4h_to_h": WIDTH}, scheme, dtype, bias=["dense_4h_to_h"]),),
        other_residual=True,
    )


def olmo2_attention(scheme: str, dtype: torch.dtype) -> Layers:
    layers = llama_attention(scheme, dtype)
    layers.norm, layers.post_norm = None, RmsNorm(WIDTH, 1e-5)
    layers.head_norms = RmsNorm(WIDTH, 1e-5), RmsNorm(2 * HEAD_SIZE, 1e-5)  # of all heads
    return layers


def qwen3_attention(scheme: str, dtype: torch.dtype) -> Layers:
    layers = llama_attention(scheme, dtype)
    layers.head_norms = RmsNorm(HEAD_SIZE, 1e-5), RmsNorm(HEAD_SIZE, 1e-5)
    return layers


def gemma_attention(scheme: str, dtype: torch.dtype) -> Layers:
    layers = llama_attention(scheme, dtype)
    layers.norm, layers.post_norm = GemmaRmsNorm(WIDTH, 1e-5), GemmaRmsNorm(WIDTH, 1e-5)
    layers.head_norms = GemmaRmsNorm(HEAD_SIZE, 1e-5), GemmaRmsNorm(HEAD_SIZE, 1e-5)
    return layers


def gemma_mlp(scheme: str, dtype: torch.dtype) -> Layers:
    layers = llama_mlp(scheme, dtype)
    layers.mixers = (Geglu(MLP_WIDTH),)
    layers.norm, layers.post_norm = GemmaRmsNorm(WIDTH, 1e-5), GemmaRmsNorm(WIDTH, 1e-5)
    return layers


def granite_mlp(scheme: str, dtype: torch.dtype) -> Layers:
    layers = llama_mlp(scheme, dtype)
    layers.scale = 0.4
    return layers


KINDS = {
    "gptj": gptj,
    "llama's attention": llama_attention,
    "llama's MLP": llama_mlp,
    "neox's MLP": neox_mlp,
    "olmo2's attention": olmo2_attention,
    "qwen3's attention": qwen3_attention,
    "gemma's attention": gemma_attention,
    "gemma's MLP": gemma_mlp,
    "granite's MLP": granite_mlp,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_save = pytest.mark.parametrize("save", list(Save))
both = pytest.mark.parametrize("packed", [False, True], ids=["a document a row", "packed, with padding"])


def layers_of(
    kind: str, scheme: str = "none", dtype: torch.dtype = torch.float32, *, all_trained: bool = True
) -> Layers:
    torch.manual_seed(0)
    layers = KINDS[kind](scheme, dtype)
    for norm in layers.norms:
        nn.init.normal_(norm.weight, mean=0 if isinstance(norm, GemmaRmsNorm) else 1, std=0.3)
        if isinstance(norm, LayerNorm):
            nn.init.normal_(norm.bias)
    if all_trained:
        layers.all.requires_grad_()
    return layers


def x_and_dy(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, dy = torch.randn(2, BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_(), dy.to(dtype)


def results(
    layers: Layers, x: Tensor, dy: Tensor, *, save: Save | None, packed: bool, use_8bit: bool = False
) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    leaves: dict[str, Tensor] = {**({"x": x} if x.requires_grad else {}), **layers.trained}
    y = layers.run(x, save=save, packed=packed, use_8bit=use_8bit)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, other in theirs.items():
        mine = ours[name]
        assert mine.dtype == other.dtype, name
        assert other.any(), name
        assert (mine.double() - other.double()).norm() <= tolerance * other.double().norm(), name


@every_kind
@pytest.mark.parametrize("scheme", SCHEMES)
@every_save
@both
def test_output_and_gradients_equal_those_of_the_reference(kind: str, scheme: str, save: Save, packed: bool) -> None:
    layers, (x, dy) = layers_of(kind, scheme), x_and_dy()
    names = {name.rpartition(".")[2] for name in layers.trained}
    assert names >= {"weight", "bias", "a", "b"}  # norms and biases too
    theirs = results(layers, x, dy, save=None, packed=packed)
    assert_near(results(layers, x, dy, save=save, packed=packed), theirs, 1e-5)


@every_kind
def test_in_8_bits_results_are_near_and_the_save_level_changes_no_bit(kind: str) -> None:
    layers, (x, dy) = layers_of(kind, "int8"), x_and_dy()
    exact = results(layers, x, dy, save=Save.ALL, packed=False)
    everything = results(layers, x, dy, save=Save.ALL, packed=False, use_8bit=True)
    assert_near(everything, exact, 0.1)
    assert not torch.equal(everything["y"], exact["y"])
    for save in (Save.INPUT, Save.ATTENTION):
        again = results(layers, x, dy, save=save, packed=False, use_8bit=True)
        assert all(torch.equal(again[name], wanted) for name, wanted in everything.items())


@every_kind
@every_save
@both
def test_the_first_layers_input_needs_no_gradient(kind: str, save: Save, packed: bool) -> None:
    for all_trained in (False, True):
        layers, (x, dy) = layers_of(kind, all_trained=all_trained), x_and_dy()
        theirs = results(layers, x.detach(), dy, save=None, packed=packed)
        assert ("x" in theirs, "0.weight" in theirs) == (False, all_trained)
        assert_near(results(layers, x.detach(), dy, save=save, packed=packed), theirs, 1e-5)


@every_kind
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_is_as_near_to_float32_as_the_reference(kind: str, scheme: str) -> None:
    layers, (x, dy) = layers_of(kind, scheme, torch.bfloat16), x_and_dy(torch.bfloat16)
    exact = layers_of(kind, scheme)
    for frozen in (exact.inner, *exact.outer):  # the same weights, rounded to bfloat16 or quantized
        if scheme == "none":
            parts = frozen.matrix.parts
            parts["weight"] = parts["weight"].bfloat16().float()
    expected = results(exact, x.detach().float().requires_grad_(), dy.float(), save=None, packed=True)
    theirs = results(layers, x, dy, save=None, packed=True)
    ours = results(layers, x, dy, save=Save.ATTENTION, packed=True)
    for name, true in expected.items():
        assert ours[name].dtype == theirs[name].dtype
        our_error, their_error = ((y[name].float() - true).norm() / true.norm() for y in (ours, theirs))
        assert our_error < 1.5 * their_error + 2e-3, name
        assert our_error < 0.03, name
