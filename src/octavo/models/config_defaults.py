"""The attributes of a family's Config that most families do not set (`DecoderConfig`, models/decoder.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.layers.norm import LayerNorm


@dataclass(frozen=True)
class ConfigDefaults:
    """What the Configs of most families say: each inherits it, and overrides what it has."""

    position_embedding = ""
    head_bias = False
    embedding_scale = 1.0
    output_scale = 1.0
    logit_softcap = None
    text_prefix: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class LayerNormConfig(ConfigDefaults):
    """Of the GPT families: LayerNorms, and heads that divide the width, each with keys and values of its own."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    norm_eps: float
    tied: bool
    context: int  # positions that the model was made for

    @property
    def key_value_heads(self) -> int:
        return self.heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    def new_norm(self) -> LayerNorm:
        return LayerNorm(self.width, self.norm_eps)
