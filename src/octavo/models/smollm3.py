"""SmolLM3: a Llama block in which some layers have no rotary positions.

    h = x + out(attention(q, k, v))      q, k, v = qkv(rms(x)); q and k rotated in three of four layers
    y = h + down(silu(gate) * up)        gate, up = gate_up(rms(h))

Sources: SmolLM3 (huggingface.co/blog/smollm3); RoPE and NoPE layers in turns (arXiv 2501.18795).

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
from octavo.models.config_fields import MAX_LAYERS, ConfigFields
from octavo.ops.attention import ROTATE_HALF

ROPE_THETA = 2_000_000.0  # where config.json names none
INTERVAL = 4  # every fourth layer has no rotary positions, where config.json does not say which


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    rotary_layers: tuple[bool, ...]  # whether each layer rotates q and k

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        settings = ConfigFields(source)
        theta = {} if settings.object("rope_parameters") else {"rope_theta": ROPE_THETA}
        defaults = {"tie_word_embeddings": True, "use_sliding_window": False}
        base = llama.Config.from_dict({**defaults, **theta, **source})
        if settings.flag("use_sliding_window"):
            raise settings.wrong("use_sliding_window is true, which octavo does not support for SmolLM3")
        interval = settings.size("no_rope_layer_interval", most=MAX_LAYERS, default=INTERVAL)
        rotary = settings.flags("no_rope_layers", default=[(i + 1) % interval != 0 for i in range(base.layers)])
        if len(rotary) != base.layers:
            raise settings.wrong(f"no_rope_layers has {len(rotary)} values for {base.layers} layers")
        return cls(**vars(base), rotary_layers=tuple(rotary))


weight_map = llama.weight_map


class Block(llama.Block):
    """One decoder block: attention, then the gated MLP, each after its norm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rotary_layers = config.rotary_layers

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        heads, kv_heads = self.heads, self.key_value_heads
        qkv = self.qkv(self.norm_1(x), ctx)  # (B, T, (H + 2 G) D)
        qk, v = split_heads(qkv, heads + kv_heads, kv_heads, size=self.head_size)  # (B, T, H + G, D), (B, T, G, D)
        if self.rotary_layers[ctx.layer]:
            qk = rope(qk, ctx, ROTATE_HALF)
        q, k = qk.split([heads, kv_heads], dim=2)  # (B, T, H, D), (B, T, G, D)
        h = self.out(attention(q, k, v, ctx), ctx, residual=x)  # (B, T, d)
        mlp = swiglu(self.gate_up(self.norm_2(h), ctx), ctx)  # (B, T, F)
        y: Tensor = self.down(mlp, ctx, residual=h)  # (B, T, d)
        return y
