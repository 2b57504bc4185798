"""The Llama family: Llama, Mistral, Qwen2, SmolLM2 and others of the same block.

    h = x + out(attention(rotary(q), rotary(k), v))      q, k, v = qkv(rms(x)), fewer heads for k and v (GQA)
    y = h + down(silu(gate) * up)                        gate, up = gate_up(rms(h))

Sources: Llama 2 (arXiv 2307.09288), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm (1910.07467).

Legend: B rows of a batch, T positions, d the width, H query heads, G key/value heads, D the size of a head,
F the width of the MLP, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.fused.branch import Save
from octavo.fused.mixers import Attention, ForwardContext, Swiglu
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, FrozenMatrix
from octavo.layers.kv_cache import Cache, CacheView, KeyValueCache, SlotCache
from octavo.layers.residual import RmsNorm, residual, save_levels
from octavo.models.config_fields import (
    MOST_HEAD_SIZE,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_MLP_WIDTH,
    MOST_POSITIONS,
    MOST_TOKENS,
    MOST_WIDTH,
    ConfigFields,
)
from octavo.ops.attention import HALF, Documents, cached_rotary_table, rotary_table
from octavo.ops.tiles import Phase
from octavo.runtime.offload import ActivationOffload

# The name of each module in a checkpoint -> where it lives here. Several names on one place are stacked rows.
WEIGHTS = {
    "model.embed_tokens": "embed",
    "model.layers.{i}.input_layernorm": "blocks.{i}.norm_1",
    "model.layers.{i}.self_attn.q_proj": "blocks.{i}.qkv",
    "model.layers.{i}.self_attn.k_proj": "blocks.{i}.qkv",
    "model.layers.{i}.self_attn.v_proj": "blocks.{i}.qkv",
    "model.layers.{i}.self_attn.o_proj": "blocks.{i}.out",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.norm_2",
    "model.layers.{i}.mlp.gate_proj": "blocks.{i}.gate_up",
    "model.layers.{i}.mlp.up_proj": "blocks.{i}.gate_up",
    "model.layers.{i}.mlp.down_proj": "blocks.{i}.down",
    "model.norm": "norm",
    "lm_head": "head",
}

DEFAULT_ROPE_THETA = 10000.0
MOST_THETA = 1e15
MOST_FACTOR = 1e6


@dataclass(frozen=True)
class Config:
    """What config.json says, under the names of the legend."""

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
    frequencies: tuple[float, ...]  # of the rotary pairs, D/2 of them

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not know."""
        fields = ConfigFields(source)
        if (act := fields.text("hidden_act", default="silu")) != "silu":
            raise ModelError(f"The model's config asks for the activation {shown(act)}; a Llama block has silu.")
        qwen = source.get("model_type") == "qwen2"
        bias = fields.flag("attention_bias")
        width, heads = fields.size("hidden_size", most=MOST_WIDTH), fields.size("num_attention_heads", most=MOST_HEADS)
        key_heads = fields.size("num_key_value_heads", most=MOST_HEADS, default=heads)
        if heads % key_heads:
            raise fields.wrong(f"num_attention_heads is {heads}, which num_key_value_heads {key_heads} does not divide")
        head_size = fields.size("head_dim", most=MOST_HEAD_SIZE, default=width // heads)
        if head_size % 2:
            raise fields.wrong(f"head_dim is {head_size}; it must be an even number")
        context = fields.size("max_position_embeddings", most=MOST_POSITIONS, default=2048)
        if fields.flag("use_sliding_window", default=True):
            # Within the window of sliding attention (Mistral 7B v0.1) it equals full attention.
            context = min(context, fields.size("sliding_window", most=MOST_POSITIONS, default=context))
        return cls(
            vocabulary=fields.size("vocab_size", most=MOST_TOKENS),
            width=width,
            mlp_width=fields.size("intermediate_size", most=MOST_MLP_WIDTH),
            layers=fields.size("num_hidden_layers", most=MOST_LAYERS),
            heads=heads,
            key_value_heads=key_heads,
            head_size=head_size,
            norm_eps=fields.number("rms_norm_eps", least=0.0, most=1.0, default=1e-6),
            tied=fields.flag("tie_word_embeddings"),
            qkv_bias=qwen or bias,
            out_bias=bias and not qwen,
            mlp_bias=fields.flag("mlp_bias"),
            context=context,
            frequencies=tuple(rotary_frequencies(source, head_size).tolist()),
        )


class Block(nn.Module):
    """One layer: attention, then the gated MLP, each behind its norm and added to its input."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        c, d = config, config.width
        self.index = index
        queries, keys = c.heads * c.head_size, c.key_value_heads * c.head_size
        qkv = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        gate_up = {"gate_proj": c.mlp_width, "up_proj": c.mlp_width}
        self.norm_1 = RmsNorm(d, c.norm_eps)
        self.qkv = FrozenLinear(FrozenMatrix(d, qkv), bias=qkv if c.qkv_bias else ())
        self.attention = Attention(c.heads, c.key_value_heads, c.head_size, HALF)
        self.out = FrozenLinear(FrozenMatrix(queries, {"o_proj": d}), bias=["o_proj"] if c.out_bias else ())
        self.norm_2 = RmsNorm(d, c.norm_eps)
        self.gate_up = FrozenLinear(FrozenMatrix(d, gate_up), bias=gate_up if c.mlp_bias else ())
        self.activation = Swiglu(c.mlp_width)
        self.down = FrozenLinear(FrozenMatrix(c.mlp_width, {"down_proj": d}), bias=["down_proj"] if c.mlp_bias else ())

    def forward(self, x: Tensor, context: ForwardContext, *, save: Save, view: CacheView | None = None) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        attend = partial(view.attend, self.index) if view is not None else None
        x = residual(x, self.norm_1, self.qkv, (self.attention,), (self.out,), context, save=save, attend=attend)
        return residual(
            x, self.norm_2, self.gate_up, (self.activation,), (self.down,), context, save=save, attend=attend
        )


class Model(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = FrozenEmbedding(FrozenMatrix(config.width, {"embed_tokens": config.vocabulary}))
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.layers)])
        self.norm = RmsNorm(config.width, config.norm_eps)
        table = self.embed.matrix if config.tied else FrozenMatrix(config.width, {"lm_head": config.vocabulary})
        self.head = FrozenLinear(table)

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        save: Sequence[Save] | Save = Save.ALL,
        offload: ActivationOffload | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, d), ready for the head.

        `positions` (B, T) count within each document, from the cache's end if left out; `documents` are
        those packed in the rows; `keep` is what each block keeps for backward, `away` where their inputs wait for it.
        """
        view = cache.next(ids.shape[1]) if cache is not None else None
        if positions is None:
            positions = view.positions if view is not None else torch.arange(ids.shape[1], device=ids.device)[None]
        phase = view.phase if view is not None else Phase.PREFILL
        make = rotary_table if view is None else partial(cached_rotary_table, phase=phase)
        rotary = make(positions, _frequencies(self.config.frequencies, ids.device))
        context = ForwardContext(ids.shape[0], ids.shape[1], rotary, documents, offload, phase)
        x = self.embed(ids)
        for block, kept in zip(self.blocks, save_levels(save, len(self.blocks)), strict=True):
            x = block(x, context, save=kept, view=view)
        if view is not None:
            view.finish()
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, ids: Tensor, **context: Any) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; `context` as for `hidden`."""
        logits: Tensor = self.head(self.hidden(ids, **context))
        return logits

    def infer_logits(self, hidden: Tensor, phase: Phase) -> Tensor:
        """(B, T, d) -> (B, T, V) float32, as they were accumulated; served adapters included."""
        return self.head.infer(hidden, phase=phase, dtype=torch.float32)

    @property
    def table(self) -> FrozenMatrix | None:
        """The matrix of which a pass reads a few rows only; None if the head multiplies with it."""
        return None if self.config.tied else self.embed.matrix

    def new_cache(self, *, batch: int, max_len: int) -> KeyValueCache:
        """An empty cache for `batch` rows of up to `room` positions."""
        return KeyValueCache(self.config.layers, batch=batch, max_len=max_len, **self._cache_shape)

    def new_slots(self, *, slots: int, max_len: int) -> SlotCache:
        """An empty cache of `slots` requests of up to `room` positions each."""
        return SlotCache(self.config.layers, slots=slots, max_len=max_len, **self._cache_shape)

    @property
    def _cache_shape(self) -> dict[str, Any]:
        c, table = self.config, self.embed.matrix
        return {"heads": c.key_value_heads, "head_size": c.head_size, "dtype": table.dtype, "device": table.device}


@cache
def _frequencies(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(D/2,), sent once: a copy from the host's plain memory makes a card wait, and cannot be in a CUDA graph."""
    return torch.tensor(values, device=device)


def rotary_frequencies(source: Mapping[str, Any], head_size: int) -> Tensor:
    """(D/2,) angles a position turns each pair by: theta^(-2i/D), stretched as the config's rope type says."""
    fields = ConfigFields(source)
    # In transformers too an older config's `rope_scaling` counts where both are given.
    rope = fields.object("rope_scaling") or fields.object("rope_parameters") or ConfigFields({})
    theta = fields.number("rope_theta", least=1.0, most=MOST_THETA, default=DEFAULT_ROPE_THETA)
    theta = rope.number("rope_theta", least=1.0, most=MOST_THETA, default=theta)
    base = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size)
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if kind == "default":
        return base
    if kind == "linear":
        return base / rope.number("factor", least=1e-3, most=MOST_FACTOR)
    if kind == "llama3":
        return _llama3_frequencies(
            base, rope, fields.size("max_position_embeddings", most=MOST_POSITIONS, default=2048)
        )
    raise ModelError(
        f"The model's config asks for rotary positions of type {shown(kind)}.",
        hint="octavo knows default, linear and llama3. Use a model with one of these.",
    )


def _llama3_frequencies(base: Tensor, rope: ConfigFields, context: int) -> Tensor:
    """Llama 3.1's stretch: long waves by the whole factor, short ones not at all, a ramp between."""
    factor = rope.number("factor", least=1e-3, most=MOST_FACTOR)
    original = rope.size("original_max_position_embeddings", most=MOST_POSITIONS, default=context)
    low = rope.number("low_freq_factor", least=1e-3, most=MOST_FACTOR)
    high = rope.number("high_freq_factor", least=1e-3, most=MOST_FACTOR)
    if low >= high:
        raise rope.wrong(f"low_freq_factor is {low:g}; it must be less than high_freq_factor, {high:g}")
    turns = original * base / (2 * math.pi)  # of each pair over the original context
    save = ((turns - low) / (high - low)).clamp(0, 1)
    return base * save + base / factor * (1 - save)
