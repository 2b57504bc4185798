"""The Llama family: Llama, Mistral, Qwen2, SmolLM2 and others of the same block.

    h = x + out(attention(rope(q), rope(k), v))      q, k, v = qkv(rms(x)), fewer heads for k and v (GQA)
    y = h + down(silu(gate) * up)                    gate, up = gate_up(rms(h))

Sources: Llama 2 (arXiv 2307.09288), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467).

Legend: B sequences of a batch, T positions, d the width, H query heads, G key/value heads, D the size of a head,
F the width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.layers.block import attention, rope, split_heads, swiglu
from octavo.layers.context import ForwardContext
from octavo.layers.frozen import FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.norm import RmsNorm
from octavo.models.config_defaults import ConfigDefaults
from octavo.models.config_fields import MAX_LAYERS, ConfigFields
from octavo.models.layer_attention import LayerAttention, sliding_layers, window_of
from octavo.models.rotary import DEFAULT_THETA, context_of, rotary_of
from octavo.models.weight_map import WeightPath
from octavo.ops.attention import AttentionSpec
from octavo.ops.rotary import ROTATE_HALF

WINDOW = 4096  # positions of a sliding window, where config.json does not say
QWEN_FULL_LAYERS = 28  # the first layers of a Qwen have no window, where config.json does not say how many


@dataclass(frozen=True)
class Config(ConfigDefaults):
    """The sizes and settings of a config.json."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    context: int  # positions that the model was made for
    attention: tuple[LayerAttention, ...]

    embedding = "embed_tokens"  # the last parts of their names in a checkpoint
    head = "lm_head"
    activation_key, activation = "hidden_act", "silu"  # the key of config.json, and its value that the block computes
    theta = DEFAULT_THETA  # of rotary positions, where config.json does not say
    share: ClassVar[float | None] = None  # of a head that is rotated, by default; None: all, in any file

    def new_norm(self) -> RmsNorm:
        return RmsNorm(self.width, self.norm_eps)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not know."""
        fields = ConfigFields(source)
        if (act := fields.text(cls.activation_key, default=cls.activation)) != cls.activation:
            raise ModelError(
                f"The model's config asks for the activation {shown(act)}; its blocks have {cls.activation}."
            )
        qwen = source.get("model_type") == "qwen2"
        bias = fields.flag("attention_bias")
        width, heads = fields.width(), fields.heads()
        key_heads = fields.heads("num_key_value_heads", default=heads)
        if heads % key_heads:
            raise fields.wrong(f"num_attention_heads is {heads}, which num_key_value_heads {key_heads} does not divide")
        head_size = fields.head_size(default=width // heads)
        if head_size % 2:
            raise fields.wrong(f"head_dim is {head_size}; it must be an even number")
        layers = fields.layers()
        window = window_of(fields, WINDOW)
        spec = [AttentionSpec(window=window if slides else None) for slides in cls.sliding(fields, layers)]
        rotary = rotary_of(fields, head_size, theta=cls.theta, share=cls.share)
        return cls(
            vocabulary=fields.vocabulary(),
            width=width,
            mlp_width=fields.mlp_width(),
            layers=layers,
            heads=heads,
            key_value_heads=key_heads,
            head_size=head_size,
            norm_eps=fields.epsilon("rms_norm_eps", default=1e-6),
            tied=fields.flag("tie_word_embeddings"),
            qkv_bias=qwen or bias,  # Qwen2 has biases on q, k and v and none on o; its config does not say so
            out_bias=bias and not qwen,
            mlp_bias=fields.flag("mlp_bias"),
            context=context_of(fields),
            attention=tuple(LayerAttention(rotary, each) for each in spec),
        )

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """Whether each layer has a sliding window: those that a Mistral names, or all, a Qwen2's last."""
        kind = fields.text("model_type", default="")
        if kind in ("mistral", "ministral"):  # transformers takes a Mistral with layer_types for a Ministral
            return sliding_layers(fields, [True] * layers)
        return qwen_sliding(fields, layers) if kind == "qwen2" else [False] * layers


def qwen_sliding(fields: ConfigFields, layers: int) -> list[bool]:
    """Whether each layer of a Qwen2 or Qwen3 has a sliding window."""
    first = fields.size("max_window_layers", least=0, most=MAX_LAYERS, default=QWEN_FULL_LAYERS)
    slides = sliding_layers(fields, [layer >= first for layer in range(layers)])
    return slides if fields.flag("use_sliding_window") else [False] * layers


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer (module of the decoder) of each module of a checkpoint. Several in one layer are rows of its matrix."""
    names = {"model.embed_tokens": "embed"}
    for i in range(config.layers):
        block = f"model.layers.{i}"
        names[f"{block}.input_layernorm"] = f"blocks.{i}.norm_1"
        for name in ("q_proj", "k_proj", "v_proj"):
            names[f"{block}.self_attn.{name}"] = f"blocks.{i}.qkv"
        names[f"{block}.self_attn.o_proj"] = f"blocks.{i}.out"
        names[f"{block}.post_attention_layernorm"] = f"blocks.{i}.norm_2"
        names[f"{block}.mlp.gate_proj"] = names[f"{block}.mlp.up_proj"] = f"blocks.{i}.gate_up"
        names[f"{block}.mlp.down_proj"] = f"blocks.{i}.down"
    names |= {"model.norm": "norm", "lm_head": "head"}
    return {name: WeightPath(path) for name, path in names.items()}


class Block(nn.Module):
    """One decoder block: attention, then the gated MLP, each after its norm and added to its input."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, d = config, config.width
        self.heads, self.key_value_heads, self.head_size = c.heads, c.key_value_heads, c.head_size
        self.mlp_width = c.mlp_width
        queries = c.heads * c.head_size
        qkv, gate_up = self.rows(c)
        self.norm_1 = RmsNorm(d, c.norm_eps)
        self.qkv = FrozenLinear(FrozenMatrix(d, qkv), bias=list(qkv) if c.qkv_bias else ())
        self.out = FrozenLinear(FrozenMatrix(queries, {"o_proj": d}), bias=["o_proj"] if c.out_bias else ())
        self.norm_2 = RmsNorm(d, c.norm_eps)
        self.gate_up = FrozenLinear(FrozenMatrix(d, gate_up), bias=list(gate_up) if c.mlp_bias else ())
        self.down = FrozenLinear(FrozenMatrix(c.mlp_width, {"down_proj": d}), bias=["down_proj"] if c.mlp_bias else ())

    @staticmethod
    def rows(config: Config) -> tuple[dict[str, int], dict[str, int]]:
        """The names and rows of the two stacked matrices: q, k and v read the same input, and so do gate and up."""
        queries, keys = config.heads * config.head_size, config.key_value_heads * config.head_size
        qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        return qkv, {"gate_proj": config.mlp_width, "up_proj": config.mlp_width}

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # (B, T, d) -> (B, T, d)
        heads, kv_heads = self.heads, self.key_value_heads
        qkv = self.qkv(self.norm_1(x), ctx)  # (B, T, (H + 2 G) D)
        qk, v = split_heads(qkv, heads + kv_heads, kv_heads, size=self.head_size)  # (B, T, H + G, D), (B, T, G, D)
        q, k = rope(qk, ctx, ROTATE_HALF).split([heads, kv_heads], dim=2)  # (B, T, H, D), (B, T, G, D)
        h = self.out(attention(q, k, v, ctx), ctx, residual=x)  # (B, T, d)
        mlp = swiglu(self.gate_up(self.norm_2(h), ctx), ctx)  # (B, T, F)
        y: Tensor = self.down(mlp, ctx, residual=h)  # (B, T, d)
        return y
