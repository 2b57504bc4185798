"""Granite 3: a Llama with four scalars (muP-like multipliers).

    x = e * embedding                                             e embedding_multiplier
    h = x + r out(attention(rope(q), rope(k), v))                 r residual_multiplier; scores are a q k^T,
    y = h + r down(silu(gate) * up)                               a attention_multiplier in place of 1 / sqrt(D)
    logits = head(rms(y)) / s                                     s logits_scaling

Sources: Granite 3.0 Language Models (IBM, 2024); the multipliers are those of muP (arXiv 2203.03466).

Legend: B sequences of a batch, T positions, d the width, H query heads, G key/value heads, D the size of a head,
F the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from octavo.layers.block import attention, rope, split_heads, swiglu
from octavo.layers.context import ForwardContext
from octavo.models import llama
from octavo.models.config_fields import ConfigFields
from octavo.ops.attention import AttentionSpec
from octavo.ops.rotary import ROTATE_HALF

MAX_MULTIPLIER = 1e4  # far above published models


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    embedding_multiplier: float
    logits_scaling: float
    residual_multiplier: float
    attention_multiplier: float  # the scale of scores

    @property
    def embedding_scale(self) -> float:  # type: ignore[override]
        return self.embedding_multiplier

    @property
    def output_scale(self) -> float:  # type: ignore[override]
        """The head has no bias, so its input is scaled instead of the logits."""
        return 1 / self.logits_scaling

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        base, settings = llama.Config.from_dict(source), ConfigFields(source)
        multipliers: dict[str, Any] = {
            key: settings.number(key, least=1e-6, most=MAX_MULTIPLIER, default=1.0)
            for key in ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
        }
        spec = AttentionSpec(scale=multipliers["attention_multiplier"])
        layers = tuple(layer._replace(spec=spec) for layer in base.attention)
        return cls(**{**vars(base), "attention": layers}, **multipliers)


weight_map = llama.weight_map


class Block(llama.Block):
    """One decoder block: attention, then the gated MLP, each after its norm, scaled and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.residual_scale = config.residual_multiplier

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        heads, kv_heads = self.heads, self.key_value_heads
        qkv = self.qkv(self.norm_1(x), ctx)  # (B, T, (H + 2 G) D)
        qk, v = split_heads(qkv, heads + kv_heads, kv_heads, size=self.head_size)  # (B, T, H + G, D), (B, T, G, D)
        q, k = rope(qk, ctx, ROTATE_HALF).split([heads, kv_heads], dim=2)  # (B, T, H, D), (B, T, G, D)
        h = x + self.out(attention(q, k, v, ctx), ctx) * self.residual_scale  # (B, T, d)
        mlp = swiglu(self.gate_up(self.norm_2(h), ctx), ctx)  # (B, T, F)
        y: Tensor = h + self.down(mlp, ctx) * self.residual_scale  # (B, T, d)
        return y
