"""OLMo 2: a Llama block whose norms follow attention and MLP, with norms of q and k over all heads.

    h = x + rms(out(attention(rope(rms(q)), rope(rms(k)), v)))      q, k, v = qkv(x)
    y = h + rms(down(silu(gate) * up))                              gate, up = gate_up(h)

Source: 2 OLMo 2 Furious (arXiv 2501.00656), section 3.

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
from octavo.models.weight_map import WeightPath
from octavo.ops.rotary import ROTATE_HALF


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        return super().from_dict({"rms_norm_eps": 1e-5, "use_sliding_window": False, **source})


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint: those of a Llama, whose norms are after attention and MLP."""
    paths = llama.weight_map(config)
    for i in range(config.layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        del paths[f"{layer}.input_layernorm"]
        paths[f"{layer}.post_attention_layernorm"] = WeightPath(f"{block}.norm_1")
        paths[f"{layer}.post_feedforward_layernorm"] = WeightPath(f"{block}.norm_2")
        for name in ("q_norm", "k_norm"):
            paths[f"{layer}.self_attn.{name}"] = WeightPath(f"{block}.{name}")
    return paths


class Block(llama.Block):
    """One decoder block: attention, then the gated MLP; the norm of each result is added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.q_norm = RmsNorm(config.heads * config.head_size, config.norm_eps)
        self.k_norm = RmsNorm(config.key_value_heads * config.head_size, config.norm_eps)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        heads, kv_heads = self.heads, self.key_value_heads
        q, k, v = split_heads(self.qkv(x, ctx), heads, kv_heads, kv_heads, size=self.head_size)  # (B, T, H or G, D)
        q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)  # over all heads
        q, k = rope(q, ctx, ROTATE_HALF), rope(k, ctx, ROTATE_HALF)
        h = x + self.norm_1(self.out(attention(q, k, v, ctx), ctx))  # (B, T, d)
        mlp = swiglu(self.gate_up(h, ctx), ctx)  # (B, T, F)
        y: Tensor = h + self.norm_2(self.down(mlp, ctx))  # (B, T, d)
        return y
