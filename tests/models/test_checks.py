"""Mistakes in a family are errors before weights are read, and name the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.layers.norm import RmsNorm
from octavo.models import build, gpt_neox, llama
from octavo.models.weight_map import RowOrder, WeightPath

LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4,
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
        "the rows q_proj of blocks.0.qkv two modules: model.layers.0.self_attn.q_proj and model.layers.1.self",
    ),
    "a module on a block": (llama, LLAMA, placed(NORM, WeightPath("blocks.1")), "parameter blocks.1.norm_1.weight"),
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


def test_a_parameter_that_no_checkpoint_fills_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(RmsNorm):
        def __init__(self, width: int, eps: float) -> None:
            super().__init__(width, eps)
            self.scale = self.weight

    monkeypatch.setattr(llama.Config, "new_norm", lambda config: Scaled(config.width, config.norm_eps))
    build(LLAMA)  # the same parameter under two names has one value
    monkeypatch.setattr(Scaled, "__init__", with_scale)
    with pytest.raises(ModelError, match=r"no module for the parameter norm\.scale"):
        build(LLAMA)


def with_scale(norm: Any, width: int, eps: float) -> None:
    RmsNorm.__init__(norm, width, eps)
    norm.scale = type(norm.weight)(norm.weight.new_empty(width), requires_grad=False)


def test_a_config_without_what_the_decoder_reads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(llama.Config, "head_bias")
    with pytest.raises(ModelError, match=r"models\.llama\.Config lacks head_bias"):
        build(LLAMA)


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=["llama", "neox"])
def test_a_tied_head_has_no_rows_of_its_own(config: dict[str, Any]) -> None:
    decoder = build({**config, "tie_word_embeddings": True})
    assert decoder.head.matrix is decoder.embed.matrix
