"""GPT-2: learned positions, and a LayerNorm before attention and before the MLP; every linear has a bias.

    h = x + out_proj(attention(q, k, v))           q, k, v = qkv(norm_1(x))
    y = h + fc_out(gelu(fc_in(norm_2(h))))

The block is GPT-Neo's, with q, k and v in one module. Checkpoints store the linears of the blocks as Conv1D of
transformers, (K, N) in place of (N, K). Sources: Language Models are Unsupervised Multitask Learners (Radford et al.,
2019); scores divided by the number of the layer: Mistral (github.com/stanford-crfm/mistral).

Legend: D the size of a head, K inputs and N outputs of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from octavo.errors import ModelError
from octavo.layers.frozen import FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.models import gpt_neo
from octavo.models.config_fields import ConfigFields
from octavo.models.layer_attention import LayerAttention
from octavo.models.weight_map import WeightPath
from octavo.ops.attention import AttentionSpec


@dataclass(frozen=True)
class Config(gpt_neo.Config):
    """The sizes and settings of a config.json."""

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support.

        reorder_and_upcast_attn is ignored: it is about the precision of scores, which are float32 here in any case.
        """
        fields = ConfigFields(source)
        if fields.flag("add_cross_attention"):
            raise ModelError("The model's config asks for add_cross_attention, which octavo does not support.")
        width, heads, layers = fields.width("n_embd"), fields.heads("n_head"), fields.layers("n_layer")
        if width % heads:
            raise fields.wrong(f"n_embd is {width}, which n_head {heads} does not divide")
        return cls(
            vocabulary=fields.vocabulary(),
            width=width,
            mlp_width=fields.mlp_width("n_inner", default=4 * width),
            layers=layers,
            heads=heads,
            norm_eps=fields.epsilon("layer_norm_epsilon", default=1e-5),
            activation=gpt_neo.activation_of(fields),
            tied=fields.flag("tie_word_embeddings", default=True),
            context=fields.positions("n_positions", default=1024),
            attention=_attention(fields, layers, width // heads),
        )


def _attention(fields: ConfigFields, layers: int, head_size: int) -> tuple[LayerAttention, ...]:
    """Layer i scales its scores by 1 / sqrt(D), or by 1, and on request also by 1 / (i + 1)."""
    scale = head_size**-0.5 if fields.flag("scale_attn_weights", default=True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx")
    scales = [scale / (i + 1) if by_layer else scale for i in range(layers)]
    return tuple(LayerAttention(None, AttentionSpec(scale=each)) for each in scales)


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint; the rows of c_attn are those of q, k and v."""
    paths = {"transformer.wte": WeightPath("embed"), "transformer.wpe": WeightPath("positions")}
    for i in range(config.layers):
        layer, block = f"transformer.h.{i}", f"blocks.{i}"
        paths[f"{layer}.ln_1"] = WeightPath(f"{block}.norm_1")
        paths[f"{layer}.attn.c_attn"] = WeightPath(f"{block}.qkv", transposed=True)
        paths[f"{layer}.attn.c_proj"] = WeightPath(f"{block}.out", transposed=True)
        paths[f"{layer}.ln_2"] = WeightPath(f"{block}.norm_2")
        paths[f"{layer}.mlp.c_fc"] = WeightPath(f"{block}.fc_in", transposed=True)
        paths[f"{layer}.mlp.c_proj"] = WeightPath(f"{block}.fc_out", transposed=True)
    return paths | {"transformer.ln_f": WeightPath("norm"), "lm_head": WeightPath("head")}


class Block(gpt_neo.Block):
    """One decoder block: attention, then the MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d = config.width
        self.qkv = FrozenLinear(FrozenMatrix(d, {"c_attn": 3 * d}), bias=["c_attn"])
        self.out = FrozenLinear(FrozenMatrix(d, {"c_proj": d}), bias=["c_proj"])
