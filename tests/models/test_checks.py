"""Mistakes in a family are errors before weights are read, and name the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from octavo.errors import ModelError
from octavo.models import build, gpt_neox, llama
from octavo.models.config_defaults import ConfigDefaults
from octavo.models.rotary import Rotary
from octavo.models.weight_map import RowOrder, WeightPath

LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "rotary_pct": 0.5,
}  # fmt: skip
Q, GATE, NORM = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.input_layernorm"
QKV = "gpt_neox.layers.1.attention.query_key_value"
Change = Callable[[dict[str, WeightPath]], dict[str, WeightPath]]


def without(name: str) -> Change:
    return lambda paths: {key: path for key, path in paths.items() if key != name}


def placed(name: str, path: WeightPath) -> Change:
    return lambda paths: {**paths, name: path}


MISTAKES: dict[str, tuple[Any, dict[str, Any], Change, str]] = {
    "an output without a module": (
        llama, LLAMA, without(Q), "no module for the rows q_proj of blocks.1.qkv and 1 more"
    ),
    "a norm without a module": (llama, LLAMA, without(NORM), "no module for the parameter blocks.1.norm_1.weight"),
    "a path that does not exist": (
        llama, LLAMA, placed(GATE, WeightPath("blocks.1.gateup")),
        "'blocks.1.gateup', which the decoder does not have; blocks.1 has norm_1, qkv, out, norm_2, gate_up, down",
    ),
    "a block that does not exist": (llama, LLAMA, placed(GATE, WeightPath("blocks.7.gate_up")), "'blocks.7.gate_up'"),
    "a layer of other outputs": (
        llama, LLAMA, placed(Q, WeightPath("blocks.1.out")), "a matrix whose outputs are o_proj: none is q_proj"
    ),
    "a path of another block": (
        llama, LLAMA, placed(Q, WeightPath("blocks.0.qkv")),
        "gives model.layers.1.self_attn.q_proj the layer 'blocks.0.qkv', of another block",
    ),
    "a module on a block": (llama, LLAMA, placed(NORM, WeightPath("blocks.1")), "parameter blocks.1.norm_1.weight"),
    "blocks exchanged": (
        llama, LLAMA,
        lambda paths: {**paths, Q: WeightPath("blocks.0.qkv"), Q.replace("1", "0", 1): WeightPath("blocks.1.qkv")},
        "of another block",
    ),
    "two modules of one name in PEFT": (
        llama, LLAMA, placed("lm_head", WeightPath("head", module="model.norm")), "model.norm and lm_head one module"
    ),
    "a row order of a norm, of too few values": (
        llama, LLAMA, placed(NORM, WeightPath("blocks.1.norm_1", RowOrder((4, 3), (1, 0)))), "none of {16} values"
    ),
    "negative sizes": (
        gpt_neox, NEOX, placed(QKV, WeightPath("blocks.1.qkv", RowOrder((-4, -12), (0, 1)))), "none of 48 rows"
    ),
    "a row order of tokens": (
        llama, LLAMA, placed("model.embed_tokens", WeightPath("embed", RowOrder((4, 8), (1, 0)))),
        "in the order of the token ids",
    ),
    "a transposed norm": (llama, LLAMA, placed(NORM, WeightPath("blocks.1.norm_1", transposed=True)), "no linear"),
    "a transposed head": (llama, LLAMA, placed("lm_head", WeightPath("head", transposed=True)), "head is transposed"),
    "two names of a norm": (llama, LLAMA, placed("model.extra", WeightPath("norm")), "model.norm and model.extra"),
    "a row order of too few rows": (
        gpt_neox, NEOX, placed(QKV, WeightPath("blocks.1.qkv", RowOrder((4, 3, 2), (1, 0, 2)))), "none of 48 rows"
    ),
    "an axis twice": (
        gpt_neox, NEOX, placed(QKV, WeightPath("blocks.1.qkv", RowOrder((4, 3, 4), (1, 0, 0)))), "none of 48 rows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_weight_map_is_an_error_that_names_the_place(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config, change, message = MISTAKES[case]
    build(config)
    right = family.weight_map
    monkeypatch.setattr(family, "weight_map", lambda parsed: change(right(parsed)))
    with pytest.raises(ModelError) as error:
        build(config)
    assert message in str(error.value)
    assert "docs/adding-a-model.md" in error.value.hint


def with_scale(layer: Any) -> None:
    layer.scale = nn.Parameter(torch.empty(1), requires_grad=False)


def with_second_name(layer: Any) -> None:
    layer.scale = next(layer.parameters())


def with_buffer(layer: Any) -> None:
    layer.register_buffer("mask", torch.empty(1))


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("norm_1", with_scale, "no module for the parameter blocks.0.norm_1.scale and 1 more"),
        ("out", with_scale, "no module for the parameter blocks.0.out.scale and 1 more"),
        ("", with_scale, "no module for the parameter blocks.0.scale and 1 more"),
        ("norm_1", with_second_name, "weight, scale of blocks.0.norm_1 are one parameter"),
        ("out", with_second_name, "bias, scale of blocks.0.out are one parameter"),
        ("norm_1", with_buffer, "blocks.0.norm_1 has the buffer mask"),
        ("", with_buffer, "blocks.0 has the buffer mask"),
    ],
)
def test_what_loading_does_not_fill_is_an_error(
    layer: str, change: Callable[[Any], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = llama.Block.__init__

    def init(block: llama.Block, config: llama.Config) -> None:
        original(block, config)
        change(block.get_submodule(layer))

    monkeypatch.setattr(llama.Block, "__init__", init)
    with pytest.raises(ModelError, match=message):
        build(LLAMA)


def test_frequencies_for_more_values_than_a_head_has_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "rotary_of", lambda *_, **__: Rotary((1.0, 1.0, 1.0)))
    with pytest.raises(ModelError, match=r"rotates 6 values of a head of 4"):
        build(LLAMA)


def test_a_config_without_what_the_decoder_reads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ConfigDefaults, "head_bias")
    with pytest.raises(ModelError, match=r"models\.llama\.Config lacks head_bias"):
        build(LLAMA)


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=["llama", "neox"])
def test_a_tied_head_has_no_rows_of_its_own(config: dict[str, Any]) -> None:
    decoder = build({**config, "tie_word_embeddings": True})
    assert decoder.head.matrix is decoder.embed.matrix
