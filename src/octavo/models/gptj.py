"""GPT-J: one norm, and attention and MLP side by side.

    y = x + out_proj(attention(rotary(q), rotary(k), v)) + fc_out(gelu(fc))      q, k, v, fc = in_proj(norm(x))

q, k, v and fc_in read the same input, so they are one matrix of stacked rows. Source: Mesh Transformer JAX
(github.com/kingoflolz/mesh-transformer-jax); rotary positions (arXiv 2104.09864) on the first `rotary` numbers
of each head, in pairs (2i, 2i+1).

Legend: B rows of a batch, T positions, d the width, H heads, D the size of a head, F the width of the MLP,
V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.fused.branch import Save
from octavo.fused.mixers import Attention, ForwardContext, Gelu
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, FrozenMatrix
from octavo.layers.kv_cache import Cache, CacheView, KeyValueCache, SlotCache
from octavo.layers.residual import LayerNorm, residual, save_levels
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
from octavo.ops.attention import INTERLEAVED, Documents, cached_rotary_table, rotary_table
from octavo.ops.tiles import Phase
from octavo.runtime.offload import ActivationOffload

# The name of each module in a checkpoint -> where it lives here. Several names on one place are stacked rows.
WEIGHTS = {
    "transformer.wte": "embed",
    "transformer.h.{i}.ln_1": "blocks.{i}.norm",
    "transformer.h.{i}.attn.q_proj": "blocks.{i}.in_proj",
    "transformer.h.{i}.attn.k_proj": "blocks.{i}.in_proj",
    "transformer.h.{i}.attn.v_proj": "blocks.{i}.in_proj",
    "transformer.h.{i}.mlp.fc_in": "blocks.{i}.in_proj",
    "transformer.h.{i}.attn.out_proj": "blocks.{i}.out_proj",
    "transformer.h.{i}.mlp.fc_out": "blocks.{i}.fc_out",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}

ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class Config:
    """What config.json says, under the names of the legend."""

    vocabulary: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    rotary: int
    norm_eps: float
    tied: bool
    context: int  # positions that the model was made for

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not know."""
        fields = ConfigFields(source)
        act = fields.text("activation_function", default="gelu_new")
        if act != "gelu_new":
            raise ModelError(f"The model's config asks for the activation {shown(act)}; a GPT-J block has gelu_new.")
        width, heads = fields.size("n_embd", most=MOST_WIDTH), fields.size("n_head", most=MOST_HEADS)
        if width % heads:
            raise fields.wrong(f"n_embd is {width}, which n_head {heads} does not divide")
        rotary = fields.size("rotary_dim", most=MOST_HEAD_SIZE, default=width // heads)
        if rotary % 2 or rotary > width // heads:
            raise fields.wrong(f"rotary_dim is {rotary}; it must be even and at most {width // heads}, a head's size")
        return cls(
            vocabulary=fields.size("vocab_size", most=MOST_TOKENS),
            width=width,
            mlp_width=fields.size("n_inner", most=MOST_MLP_WIDTH, default=4 * width),
            layers=fields.size("n_layer", most=MOST_LAYERS),
            heads=heads,
            rotary=rotary,
            norm_eps=fields.number("layer_norm_epsilon", least=0.0, most=1.0, default=1e-5),
            tied=fields.flag("tie_word_embeddings"),
            context=fields.size("n_positions", most=MOST_POSITIONS, default=2048),
        )


class Block(nn.Module):
    """One layer: one branch, whose mix is attention beside the activation of the MLP."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        c, d = config, config.width
        self.index = index
        self.norm = LayerNorm(d, c.norm_eps)
        stacked = {"q_proj": d, "k_proj": d, "v_proj": d, "fc_in": c.mlp_width}
        self.in_proj = FrozenLinear(FrozenMatrix(d, stacked), bias=["fc_in"])
        self.mixers = (Attention(c.heads, c.heads, c.head_size, INTERLEAVED), Gelu(c.mlp_width))
        self.out_proj = FrozenLinear(FrozenMatrix(d, {"out_proj": d}))
        self.fc_out = FrozenLinear(FrozenMatrix(c.mlp_width, {"fc_out": d}), bias=["fc_out"])

    def forward(self, x: Tensor, context: ForwardContext, *, save: Save, view: CacheView | None = None) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        return residual(
            x, self.norm, self.in_proj, self.mixers, (self.out_proj, self.fc_out), context,
            save=save, attend=partial(view.attend, self.index) if view is not None else None,
        )  # fmt: skip


class Model(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed = FrozenEmbedding(FrozenMatrix(config.width, {"wte": config.vocabulary}))
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.layers)])
        self.norm = LayerNorm(config.width, config.norm_eps)
        table = self.embed.matrix if config.tied else FrozenMatrix(config.width, {"lm_head": config.vocabulary})
        self.head = FrozenLinear(table, bias=[next(iter(table.outputs))])

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
        exponents = torch.arange(0, self.config.rotary, 2, device=ids.device) / self.config.rotary
        phase = view.phase if view is not None else Phase.PREFILL
        make = rotary_table if view is None else partial(cached_rotary_table, phase=phase)
        rotary = make(positions, 1.0 / ROTARY_BASE**exponents)
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
        return {"heads": c.heads, "head_size": c.head_size, "dtype": table.dtype, "device": table.device}
