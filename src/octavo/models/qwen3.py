"""Qwen3: a Llama block whose queries and keys are normalized for each head before they are rotated.

    h = x + out(attention(rope(rms(q)), rope(rms(k)), v))      q, k, v = qkv(rms(x))
    y = h + down(silu(gate) * up)                              gate, up = gate_up(rms(h))

Source: Qwen3 technical report (arXiv 2505.09388), section 2; the norms of q and k are those of ViT-22B (2302.05442).

Legend: B sequences of a batch, T positions, d the width, H query heads, G key/value heads, D the size of a head.
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
from octavo.models.weight_map import WeightPath
from octavo.ops.attention import HALF

HEAD_SIZE = 128  # where config.json names none


@dataclass(frozen=True)
class Config(llama.Config):
    """What config.json says, under the names of the legend."""

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        return super().from_dict({"head_dim": HEAD_SIZE, "use_sliding_window": False, **source})


def weight_map(config: Config) -> dict[str, WeightPath]:
    """Where each module of a checkpoint is in the decoder: those of a Llama, and the norms of q and k."""
    paths = llama.weight_map(config)
    for i in range(config.layers):
        for name in ("q_norm", "k_norm"):
            paths[f"model.layers.{i}.self_attn.{name}"] = WeightPath(f"blocks.{i}.{name}")
    return paths


class Block(llama.Block):
    """One layer: attention, then the gated MLP, each after its norm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.q_norm = RmsNorm(config.head_size, config.norm_eps)
        self.k_norm = RmsNorm(config.head_size, config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        qkv = self.qkv(self.norm_1(x), ctx)
        q, k, v = split_heads(qkv, self.heads, self.groups, self.groups, size=self.head_size)  # (B, T, H or G, D)
        q, k = rope(self.q_norm(q), ctx, HALF), rope(self.k_norm(k), ctx, HALF)
        x = self.out(attention(q, k, v, ctx), ctx, residual=x)
        y: Tensor = self.down(swiglu(self.gate_up(self.norm_2(x), ctx), ctx), ctx, residual=x)
        return y
