"""Gemma 3, the language model: a Gemma 2 block with norms of q and k for each head, and two kinds of rotary positions.

    h = x + norm_2(out(attention(rope(rms(q)), rope(rms(k)), v)))      q, k, v = qkv(norm_1(x))
    y = h + norm_4(down(gelu(gate) * up))                              gate, up = gate_up(norm_3(h))

All norms are x / rms(x) * (1 + weight). Five layers with a sliding window are followed by one without. The layers with
a window have rotary positions of their own, with a smaller base; those of the others are scaled in long contexts.
Scores are not soft-capped.

Source: Gemma 3 (arXiv 2503.19786), section 2.

Legend: B sequences of a batch, T positions, H query heads, G key/value heads, D the size of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.layers.block import attention, rope, split_heads
from octavo.layers.context import ForwardContext
from octavo.layers.norm import GemmaRmsNorm
from octavo.models import gemma2
from octavo.models.config_fields import MAX_LAYERS, ConfigFields
from octavo.models.layer_attention import FULL, SLIDING, sliding_layers
from octavo.models.rotary import context_of, rotary_of
from octavo.models.weight_map import WeightPath
from octavo.ops.rotary import ROTATE_HALF

PATTERN = 6  # every sixth layer has no window, where config.json does not say which
THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}  # the base of rotary positions, where config.json does not say
OLDER_THETA = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}  # its key in older files


@dataclass(frozen=True)
class Config(gemma2.Config):
    """The sizes and settings of a config.json."""

    defaults = MappingProxyType({
        **gemma2.DEFAULTS, "vocab_size": 262_208, "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
    })  # fmt: skip

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        fields = ConfigFields({**cls.defaults, **source})
        if (softcap := fields.source["attn_logit_softcapping"]) is not None:
            raise ModelError(
                f"The model's config asks for soft-capped scores: attn_logit_softcapping is {shown(softcap)}.",
                hint="A Gemma 3 has none: transformers ignores this value.",
            )
        base, rope_of = super().from_dict(source), {kind: _rope_settings(fields, kind) for kind in (FULL, SLIDING)}
        rotary = {kind: rotary_of(rope_of[kind], base.head_size, theta=THETA[kind]) for kind in (FULL, SLIDING)}
        layers = [
            layer._replace(rotary=rotary[SLIDING if slides else FULL])
            for layer, slides in zip(base.attention, cls.sliding(fields, base.layers), strict=True)
        ]
        return replace(base, attention=tuple(layers), context=context_of(rope_of[FULL]))

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """Whether each layer has a sliding window."""
        every = fields.size("sliding_window_pattern", most=MAX_LAYERS, default=PATTERN)
        return sliding_layers(fields, [(layer + 1) % every != 0 for layer in range(layers)])


def _rope_settings(fields: ConfigFields, kind: str) -> ConfigFields:
    """The rotary settings of one type of layers, as `rotary_of` reads those of a model with one type.

    `rope_parameters` has an object for each type. Released files have a `rope_scaling` of the layers without a window,
    which wins as in transformers, and a key for each base.
    """
    both, scaling = fields.object("rope_parameters"), fields.object("rope_scaling")
    if both is not None and not {FULL, SLIDING} & both.source.keys():
        raise fields.wrong(f"rope_parameters has settings of neither {FULL} nor {SLIDING}")
    given = both.object(kind) if both is not None else None
    settings = {**given.source} if given is not None else {}
    if kind == FULL and scaling is not None:
        settings |= scaling.source
    return ConfigFields(
        {
            "max_position_embeddings": fields.positions(),
            "rope_theta": fields.source.get(OLDER_THETA[kind]),
            "rope_parameters": settings,
        }
    )


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint: those of a Gemma 2, and the norms of q and k."""
    paths = gemma2.weight_map(config)
    for i in range(config.layers):
        for name in ("q_norm", "k_norm"):
            paths[f"model.layers.{i}.self_attn.{name}"] = WeightPath(f"blocks.{i}.{name}")
    return paths


class Block(gemma2.Block):
    """One decoder block: attention, then the gated MLP; each between two norms, and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.q_norm = GemmaRmsNorm(config.head_size, config.norm_eps)
        self.k_norm = GemmaRmsNorm(config.head_size, config.norm_eps)

    def attend(self, qkv: Tensor, ctx: ForwardContext) -> Tensor:
        """qkv (B, T, (H + 2 G) D) -> (B, T, H D)."""
        heads, kv_heads = self.heads, self.key_value_heads
        q, k, v = split_heads(qkv, heads, kv_heads, kv_heads, size=self.head_size)  # (B, T, H or G, D) each
        q, k = rope(self.q_norm(q), ctx, ROTATE_HALF), rope(self.k_norm(k), ctx, ROTATE_HALF)  # the norms are over D
        return attention(q, k, v, ctx)
