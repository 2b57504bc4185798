"""Full weights of an adapter on the frozen layers of a model: PEFT's modules_to_save, saved embeddings, trained tokens.

A matrix that gets other numbers is stored unquantised afterwards, in the compute type, whatever the model's scheme:
so PEFT trained it. What equals the model's own numbers changes nothing: PEFT saves embeddings that nobody trained.

Embedding and head of a tied model: a copy in modules_to_save is of that module alone, and PEFT unties the two. A weight
outside of modules_to_save is the base's own, of both modules; so are trained token rows.

Legend: V rows of a vocabulary's table, N rows of any matrix, K its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, FrozenMatrix
from octavo.models import Model, WeightEntry
from octavo.ops.quantize import Scheme, dequantise, scheme_named
from octavo.store.peft import Adapter
from octavo.store.weights import full_rows, row_blocks

Matrices = dict[str, Tensor]  # a module's name -> its matrix (N, K) of any floating-point type


def changed_keys(adapter: Adapter, table: Mapping[str, WeightEntry]) -> list[str]:
    """The adapter's tensors beside its LoRA pairs that differ from what the model has, e.g. lm_head.weight."""
    embed, head = _tables(table)
    matrices, _ = _wanted(adapter, table, embed, head)
    keys = [f"{name}.weight" for name in matrices]
    for key, tensor in adapter.full.items():
        target = _parameter(table, key)
        if target is not None and not (target.shape == tensor.shape and _equal(target, tensor)):
            keys.append(key)
    return keys


def put_weights_(model: Model, adapter: Adapter, table: Mapping[str, WeightEntry]) -> None:
    """Puts the adapter's full weights, norms and biases on the model. AdapterError names a shape that does not fit.

    The vocabulary becomes as large as the adapter's tables, and embedding and head are untied where those differ.
    """
    embed, head = _tables(table)
    matrices, untied = _wanted(adapter, table, embed, head)
    rows = {
        place.name: len(matrices.get(place.name, range(place.matrix.outputs[place.rows_key])))
        for place in (embed, head)
        if place.matrix is not None
    }
    if len(set(rows.values())) > 1:
        raise AdapterError(
            f"With the adapter the embedding has {rows[embed.name]:,} rows and the head {rows[head.name]:,}.",
            hint="The vocabulary was resized in training, but only one of the two was saved: save both, with PEFT's "
            "save_embedding_layers=True or modules_to_save.",
        )
    _replace_tables_(embed, head, matrices, untied=untied)
    _resize_head_bias_(head, adapter)
    config: Any = model.config  # a frozen dataclass of the family
    model.config = replace(config, vocabulary=rows[embed.name], tied=config.tied and not untied)
    for place in table.values():
        if place not in (embed, head) and place.name in matrices:
            _replace_rows_(place, matrices)
    for key, tensor in adapter.full.items():
        _put_parameter_(table, key, tensor)


def _tables(table: Mapping[str, WeightEntry]) -> tuple[WeightEntry, WeightEntry]:
    """(the embedding's place, the head's)."""
    embed = next(place for place in table.values() if isinstance(place.layer, FrozenEmbedding))
    return embed, next(place for place in table.values() if place.is_head)


def _wanted(
    adapter: Adapter, table: Mapping[str, WeightEntry], embed: WeightEntry, head: WeightEntry
) -> tuple[Matrices, bool]:
    """(the matrices that differ from the model's, whether embedding and head are to be untied)."""
    given = {
        name: tensor
        for key, tensor in adapter.full.items()
        if (name := key.removesuffix(".weight")) != key and table[name].matrix is not None
    }
    for name, tensor in given.items():
        _check_shape(table[name], tensor)
    for name, (indices, rows) in adapter.tokens.items():
        given[name] = _with_tokens(table[name], given.get(name), indices, rows)
    untied = False
    if embed.matrix is head.matrix and (embed.name in given or head.name in given):
        for one, other in ((embed.name, head.name), (head.name, embed.name)):
            if one in given and other not in given and one not in adapter.separate:
                given[other] = given[one]
        e, h = given.get(embed.name), given.get(head.name)
        untied = e is None or h is None or not (e.shape == h.shape and torch.equal(e, h))
        if untied and all(t is None or _is_own(p, t, adapter) for p, t in ((embed, e), (head, h))):
            untied = False
    return {name: tensor for name, tensor in given.items() if not _is_own(table[name], tensor, adapter)}, untied


def _with_tokens(place: WeightEntry, table: Tensor | None, indices: tuple[int, ...], rows: Tensor) -> Tensor:
    """The adapter's `table` (V, K), or the place's own, with other rows for some tokens."""
    matrix, key = place.matrix, place.rows_key
    assert matrix is not None
    shape = tuple(table.shape) if table is not None else (matrix.outputs[key], matrix.in_features)
    if tuple(rows.shape) != (len(indices), shape[1]) or max(indices, default=0) >= shape[0]:
        raise AdapterError(
            f"The adapter's rows for {len(indices)} tokens of {place.name}, the last of which is "
            f"{max(indices, default=0):,}, are {tuple(rows.shape)}; this model's table is {shape}.",
            hint="Give the model that it was trained on.",
        )
    if table is None:
        table = dequantise(matrix.scheme, matrix.of(key), (shape[0], shape[1]), dtype=matrix.dtype)
    changed = table.float().clone()
    changed[list(indices)] = rows.to(changed.device, changed.dtype)
    return changed


def _check_shape(place: WeightEntry, tensor: Tensor) -> None:
    assert place.matrix is not None
    shape = (place.matrix.outputs[place.rows_key], place.matrix.in_features)
    resized = place.is_embedding and tensor.ndim == 2 and tensor.shape[1] == shape[1] and len(tensor) > 0
    if tuple(tensor.shape) != shape and not resized:
        raise AdapterError(
            f"The adapter's {place.name}.weight is {tuple(tensor.shape)}, this model's is {shape}.",
            hint="Give the model that it was trained on.",
        )


def _is_own(place: WeightEntry, tensor: Tensor, adapter: Adapter) -> bool:
    """Whether a matrix gives the very parts that the model has: then it is the base's."""
    assert place.matrix is not None
    matrix, key = place.matrix, place.rows_key
    shape = (matrix.outputs[key], matrix.in_features)
    if tuple(tensor.shape) != shape:
        return False
    if matrix.scheme.name == "dynamic8":  # bitsandbytes writes it; a base layer that PEFT saved along is frozen
        return f"{place.name}.weight" in adapter.base_layers
    parts = matrix.of(key)
    blocks = row_blocks(shape, matrix.scheme)
    return all(_same_rows(tensor[rows], parts, shape, rows, matrix.scheme) for rows in blocks)


def _same_rows(block: Tensor, parts: dict[str, Tensor], shape: tuple[int, int], rows: slice, scheme: Scheme) -> bool:
    own = full_rows(parts, shape, rows, scheme)
    if scheme.name == "none":
        return _equal(own, block)
    made = scheme.quantise(block.to(own.device).float())
    return torch.equal(dequantise(scheme, made, tuple(block.shape)), own)  # type: ignore[arg-type]


def _equal(own: Tensor, given: Tensor) -> bool:
    return torch.equal(own, given.to(own.device, own.dtype))


def _replace_tables_(embed: WeightEntry, head: WeightEntry, matrices: Matrices, *, untied: bool) -> None:
    tied = embed.matrix is head.matrix and not untied
    if tied and embed.name in matrices:
        assert isinstance(embed.layer, FrozenEmbedding)
        assert isinstance(head.layer, FrozenLinear)
        _replace_rows_(embed, matrices)
        head.layer.matrix = embed.layer.matrix
        return
    for place in (embed, head):
        if place.name in matrices:
            _replace_rows_(place, matrices)


def _replace_rows_(place: WeightEntry, matrices: Matrices) -> None:
    """Gives the place's layer an unquantised matrix: the adapter's rows for `place`, the old ones for other names."""
    layer = place.layer
    assert isinstance(layer, FrozenLinear | FrozenEmbedding)
    old, tensor = layer.matrix, matrices[place.name]
    single = len(old.outputs) == 1
    outputs = {place.key: len(tensor)} if single else old.outputs
    new = FrozenMatrix(old.in_features, outputs)
    new.allocate(scheme_named("none"), old.dtype, old.device)
    if not single:
        old.fill(new.parts["weight"])
    new.put(place.key, {"weight": tensor.to(old.device, old.dtype)})
    if not bool(torch.stack(new.of(place.key)["weight"].aminmax()).isfinite().all()):
        raise AdapterError(
            f"The adapter's {place.name}.weight holds numbers that are too large for {old.dtype}.",
            hint="Choose another compute type with --dtype.",
        )
    layer.matrix = new


def _resize_head_bias_(head: WeightEntry, adapter: Adapter) -> None:
    layer = head.layer
    assert isinstance(layer, FrozenLinear)
    rows = layer.matrix.shape[0]
    if layer.bias is None or len(layer.bias) == rows:
        return
    given = adapter.full.get(f"{head.name}.bias")
    if given is None or len(given) != rows:
        raise AdapterError(f"With the adapter the head has {rows:,} rows, and no bias for them.")
    layer.bias = nn.Parameter(given.to(layer.bias.device, layer.bias.dtype), requires_grad=False)


def _parameter(table: Mapping[str, WeightEntry], key: str) -> Tensor | None:
    """The norm's number or the bias that a key names; None for a matrix."""
    name, _, kind = key.rpartition(".")
    return table[name].parameter(kind)


def _put_parameter_(table: Mapping[str, WeightEntry], key: str, tensor: Tensor) -> None:
    target = _parameter(table, key)
    if target is None:
        return
    if target.shape != tensor.shape:
        raise AdapterError(f"The adapter's {key} is {tuple(tensor.shape)}, the model's {tuple(target.shape)}.")
    target.copy_(tensor)
