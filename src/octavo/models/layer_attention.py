"""How each layer of a decoder attends: its positions, its window, and the scale of its scores.

Legend: B rows of a batch, T positions, R rotated values of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.layers.kv_cache import CacheView
from octavo.models.config_fields import ConfigFields
from octavo.models.rotary import Rotary
from octavo.ops.attention import PLAIN, AttentionSpec, Documents
from octavo.ops.rotary import Table, cached_rotary_table, rotary_table

FULL, SLIDING = "full_attention", "sliding_attention"  # in the layer_types of a config.json


class LayerAttention(NamedTuple):
    """The positions of one layer, and how its heads attend."""

    rotary: Rotary | None = None
    spec: AttentionSpec = PLAIN
    # (b, n): queries at position p are multiplied by 1 + b ln(1 + floor(p / n)), for contexts beyond n (Llama 4).
    query_growth: tuple[float, int] | None = None


def per_layer(
    layers: Sequence[LayerAttention], positions: Tensor, documents: Documents | None, view: CacheView | None
) -> list[dict[str, Any]]:
    """The arguments of `ForwardContext.at` for each layer; layers with equal settings share their tensors.

    `positions` (B or 1, T) are those of the pass, `documents` those packed in its rows, `view` is that of a cache.
    """
    tables: dict[Rotary | None, Table | None] = {None: None}
    growths: dict[tuple[float, int] | None, Tensor | None] = {None: None}
    for layer in layers:
        if layer.rotary not in tables and layer.rotary is not None:
            tables[layer.rotary] = _table(layer.rotary, positions, documents, view)
        if layer.query_growth not in growths and layer.query_growth is not None:
            growths[layer.query_growth] = _query_scale(*layer.query_growth, positions, view)
    return [
        {"rotary": tables[layer.rotary], "attention": layer.spec, "query_scale": growths[layer.query_growth]}
        for layer in layers
    ]


def _table(rotary: Rotary, positions: Tensor, documents: Documents | None, view: CacheView | None) -> Table:
    """(cos, sin), each (B or 1, T, 1, R/2)."""
    length: Tensor | int = 0  # of the sequence of each position
    if rotary.depends_on_length:
        length = _lengths(positions, documents) if view is None else view.extents
    # Over a cache the table's bits must not depend on the number of positions (ops/tiles.py).
    make = rotary_table if view is None else partial(cached_rotary_table, phase=view.phase)
    cos, sin = make(positions, rotary.at(length, positions.device))
    return (cos, sin) if rotary.scale == 1 else (cos * rotary.scale, sin * rotary.scale)


def _lengths(positions: Tensor, documents: Documents | None) -> Tensor:
    """(B or 1, T): the length of the document of each position, or of its row."""
    if documents is not None:
        return documents.lengths
    return (positions.amax(dim=1, keepdim=True) + 1).expand(positions.shape)


def _query_scale(growth: float, original: int, positions: Tensor, view: CacheView | None) -> Tensor | None:
    """(B or 1, T, 1, 1), or None where no position of the pass can be as far as `original`."""
    if (view.max_len if view is not None else positions.shape[1]) <= original:
        return None
    return (1 + growth * torch.log1p((positions // original).float()))[..., None, None]


def length_regime(layers: Sequence[LayerAttention], extent: int) -> tuple[int, ...]:
    """What the rotary positions of a request of up to `extent` positions depend on: equal for equal frequencies."""
    rotaries = dict.fromkeys(layer.rotary for layer in layers if layer.rotary is not None)
    return tuple(rotary.regime(extent) for rotary in rotaries if rotary.depends_on_length)


def sliding_layers(fields: ConfigFields, default: Sequence[bool]) -> list[bool]:
    """Whether each layer has a sliding window, from `layer_types` or else `default`."""
    kinds = fields.texts("layer_types") or [SLIDING if slides else FULL for slides in default]
    if len(kinds) != len(default):
        raise fields.wrong(f"layer_types has {len(kinds)} values for {len(default)} layers")
    if unknown := next((kind for kind in kinds if kind not in (FULL, SLIDING)), None):
        raise ModelError(
            f"The model has layers of type {shown(unknown)}, which octavo does not support.",
            hint=f"octavo supports {FULL} and {SLIDING}.",
        )
    return [kind == SLIDING for kind in kinds]


def window_of(fields: ConfigFields, default: int | None = None) -> int | None:
    """The positions that a sliding layer sees; None for all, which null says. `default` is for a key that is absent."""
    if "sliding_window" not in fields.source:
        return default
    return None if fields.source["sliding_window"] is None else fields.positions("sliding_window")
