"""Matches the tensors of an adapter with the modules of a model.

Legend: r rank, K inputs and N outputs of a linear, V vocabulary size and d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import torch

from octavo.adapters.complete import check_complete
from octavo.bounded_json import shortened, shown, some
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora
from octavo.models import Decoder, WeightEntry, is_other_part, layer_of, names_in_file, weight_entries
from octavo.store.peft import Adapter, renamed


def matched(model: Decoder, adapter: Adapter) -> tuple[dict[str, WeightEntry], Adapter]:
    """(the model's weight map, the adapter under the names of its checkpoint).

    AdapterError if the model has no module for a tensor of the adapter, if two names of the adapter are one module of
    the model, or if the adapter is not complete.
    """
    entries = weight_entries(model)
    given = {*adapter.lora, *adapter.tokens, *(key.rpartition(".")[0] for key in adapter.full)}
    in_file = names_in_file([entry.module for entry in entries.values()], given)
    modules = {name: module for module, name in in_file.items()}
    names = {entry.module: entry.name for entry in entries.values()}
    found: dict[str, str] = {}
    for name in sorted(given):
        module = modules.get(name, name)
        if (other := found.setdefault(names.get(module, module), name)) != name:
            raise AdapterError(
                f"{adapter.named} holds one module twice: {some([other, name])}.",
                hint="Only one of them can be used. Restore the file from a copy, or remove the other from it.",
            )
    adapter = renamed(renamed(adapter, modules), names)
    unknown = [name for name in adapter.lora if name not in entries or entries[name].matrix is None]
    unknown += [key for key in adapter.full if not _fits_full(entries, key)]
    unknown += [name for name in adapter.tokens if name not in entries or not entries[name].is_embedding]
    if unknown:
        _refuse_other_parts(unknown)
        raise _unknown(model, entries, adapter, unknown)
    check_complete(entries, adapter, in_file)
    return entries, adapter


def _unknown(
    model: Decoder, entries: Mapping[str, WeightEntry], adapter: Adapter, unknown: Sequence[str]
) -> AdapterError:
    """The error for tensors that the model has no module for: of another model, or renamed."""
    reason = f"there is no module for {some(unknown)} ({_reason(model, entries, unknown[0])})"
    if 2 * len(unknown) <= len(adapter.lora) + len(adapter.full) + len(adapter.tokens):
        near = get_close_matches(unknown[0], [entry.module for entry in entries.values()], n=1, cutoff=0.9)
        similar = f" This model has {near[0]}." if near else ""
        return AdapterError(
            f"{adapter.named} does not fit this model: {reason}, and there is one for its other tensors.",
            hint=f"Was a tensor renamed or added?{similar} Restore the file from a copy, or remove these tensors.",
        )
    return AdapterError(
        f"{adapter.named} does not belong to this model: {reason}.",
        hint=f"It names {shown(adapter.base)} as its base: give that with --model."
        if adapter.base
        else "Give the model that it was trained on.",
    )


def check_shapes(entries: Mapping[str, WeightEntry], adapter: Adapter, *, vocabulary: int | None = None) -> None:
    """AdapterError that names the LoRA matrices whose shapes are not those of the model's layers.

    The adapter may resize the vocabulary, so its full weights come first, or `vocabulary` is the size that they give.
    """
    wrong = []
    for name, (a, b, _) in adapter.lora.items():
        shapes = _lora_shapes(entries[name], len(a), vocabulary)
        for end, matrix, shape in zip(("lora_A", "lora_B"), (a, b), shapes, strict=True):
            if tuple(matrix.shape) != shape:
                wrong.append(f"{entries[name].module}.{end} is {tuple(matrix.shape)}, not {shape}")
    if wrong:
        raise AdapterError(
            f"{adapter.named} does not fit this model: the LoRA matrix {some(wrong)}.",
            hint="Give the model that it was trained on. If that is this one, restore the file from a copy.",
        )


def _lora_shapes(entry: WeightEntry, rank: int, vocabulary: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B: (r, K), (N, r) of a linear; (r, V), (d, r) of an embedding."""
    layer = frozen_layer(entry)
    rows, columns = layer.matrix.outputs[entry.rows_key], layer.matrix.in_features
    rows = vocabulary if vocabulary is not None and entry.is_embedding else rows
    inputs, outputs = (rows, columns) if isinstance(layer, FrozenEmbedding) else (columns, rows)
    return (rank, inputs), (outputs, rank)


def _refuse_other_parts(unknown: Sequence[str]) -> None:
    """AdapterError if the adapter is of a composite model, and a tensor belongs to another part than the text's."""
    others = [name for name in unknown if is_other_part(name)]
    if others:
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
    """The adapter's A and B of one module, on the model's device. `check_shapes` has checked it."""
    a, b, scaling = adapter.lora[entry.name]  # linear: (r, K), (N, r); embedding: (r, V), (d, r)
    layer = frozen_layer(entry)
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
