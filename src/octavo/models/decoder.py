"""The decoder that all families share: embedding, blocks, final norm and head, with logits and caches.

A family adds its `Config`, its weight map and its `Block` (models/__init__.py).

Legend: B sequences of a batch, T positions, d the width of the model, V the vocabulary, R rotated values of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from octavo.fused.norm import fused_norm
from octavo.layers.context import ForwardContext, ForwardOptions, Save
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.kv_cache import Cache, KeyValueCache, SlotCache
from octavo.layers.norm import LayerNorm, RmsNorm
from octavo.layers.positions import LearnedPositions
from octavo.models.layer_attention import LayerAttention, length_regime, per_layer
from octavo.models.running import run_block
from octavo.ops.attention import Documents
from octavo.ops.tiles import Phase, elementwise_tiles
from octavo.runtime.offload import ActivationOffload


class DecoderConfig(Protocol):
    """What the decoder reads of a family's config."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def key_value_heads(self) -> int: ...
    @property
    def head_size(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def context(self) -> int: ...
    @property
    def attention(self) -> tuple[LayerAttention, ...]: ...  # of each layer
    @property
    def position_embedding(self) -> str: ...  # the last part of the name of learned positions; "" for none
    @property
    def embedding(self) -> str: ...  # the last part of its name in a checkpoint
    @property
    def head(self) -> str: ...
    @property
    def text_prefix(self) -> str: ...  # before the text part's names in a composite checkpoint; "" for a text model
    @property
    def head_bias(self) -> bool: ...
    @property
    def embedding_scale(self) -> float: ...  # the embedding's output is multiplied by it
    @property
    def output_scale(self) -> float: ...  # and the input of the head by this
    @property
    def logit_softcap(self) -> float | None: ...  # c of c tanh(logits / c); None: logits are those of the head
    def new_norm(self) -> LayerNorm | RmsNorm: ...


class Decoder(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: DecoderConfig, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.embed = FrozenEmbedding(FrozenMatrix(config.width, {config.embedding: config.vocabulary}))
        self.blocks = nn.ModuleList(blocks)
        for path, layer in self.blocks.named_modules():
            if isinstance(layer, FrozenLinear):
                layer.path = path
        positions = LearnedPositions(config.context, config.width) if config.position_embedding else None
        self.positions = positions
        self.norm = config.new_norm()
        matrix = self.embed.matrix if config.tied else FrozenMatrix(config.width, {config.head: config.vocabulary})
        self.head = FrozenLinear(matrix, bias=list(matrix.outputs) if config.head_bias else ())

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        adapter_ids: Tensor | None = None,
        options: ForwardOptions | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, d), the input of the head.

        `positions` (B, T) count within each document; by default from the end of the cache. `documents` are those
        packed in the rows. Over a `cache` each sequence may take a served adapter, `adapter_ids` (B,). `options` are
        those of training.
        """
        view = cache.next(ids.shape[1]) if cache is not None else None  # where this pass stores its keys and values
        if positions is None:
            positions = view.positions if view is not None else torch.arange(ids.shape[1], device=ids.device)[None]
        options, (batch, length) = options or ForwardOptions(), ids.shape
        offload = ActivationOffload() if options.offload else None
        context = ForwardContext(
            batch, length, None, documents, view, adapter_ids, offload, options.matmul8, options.dropout,
            options.fused,
        )  # fmt: skip
        layers = per_layer(self.config.attention, positions, documents, view)
        x = self.embed(ids, adapter_ids)  # (B, T, d)
        if (scale := self.config.embedding_scale) != 1:
            # Rounded to the type of x, as Gemma's is: 67.88 in float32 is 68 in bfloat16.
            x = x * float(torch.tensor(scale, dtype=x.dtype))
        if self.positions is not None:
            x = x + self.positions(positions, x.dtype)
        levels = [options.save] * len(self.blocks) if isinstance(options.save, Save) else options.save
        for layer, (block, level, attention) in enumerate(zip(self.blocks, levels, layers, strict=True)):
            x = run_block(block, x, context.at(layer, level, **attention))  # (B, T, d)
        if view is not None:
            view.finish()
        fused = options.fused and view is None and torch.is_grad_enabled()
        y: Tensor = fused_norm(x, self.norm.spec()) if fused else self.norm(x)  # (B, T, d)
        return y if self.config.output_scale == 1 else y * self.config.output_scale

    def forward(self, ids: Tensor, **context: Any) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; `context` as for `hidden`."""
        return self.logits(self.hidden(ids, **context))

    def logits(self, hidden: Tensor) -> Tensor:
        """(.., d) -> (.., V) in the compute type, under autograd. The training loss has its own (fused/loss.py)."""
        logits: Tensor = self.head(hidden)
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def infer_logits(self, hidden: Tensor, phase: Phase, adapter_ids: Tensor | None = None) -> Tensor:
        """(B, T, d) -> (B, T, V) float32, as they were accumulated; `adapter_ids` (B,) as for `hidden`."""
        logits = self.head.infer(hidden, phase=phase, adapter_ids=adapter_ids, dtype=torch.float32)
        if (softcap := self.config.logit_softcap) is not None:
            for rows in elementwise_tiles(logits.flatten(0, 1), phase):
                rows.div_(softcap).tanh_().mul_(softcap)
        return logits

    @property
    def untied_embedding(self) -> FrozenMatrix | None:
        """The embedding's matrix, of which a pass reads only the rows of its tokens; None if the head shares it."""
        return None if self.config.tied else self.embed.matrix

    @property
    def matrices(self) -> list[FrozenMatrix]:
        """All frozen matrices, a shared one once."""
        return [module for module in self.modules() if isinstance(module, FrozenMatrix)]

    @property
    def frozen_bytes(self) -> int:
        """The bytes of the frozen weights under their schemes, and of the norms and biases that are not trained."""
        parameters = sum(p.numel() * p.itemsize for p in self.parameters() if not p.requires_grad)
        return sum(matrix.stored_bytes for matrix in self.matrices) + parameters

    def new_cache(self, *, batch: int, max_len: int) -> KeyValueCache:
        """An empty cache for `batch` sequences of up to `max_len` positions."""
        return KeyValueCache(self._windows, batch=batch, max_len=max_len, **self._cache_shape)

    def new_slots(self, *, slots: int, max_len: int) -> SlotCache:
        """An empty cache of `slots` requests of up to `max_len` positions each."""
        return SlotCache(self._windows, slots=slots, max_len=max_len, **self._cache_shape)

    @property
    def _windows(self) -> list[int | None]:
        return [layer.spec.window for layer in self.config.attention]

    def length_regime(self, extent: int) -> tuple[int, ...]:
        """Equal for numbers of positions of a request with which keys have the same rotary positions."""
        return length_regime(self.config.attention, extent)

    @property
    def _cache_shape(self) -> dict[str, Any]:
        c, matrix = self.config, self.embed.matrix
        return {"heads": c.key_value_heads, "head_size": c.head_size, "dtype": matrix.dtype, "device": matrix.device}
