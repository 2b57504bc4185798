"""Applies an adapter's full weights to frozen layers: PEFT's modules_to_save, saved embeddings, trained tokens.

A matrix that the adapter changes is stored unquantized in the compute type, whatever the model's scheme, since PEFT
trained it so. A matrix equal to the model's own is ignored: PEFT also saves embeddings that were not trained.

For a model with tied embedding and head: a copy in modules_to_save belongs to that module alone, and PEFT unties the
two. A weight outside modules_to_save is the base's own and belongs to both modules, as do trained token rows.

Legend: V vocabulary size, N rows of any matrix, K its columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.models import Decoder, WeightEntry
from octavo.ops.quantize import Scheme, dequantize, scheme_named
from octavo.store.peft import Adapter
from octavo.store.weights import full_rows, row_blocks

Matrices = dict[str, Tensor]  # module name -> matrix (N, K) of any floating-point type


def changed_keys(adapter: Adapter, entries: Mapping[str, WeightEntry]) -> list[str]:
    """The adapter's tensors, apart from LoRA, that differ from the model's, e.g. lm_head.weight."""
    adapter = _in_decoder_order(adapter, entries)
    embed, head = _embedding_and_head(entries)
    matrices, _ = _changed_matrices(adapter, entries, embed, head)
    keys = [f"{name}.weight" for name in matrices]
    for key, tensor in adapter.full.items():
        target = _parameter(entries, key)
        if target is not None and not (target.shape == tensor.shape and _equal(target, tensor)):
            keys.append(key)
    return keys


def put_weights_(model: Decoder, adapter: Adapter, entries: Mapping[str, WeightEntry]) -> None:
    """Applies the adapter's full weights, norms and biases to the model. AdapterError for a shape that does not fit.

    The vocabulary takes the size of the adapter's embedding and head, which are untied if they differ.
    """
    adapter = _in_decoder_order(adapter, entries)
    embed, head = _embedding_and_head(entries)
    matrices, untied = _changed_matrices(adapter, entries, embed, head)
    rows = {
        entry.name: len(matrices.get(entry.name, range(entry.matrix.outputs[entry.rows_key])))
        for entry in (embed, head)
        if entry.matrix is not None
    }
    if len(set(rows.values())) > 1:
        raise AdapterError(
            f"With the adapter the embedding has {rows[embed.name]:,} rows and the head {rows[head.name]:,}.",
            hint="The vocabulary was resized in training, but only one of the two was saved: save both, with PEFT's "
            "save_embedding_layers=True or modules_to_save.",
        )
    _replace_embedding_and_head_(embed, head, matrices, untied=untied)
    _resize_head_bias_(head, adapter)
    config: Any = model.config  # a frozen dataclass of the family
    model.config = replace(config, vocabulary=rows[embed.name], tied=config.tied and not untied)
    for entry in entries.values():
        if entry not in (embed, head) and entry.name in matrices:
            _replace_matrix_(entry, matrices)
    for key, tensor in adapter.full.items():
        _put_parameter_(entries, key, tensor)


def _in_decoder_order(adapter: Adapter, entries: Mapping[str, WeightEntry]) -> Adapter:
    """The adapter, with the rows of its full weights and biases in the decoder's order."""
    full = dict(adapter.full)
    for key, tensor in adapter.full.items():
        if (order := entries[key.rpartition(".")[0]].order) is not None:
            full[key] = order.from_checkpoint(tensor)
    return replace(adapter, full=full)


def _embedding_and_head(entries: Mapping[str, WeightEntry]) -> tuple[WeightEntry, WeightEntry]:
    """The weight-map entries of the embedding and of the head."""
    embed = next(entry for entry in entries.values() if isinstance(entry.layer, FrozenEmbedding))
    return embed, next(entry for entry in entries.values() if entry.is_head)


def _changed_matrices(
    adapter: Adapter, entries: Mapping[str, WeightEntry], embed: WeightEntry, head: WeightEntry
) -> tuple[Matrices, bool]:
    """(the matrices that differ from the model's, whether embedding and head must be untied)."""
    matrices = {
        name: tensor
        for key, tensor in adapter.full.items()
        if (name := key.removesuffix(".weight")) != key and entries[name].matrix is not None
    }
    for name, tensor in matrices.items():
        _check_shape(entries[name], tensor)
    for name, (indices, rows) in adapter.tokens.items():
        matrices[name] = _with_tokens(entries[name], matrices.get(name), indices, rows)
    untied = False
    if embed.matrix is head.matrix and (embed.name in matrices or head.name in matrices):
        # A weight that is not a copy of its own (modules_to_save) applies to both modules.
        for name, other in ((embed.name, head.name), (head.name, embed.name)):
            if name in matrices and other not in matrices and name not in adapter.separate:
                matrices[other] = matrices[name]
        e, h = matrices.get(embed.name), matrices.get(head.name)
        untied = e is None or h is None or not (e.shape == h.shape and torch.equal(e, h))
        if untied and all(t is None or _equals_model(p, t, adapter) for p, t in ((embed, e), (head, h))):
            untied = False
    changed = {name: tensor for name, tensor in matrices.items() if not _equals_model(entries[name], tensor, adapter)}
    return changed, untied


def _with_tokens(entry: WeightEntry, weight: Tensor | None, indices: tuple[int, ...], rows: Tensor) -> Tensor:
    """The adapter's `weight` (V, K), or the model's if it is None, with `rows` (len(indices), K) at `indices`."""
    matrix, key = entry.matrix, entry.rows_key
    assert matrix is not None
    shape = tuple(weight.shape) if weight is not None else (matrix.outputs[key], matrix.in_features)
    if tuple(rows.shape) != (len(indices), shape[1]) or max(indices, default=0) >= shape[0]:
        raise AdapterError(
            f"The adapter's rows for {len(indices)} tokens of {entry.name}, the last of which is "
            f"{max(indices, default=0):,}, are {tuple(rows.shape)}; this model's matrix is {shape}.",
            hint="Give the model that it was trained on.",
        )
    if weight is None:
        weight = dequantize(matrix.scheme, matrix.of(key), (shape[0], shape[1]), dtype=matrix.dtype)  # (V, K)
    changed = weight.float().clone()  # (V, K)
    changed[list(indices)] = rows.to(changed.device, changed.dtype)
    return changed


def _check_shape(entry: WeightEntry, tensor: Tensor) -> None:
    assert entry.matrix is not None
    shape = (entry.matrix.outputs[entry.rows_key], entry.matrix.in_features)
    resized = entry.is_embedding and tensor.ndim == 2 and tensor.shape[1] == shape[1] and len(tensor) > 0
    if tuple(tensor.shape) != shape and not resized:
        raise AdapterError(
            f"The adapter's {entry.name}.weight is {tuple(tensor.shape)}, this model's is {shape}.",
            hint="Give the model that it was trained on.",
        )


def _equals_model(entry: WeightEntry, tensor: Tensor, adapter: Adapter) -> bool:
    """Whether a matrix has the same quantized values as the model's: then it is the base's own."""
    assert entry.matrix is not None
    matrix, key = entry.matrix, entry.rows_key
    shape = (matrix.outputs[key], matrix.in_features)
    if tuple(tensor.shape) != shape:
        return False
    if matrix.scheme.name == "dynamic8":  # only bitsandbytes can quantize it; a base layer that PEFT saved is frozen
        return f"{entry.name}.weight" in adapter.base_layers
    parts = matrix.of(key)
    blocks = row_blocks(shape, matrix.scheme)
    return all(_same_rows(tensor[rows], parts, shape, rows, matrix.scheme) for rows in blocks)


def _same_rows(block: Tensor, parts: dict[str, Tensor], shape: tuple[int, int], rows: slice, scheme: Scheme) -> bool:
    model_rows = full_rows(parts, shape, rows, scheme)
    if scheme.name == "none":
        return _equal(model_rows, block)
    quantized = scheme.quantize(block.to(model_rows.device).float())
    return torch.equal(dequantize(scheme, quantized, tuple(block.shape)), model_rows)  # type: ignore[arg-type]


def _equal(target: Tensor, tensor: Tensor) -> bool:
    return torch.equal(target, tensor.to(target.device, target.dtype))


def _replace_embedding_and_head_(embed: WeightEntry, head: WeightEntry, matrices: Matrices, *, untied: bool) -> None:
    tied = embed.matrix is head.matrix and not untied
    if tied and embed.name in matrices:
        assert isinstance(embed.layer, FrozenEmbedding)
        assert isinstance(head.layer, FrozenLinear)
        _replace_matrix_(embed, matrices)
        head.layer.matrix = embed.layer.matrix
        return
    for entry in (embed, head):
        if entry.name in matrices:
            _replace_matrix_(entry, matrices)


def _replace_matrix_(entry: WeightEntry, matrices: Matrices) -> None:
    """Gives the layer of an entry an unquantized matrix: the adapter's rows for it, the model's for other entries."""
    layer = entry.layer
    assert isinstance(layer, FrozenLinear | FrozenEmbedding)
    old, tensor = layer.matrix, matrices[entry.name]
    single = len(old.outputs) == 1
    outputs = {entry.key: len(tensor)} if single else old.outputs
    new = FrozenMatrix(old.in_features, outputs)
    new.allocate(scheme_named("none"), old.dtype, old.device)
    if not single:
        old.fill(new.parts["weight"])
    new.put(entry.key, {"weight": tensor.to(old.device, old.dtype)})
    if not bool(torch.stack(new.of(entry.key)["weight"].aminmax()).isfinite().all()):
        raise AdapterError(
            f"The adapter's {entry.name}.weight holds values that are too large for {old.dtype}.",
            hint="Choose another compute type with --dtype.",
        )
    layer.matrix = new


def _resize_head_bias_(head: WeightEntry, adapter: Adapter) -> None:
    layer = head.layer
    assert isinstance(layer, FrozenLinear)
    rows = layer.matrix.shape[0]
    if layer.bias is None or len(layer.bias) == rows:
        return
    bias = adapter.full.get(f"{head.name}.bias")
    if bias is None or len(bias) != rows:
        raise AdapterError(f"With the adapter the head has {rows:,} rows, and no bias for them.")
    layer.bias = nn.Parameter(bias.to(layer.bias.device, layer.bias.dtype), requires_grad=False)


def _parameter(entries: Mapping[str, WeightEntry], key: str) -> Tensor | None:
    """The norm's parameter or the bias that a key names; None for a matrix."""
    name, _, kind = key.rpartition(".")
    return entries[name].parameter(kind)


def _put_parameter_(entries: Mapping[str, WeightEntry], key: str, tensor: Tensor) -> None:
    target = _parameter(entries, key)
    if target is None:
        return
    if target.shape != tensor.shape:
        raise AdapterError(f"The adapter's {key} is {tuple(tensor.shape)}, the model's {tuple(target.shape)}.")
    target.copy_(tensor)
