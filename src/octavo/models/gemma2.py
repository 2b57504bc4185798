"""Gemma 2: a Llama block with a GEGLU and a norm before and after each branch, and soft-capped scores and logits.

    x = e * embedding                                        e = sqrt(d), rounded to the type of x
    h = x + norm_2(out(attention(rope(q), rope(k), v)))      q, k, v = qkv(norm_1(x))
    y = h + norm_4(down(gelu(gate) * up))                    gate, up = gate_up(norm_3(h))
    logits = c tanh(head(norm(y)) / c)                       c final_logit_softcapping

The norms are x / rms(x) * (1 + weight). Scores are a q k^T with a = query_pre_attn_scalar^-0.5, soft-capped with
attn_logit_softcapping. Every second layer, from the first on, has a sliding window.

Source: Gemma 2 (arXiv 2408.00118), section 2; GEGLU (2002.05202).

Legend: B sequences of a batch, T positions, d the width, H query heads, G key/value heads, D the size of a head,
F the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from octavo.errors import ModelError
from octavo.layers.block import attention, geglu, rope, split_heads
from octavo.layers.context import ForwardContext
from octavo.layers.norm import GemmaRmsNorm
from octavo.models import llama
from octavo.models.config_fields import ConfigFields
from octavo.models.layer_attention import sliding_layers
from octavo.models.weight_map import WeightPath
from octavo.ops.rotary import ROTATE_HALF

MAX_SOFTCAP, MAX_SCALAR = 1e6, 1e9  # far above published models
# Of keys that a config.json lacks, as in transformers: the files of Gemma contain only what differs.
DEFAULTS: Mapping[str, Any] = MappingProxyType({
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
})  # fmt: skip


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    final_softcap: float | None = None

    activation_key, activation = "hidden_activation", "gelu_pytorch_tanh"
    defaults = DEFAULTS

    @property
    def embedding_scale(self) -> float:  # type: ignore[override]
        return float(self.width**0.5)

    @property
    def logit_softcap(self) -> float | None:  # type: ignore[override]
        return self.final_softcap

    def new_norm(self) -> GemmaRmsNorm:
        return GemmaRmsNorm(self.width, self.norm_eps)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        fields = ConfigFields({**cls.defaults, **source, "mlp_bias": False})  # the MLP of a Gemma never has biases
        if fields.flag("use_bidirectional_attention"):
            raise ModelError(
                "The model's config asks for attention in both directions: use_bidirectional_attention is true.",
                hint="octavo supports causal attention. Embedding models with such attention are no language models.",
            )
        fields.text("hidden_act", default="")  # in files of Gemma 2 too: hidden_activation counts, as in transformers
        base = super().from_dict(fields.source)
        scale = fields.number("query_pre_attn_scalar", least=1e-6, most=MAX_SCALAR) ** -0.5
        softcap = softcap_of(fields, "attn_logit_softcapping")
        layers = [layer._replace(spec=layer.spec._replace(scale=scale, softcap=softcap)) for layer in base.attention]
        final = softcap_of(fields, "final_logit_softcapping")
        return replace(base, attention=tuple(layers), final_softcap=final)

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """Whether each layer has a sliding window."""
        return sliding_layers(fields, [layer % 2 == 0 for layer in range(layers)])


def softcap_of(fields: ConfigFields, key: str) -> float | None:
    """A soft-cap; None for a key that is absent or null."""
    return None if fields.source.get(key) is None else fields.number(key, least=1e-3, most=MAX_SOFTCAP)


def weight_map(config: llama.Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint: those of a Llama, and two more norms."""
    paths = llama.weight_map(config)
    for i in range(config.layers):
        layer, block = f"model.layers.{i}", f"blocks.{i}"
        # Llama's post_attention_layernorm, the norm before its MLP, is the norm after attention here: norm_2 in both.
        paths[f"{layer}.pre_feedforward_layernorm"] = WeightPath(f"{block}.norm_3")
        paths[f"{layer}.post_feedforward_layernorm"] = WeightPath(f"{block}.norm_4")
    return paths


class Block(llama.Block):
    """One decoder block: attention, then the gated MLP; each between two norms, and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (config.new_norm() for _ in range(4))

    def attend(self, qkv: Tensor, ctx: ForwardContext) -> Tensor:
        """qkv (B, T, (H + 2 G) D) -> (B, T, H D)."""
        heads, kv_heads = self.heads, self.key_value_heads
        qk, v = split_heads(qkv, heads + kv_heads, kv_heads, size=self.head_size)  # (B, T, H + G, D), (B, T, G, D)
        q, k = rope(qk, ctx, ROTATE_HALF).split([heads, kv_heads], dim=2)  # (B, T, H, D), (B, T, G, D)
        return attention(q, k, v, ctx)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        attended = self.attend(self.qkv(self.norm_1(x), ctx), ctx)  # (B, T, H D)
        h = x + self.norm_2(self.out(attended, ctx))  # (B, T, d)
        mlp = geglu(self.gate_up(self.norm_3(h), ctx), ctx)  # (B, T, F)
        y: Tensor = h + self.norm_4(self.down(mlp, ctx))  # (B, T, d)
        return y
