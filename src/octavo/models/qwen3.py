"""Qwen3: a Llama block whose queries and keys are normalized for each head before they are rotated.

    h = x + out(attention(rope(rms(q)), rope(rms(k)), v))      q, k, v = qkv(rms(x))
    y = h + down(silu(gate) * up)                              gate, up = gate_up(rms(h))

Source: Qwen3 technical report (arXiv 2505.09388), section 2; the norms of q and k are those of ViT-22B (2302.05442).

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
from octavo.layers.norm import RmsNorm
from octavo.models import llama
from octavo.models.config_fields import ConfigFields
from octavo.models.weight_map import WeightPath
from octavo.ops.rotary import ROTATE_HALF

HEAD_SIZE = 128  # where config.json names none


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        return super().from_dict({"head_dim": HEAD_SIZE, **source})

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """Whether each layer has a sliding window."""
        return llama.qwen_sliding(fields, layers)


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint: those of a Llama, and the norms of q and k."""
    paths = llama.weight_map(config)
    for i in range(config.layers):
        for name in ("q_norm", "k_norm"):
            paths[f"model.layers.{i}.self_attn.{name}"] = WeightPath(f"blocks.{i}.{name}")
    return paths


class Block(llama.Block):
    """One decoder block: attention, then the gated MLP, each after its norm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.q_norm = RmsNorm(config.head_size, config.norm_eps)
        self.k_norm = RmsNorm(config.head_size, config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        heads, kv_heads = self.heads, self.key_value_heads
        qkv = self.qkv(self.norm_1(x), ctx)  # (B, T, (H + 2 G) D)
        q, k, v = split_heads(qkv, heads, kv_heads, kv_heads, size=self.head_size)  # (B, T, H or G, D) each
        q, k = rope(self.q_norm(q), ctx, ROTATE_HALF), rope(self.k_norm(k), ctx, ROTATE_HALF)  # the norms are over D
        h = self.out(attention(q, k, v, ctx), ctx, residual=x)  # (B, T, d)
        mlp = swiglu(self.gate_up(self.norm_2(h), ctx), ctx)  # (B, T, F)
        y: Tensor = self.down(mlp, ctx, residual=h)  # (B, T, d)
        return y
