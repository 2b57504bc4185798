"""GPT-J: one norm, then attention and MLP in parallel.

    y = x + out_proj(attention(rope(q), rope(k), v)) + fc_out(gelu(up))      q, k, v, up = in_proj(norm(x))

q, k, v and fc_in read the same input, so they are one matrix of stacked rows. Source: Mesh Transformer JAX
(github.com/kingoflolz/mesh-transformer-jax); rotary positions (arXiv 2104.09864) on the first `rotary` values
of each head, in pairs (2i, 2i+1).

Legend: B sequences of a batch, T positions, d the width, H heads, D the size of a head, F the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from torch import Tensor, nn

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.layers.block import attention, gelu, rope, split_heads
from octavo.layers.context import ForwardContext
from octavo.layers.frozen import FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.norm import LayerNorm
from octavo.models.config_defaults import LayerNormConfig
from octavo.models.config_fields import ConfigFields
from octavo.models.layer_attention import LayerAttention
from octavo.models.rotary import DEFAULT_THETA, Rotary, default_frequencies
from octavo.models.weight_map import WeightPath
from octavo.ops.rotary import ROTATE_INTERLEAVED


@dataclass(frozen=True)
class Config(LayerNormConfig):
    """The sizes and settings of a config.json."""

    rotary: int

    @cached_property
    def attention(self) -> tuple[LayerAttention, ...]:
        rotary = Rotary(tuple(default_frequencies(DEFAULT_THETA, self.rotary).tolist()))
        return (LayerAttention(rotary),) * self.layers

    embedding = "wte"
    head = "lm_head"
    head_bias = True

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not know."""
        fields = ConfigFields(source)
        act = fields.text("activation_function", default="gelu_new")
        if act != "gelu_new":
            raise ModelError(f"The model's config asks for the activation {shown(act)}; a GPT-J block has gelu_new.")
        width, heads = fields.width("n_embd"), fields.heads("n_head")
        if width % heads:
            raise fields.wrong(f"n_embd is {width}, which n_head {heads} does not divide")
        rotary = fields.head_size("rotary_dim", default=width // heads)
        if rotary % 2 or rotary > width // heads:
            raise fields.wrong(f"rotary_dim is {rotary}; it must be even and at most {width // heads}, a head's size")
        return cls(
            vocabulary=fields.vocabulary(),
            width=width,
            mlp_width=fields.mlp_width("n_inner", default=4 * width),
            layers=fields.layers("n_layer"),
            heads=heads,
            rotary=rotary,
            norm_eps=fields.epsilon("layer_norm_epsilon", default=1e-5),
            tied=fields.flag("tie_word_embeddings"),
            context=fields.positions("n_positions"),
        )


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer (module of the decoder) of each module of a checkpoint. Several in one layer are rows of its matrix."""
    names = {"transformer.wte": "embed"}
    for i in range(config.layers):
        block = f"transformer.h.{i}"
        names[f"{block}.ln_1"] = f"blocks.{i}.norm"
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"):
            names[f"{block}.{name}"] = f"blocks.{i}.in_proj"
        names[f"{block}.attn.out_proj"] = f"blocks.{i}.out_proj"
        names[f"{block}.mlp.fc_out"] = f"blocks.{i}.fc_out"
    names |= {"transformer.ln_f": "norm", "lm_head": "head"}
    return {name: WeightPath(path) for name, path in names.items()}


class Block(nn.Module):
    """One decoder block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, mlp = config.width, config.mlp_width
        self.heads, self.head_size, self.mlp_width = config.heads, config.head_size, mlp
        self.norm = LayerNorm(d, config.norm_eps)
        self.in_proj = FrozenLinear(
            FrozenMatrix(d, {"q_proj": d, "k_proj": d, "v_proj": d, "fc_in": mlp}), bias=["fc_in"]
        )
        self.out_proj = FrozenLinear(FrozenMatrix(d, {"out_proj": d}))
        self.fc_out = FrozenLinear(FrozenMatrix(mlp, {"fc_out": d}), bias=["fc_out"])

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        qkv, up = self.in_proj(self.norm(x), ctx).split([3 * x.shape[-1], self.mlp_width], dim=-1)  # 3 d and F values
        qk, v = split_heads(qkv, 2 * self.heads, self.heads, size=self.head_size)  # (B, T, 2 H, D), (B, T, H, D)
        q, k = rope(qk, ctx, ROTATE_INTERLEAVED).chunk(2, dim=2)  # (B, T, H, D) each
        h = self.out_proj(attention(q, k, v, ctx), ctx, residual=x)  # (B, T, d)
        y: Tensor = self.fc_out(gelu(up, ctx), ctx, residual=h)  # (B, T, d)
        return y
