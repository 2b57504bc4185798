"""GPT-Neo: learned positions, full and windowed attention in turns, and scores that are not scaled.

    h = x + out_proj(attention(q, k, v))           q, k, v = qkv(norm_1(x)), without a bias
    y = h + fc_out(gelu(fc_in(norm_2(h))))

The first x is wte[token] + wpe[position]. Attention is the softmax of q k^T itself; in "local" layers a position sees
the last `window_size` ones. Source: GPT-Neo (doi 10.5281/zenodo.5297715).

Legend: B sequences of a batch, T positions, d the width, H heads, D the size of a head, F the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.layers.block import attention, gelu, split_heads
from octavo.layers.context import ForwardContext
from octavo.layers.frozen import FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.models.config_defaults import LayerNormConfig
from octavo.models.config_fields import MAX_LAYERS, ConfigFields
from octavo.models.layer_attention import LayerAttention
from octavo.models.weight_map import WeightPath
from octavo.ops.attention import AttentionSpec

ACTIVATIONS = {"gelu": "none"} | dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "tanh")  # forms of GELU
GLOBAL, LOCAL = "global", "local"  # the kinds of attention in a config.json


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The sizes and settings of a config.json."""

    activation: str
    attention: tuple[LayerAttention, ...]

    embedding = "wte"
    head = "lm_head"
    position_embedding = "wpe"

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        fields = ConfigFields(source)
        width, heads = fields.width(), fields.heads("num_heads")
        if width % heads:
            raise fields.wrong(f"hidden_size is {width}, which num_heads {heads} does not divide")
        layers, window = fields.layers("num_layers"), fields.positions("window_size", default=256)
        return cls(
            vocabulary=fields.vocabulary(),
            width=width,
            mlp_width=fields.mlp_width(default=4 * width),
            layers=layers,
            heads=heads,
            norm_eps=fields.epsilon("layer_norm_epsilon", default=1e-5),
            activation=activation_of(fields),
            tied=fields.flag("tie_word_embeddings", default=True),
            context=fields.positions(),
            attention=tuple(
                LayerAttention(None, AttentionSpec(scale=1.0, window=window if kind == LOCAL else None))
                for kind in _attention_layers(fields, layers)
            ),
        )


def activation_of(fields: ConfigFields) -> str:
    """The name of the activation, a key of ACTIVATIONS."""
    if (act := fields.text("activation_function", default="gelu_new")) not in ACTIVATIONS:
        raise ModelError(
            f"The model's config asks for the activation {shown(act)}; the blocks of GPT-2 and GPT-Neo have a GELU.",
            hint=f"octavo supports {', '.join(ACTIVATIONS)}.",
        )
    return act


def _attention_layers(fields: ConfigFields, layers: int) -> Sequence[str]:
    """GLOBAL or LOCAL for each layer, from attention_layers or attention_types; in turns if the config has neither."""
    kinds = fields.texts("attention_layers") or _expanded(fields) or [(GLOBAL, LOCAL)[i % 2] for i in range(layers)]
    if len(kinds) != layers or not {*kinds} <= {GLOBAL, LOCAL}:
        raise fields.wrong(
            f"the attention of its layers is {shown(kinds)}; it must be {GLOBAL} or {LOCAL} for each of {layers} layers"
        )
    return kinds


def _expanded(fields: ConfigFields) -> list[str]:
    """The kinds of [[kinds, repetitions], ..] in attention_types, one for each layer; [] without this key."""
    groups, kinds = fields.source.get("attention_types"), list[str]()
    wrong = fields.wrong(f"attention_types is {shown(groups)}; it must be a list of [[kind, ..], repetitions]")
    if not isinstance(groups or [], list):
        raise wrong
    for group in groups or []:
        if not isinstance(group, list) or len(group) != 2:
            raise wrong
        repeated = ConfigFields({"attention_types": group[0], "repetitions": group[1]}, fields.where)
        kinds += repeated.texts("attention_types") * repeated.size("repetitions", most=MAX_LAYERS)
        if len(kinds) > MAX_LAYERS:
            raise wrong
    return kinds


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint."""
    names = {"transformer.wte": "embed", "transformer.wpe": "positions"}
    for i in range(config.layers):
        layer, block = f"transformer.h.{i}", f"blocks.{i}"
        names[f"{layer}.ln_1"] = f"{block}.norm_1"
        for name in ("q_proj", "k_proj", "v_proj"):
            names[f"{layer}.attn.attention.{name}"] = f"{block}.qkv"
        names[f"{layer}.attn.attention.out_proj"] = f"{block}.out"
        names[f"{layer}.ln_2"] = f"{block}.norm_2"
        names[f"{layer}.mlp.c_fc"] = f"{block}.fc_in"
        names[f"{layer}.mlp.c_proj"] = f"{block}.fc_out"
    names |= {"transformer.ln_f": "norm", "lm_head": "head"}
    return {name: WeightPath(path) for name, path in names.items()}


class Block(nn.Module):
    """One decoder block: attention, then the MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, d = config, config.width
        self.heads, self.head_size, self.mlp_width = c.heads, c.head_size, c.mlp_width
        self.gelu_form = ACTIVATIONS[c.activation]
        self.norm_1, self.norm_2 = c.new_norm(), c.new_norm()
        self.qkv = FrozenLinear(FrozenMatrix(d, {"q_proj": d, "k_proj": d, "v_proj": d}))
        self.out = FrozenLinear(FrozenMatrix(d, {"out_proj": d}), bias=["out_proj"])
        self.fc_in = FrozenLinear(FrozenMatrix(d, {"c_fc": c.mlp_width}), bias=["c_fc"])
        self.fc_out = FrozenLinear(FrozenMatrix(c.mlp_width, {"c_proj": d}), bias=["c_proj"])

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        heads = self.heads
        q, k, v = split_heads(self.qkv(self.norm_1(x), ctx), heads, heads, heads, size=self.head_size)  # (B, T, H, D)
        h = self.out(attention(q, k, v, ctx), ctx, residual=x)  # (B, T, d)
        up = self.fc_in(self.norm_2(h), ctx)  # (B, T, F)
        y: Tensor = self.fc_out(gelu(up, ctx, self.gelu_form), ctx, residual=h)  # (B, T, d)
        return y
