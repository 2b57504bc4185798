"""Matches the tensors of an adapter with the modules of a model.

Legend: r rank, K inputs and N outputs of a linear, V vocabulary size and d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from octavo.adapters.complete import check_complete
from octavo.bounded_json import shortened, shown, some
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora
from octavo.models import Decoder, WeightEntry, is_other_part, layer_of, old_name, weight_entries
from octavo.store.peft import Adapter, renamed


def matched(model: Decoder, adapter: Adapter) -> tuple[dict[str, WeightEntry], Adapter]:
    """(the model's weight map, the adapter under the names of its checkpoint).

    AdapterError if the model has no module for a tensor of the adapter, or if the adapter is not complete.
    """
    entries = weight_entries(model)
    adapter = renamed(adapter, {old_name(entry.module): entry.module for entry in entries.values()})
    adapter = renamed(adapter, {entry.module: entry.name for entry in entries.values()})
    unknown = [name for name in adapter.lora if name not in entries or entries[name].matrix is None]
    unknown += [key for key in adapter.full if not _fits_full(entries, key)]
    unknown += [name for name in adapter.tokens if name not in entries or not entries[name].is_embedding]
    if unknown:
        _refuse_other_parts(model, unknown)
        reason = _reason(model, entries, unknown[0])
        raise AdapterError(
            f"The adapter does not belong to this model: there is no module for {some(unknown)} ({reason}).",
            hint=f"It names {shown(adapter.base)} as its base: give that with --model."
            if adapter.base
            else "Give the model that it was trained on.",
        )
    check_complete(entries, adapter)
    return entries, adapter


def _refuse_other_parts(model: Decoder, unknown: Sequence[str]) -> None:
    """AdapterError if the model is the text part of a larger one, and a tensor belongs to the rest."""
    others = [name for name in unknown if is_other_part(name)]
    if model.config.text_prefix and others:
        raise AdapterError(
            f"The adapter has tensors outside the text part of the model: {some(others)}.",
            hint="octavo computes the text part alone. Train the adapter without the other parts, with PEFT's "
            'exclude_modules=".*vision_tower.*".',
        )


def _reason(model: Decoder, entries: Mapping[str, WeightEntry], key: str) -> str:
    """Why the model has no module for a tensor of an adapter."""
    name, _, kind = key.rpartition(".")
    if name in entries:
        return f"this model's {entries[name].key} has no {kind}"
    layer, count = layer_of(key), len(model.blocks)
    first = next(name for name in entries if layer_of(name) is not None)
    if layer is not None and layer >= count and key.partition(".")[0] == first.partition(".")[0]:
        return f"this model has {count} layers"
    if layer is not None and key.partition(f".{layer}.")[0] != first.partition(".0.")[0]:
        return f"this model's layers are called {first.partition('.0.')[0]}"
    return f"this model has no module {shortened(name if kind in ('weight', 'bias') else key)}"


def lora_for(entry: WeightEntry, adapter: Adapter) -> Lora:
    """The adapter's A and B of one module, on the model's device. AdapterError for another layer's shape."""
    a, b, scaling = adapter.lora[entry.name]  # linear: (r, K), (N, r); embedding: (r, V), (d, r)
    layer, key = frozen_layer(entry), entry.rows_key
    rows, columns, rank = layer.matrix.outputs[key], layer.matrix.in_features, a.shape[0]
    outer = (rows, columns) if isinstance(layer, FrozenEmbedding) else (columns, rows)
    if tuple(a.shape) != (rank, outer[0]) or tuple(b.shape) != (outer[1], rank):
        raise AdapterError(
            f"The adapter's LoRA for {entry.name} is {tuple(a.shape)} and {tuple(b.shape)}; this model's layer "
            f"has {columns} inputs and {rows} outputs.",
            hint="Give the model that it was trained on.",
        )
    device = layer.matrix.device
    b = b if entry.order is None else entry.order.from_checkpoint(b)
    return Lora(a.to(device, torch.float32), b.to(device, torch.float32), scaling)


def _fits_full(entries: Mapping[str, WeightEntry], key: str) -> bool:
    name, _, kind = key.rpartition(".")
    if name in entries and kind == "weight" and entries[name].matrix is not None:
        return True
    return name in entries and entries[name].parameter(kind) is not None


def frozen_layer(entry: WeightEntry) -> FrozenLinear | FrozenEmbedding:
    """The layer of an entry that has a matrix."""
    assert isinstance(entry.layer, FrozenLinear | FrozenEmbedding)
    return entry.layer
