"""GPT-NeoX and Pythia: attention and MLP in parallel, each after a LayerNorm of its own.

    y = x + dense(attention(rope(q), rope(k), v)) + fc_out(gelu(fc_in(norm_2(x))))      q, k, v = qkv(norm_1(x))

Some derivatives add them one after the other (`parallel` is false): the MLP then reads the output of attention.
Checkpoints store q, k and v of one head after the other; here all q come first (`weight_map`). Sources: GPT-NeoX-20B
(arXiv 2204.06745), Pythia (2304.01373); rotary positions (2104.09864) on the first `rotary` values of each head.

Legend: B sequences of a batch, T positions, d the width, H heads, D the size of a head, F the width of the
MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.layers.block import attention, gelu, rope, split_heads
from octavo.layers.context import ForwardContext
from octavo.layers.frozen import FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.models.config_defaults import LayerNormConfig
from octavo.models.config_fields import ConfigFields
from octavo.models.layer_attention import LayerAttention
from octavo.models.rotary import DEFAULT_THETA, MAX_THETA, context_of, rotary_of
from octavo.models.weight_map import RowOrder, WeightPath
from octavo.ops.rotary import ROTATE_HALF

ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh"}  # hidden_act -> the form of GELU


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The sizes and settings of a config.json."""

    activation: str
    parallel: bool
    bias: bool  # of attention's linears
    attention: tuple[LayerAttention, ...]

    embedding = "embed_in"
    head = "embed_out"

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        fields = ConfigFields(source)
        if (act := fields.text("hidden_act", default="gelu")) not in ACTIVATIONS:
            raise ModelError(f"The model's config asks for the activation {shown(act)}; GPT-NeoX blocks have a GELU.")
        width, heads = fields.width(), fields.heads()
        if width % heads:
            raise fields.wrong(f"hidden_size is {width}, which num_attention_heads {heads} does not divide")
        # Older files have these two numbers, newer ones partial_rotary_factor and rope_theta in rope_parameters.
        share = fields.number("rotary_pct", least=0.0, most=1.0, default=0.25)
        theta = fields.number("rotary_emb_base", least=1.0, most=MAX_THETA, default=DEFAULT_THETA)
        others = {key: value for key, value in source.items() if key not in ("partial_rotary_factor", "rope_theta")}
        rotary = rotary_of(ConfigFields(others), width // heads, theta=theta, share=share)
        return cls(
            vocabulary=fields.vocabulary(),
            width=width,
            mlp_width=fields.mlp_width(),
            layers=(layers := fields.layers()),
            heads=heads,
            norm_eps=fields.epsilon("layer_norm_eps", default=1e-5),
            activation=act,
            parallel=fields.flag("use_parallel_residual", default=True),
            bias=fields.flag("attention_bias", default=True),
            tied=fields.flag("tie_word_embeddings"),
            context=context_of(fields),
            attention=(LayerAttention(rotary),) * layers,
        )


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint; rows (H, 3, D) of query_key_value become (3, H, D)."""
    paths = {"gpt_neox.embed_in": WeightPath("embed")}
    order = RowOrder((config.heads, 3, config.head_size), (1, 0, 2))
    for i in range(config.layers):
        layer, block = f"gpt_neox.layers.{i}", f"blocks.{i}"
        paths[f"{layer}.input_layernorm"] = WeightPath(f"{block}.norm_1")
        paths[f"{layer}.attention.query_key_value"] = WeightPath(f"{block}.qkv", order)
        paths[f"{layer}.attention.dense"] = WeightPath(f"{block}.dense")
        paths[f"{layer}.post_attention_layernorm"] = WeightPath(f"{block}.norm_2")
        paths[f"{layer}.mlp.dense_h_to_4h"] = WeightPath(f"{block}.fc_in")
        paths[f"{layer}.mlp.dense_4h_to_h"] = WeightPath(f"{block}.fc_out")
    return paths | {"gpt_neox.final_layer_norm": WeightPath("norm"), "embed_out": WeightPath("head", module="lm_head")}


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, d = config, config.width
        self.heads, self.head_size, self.parallel = c.heads, c.head_size, c.parallel
        self.mlp_width, self.gelu_form = c.mlp_width, ACTIVATIONS[c.activation]
        self.norm_1, self.norm_2 = c.new_norm(), c.new_norm()
        self.qkv = _linear(d, "query_key_value", 3 * d, bias=c.bias)
        self.dense = _linear(d, "dense", d, bias=c.bias)
        self.fc_in = _linear(d, "dense_h_to_4h", c.mlp_width)
        self.fc_out = _linear(c.mlp_width, "dense_4h_to_h", d)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        qkv = self.qkv(self.norm_1(x), ctx)  # (B, T, 3 d)
        qk, v = split_heads(qkv, 2 * self.heads, self.heads, size=self.head_size)  # (B, T, 2 H, D), (B, T, H, D)
        q, k = rope(qk, ctx, ROTATE_HALF).chunk(2, dim=2)  # (B, T, H, D) each
        h = self.dense(attention(q, k, v, ctx), ctx, residual=x)  # (B, T, d)
        up = self.fc_in(self.norm_2(x if self.parallel else h), ctx)  # (B, T, F)
        y: Tensor = self.fc_out(gelu(up, ctx, self.gelu_form), ctx, residual=h)  # (B, T, d)
        return y


def _linear(inputs: int, name: str, outputs: int, *, bias: bool = True) -> FrozenLinear:
    return FrozenLinear(FrozenMatrix(inputs, {name: outputs}), bias=[name] if bias else ())
