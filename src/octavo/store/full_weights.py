"""Applies an adapter's full weights to frozen layers: PEFT's modules_to_save, saved embeddings, trained tokens.

A matrix that the adapter changes is stored unquantized in the compute type, whatever the model's scheme, since PEFT
trained it so. A matrix equal to the model's own is ignored: PEFT also saves embeddings that were not trained.

Where the adapter has a weight of the embedding or the head, and the model ties the two:

    in modules_to_save              it belongs to this module alone: PEFT unties the two
    outside modules_to_save         it is the base's own, saved too: it belongs to both
    trained_token_indices           the rows of some tokens, trained: they belong to both

Legend: V vocabulary size, N rows of any matrix, K its columns. `entries` are the weight map's, by their names in the
checkpoint, which are also those of an adapter's tensors here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.models import Decoder, WeightEntry
from octavo.ops.quantize import dequantize, scheme_named
from octavo.ops.scheme import Scheme, Shape
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
    embed_rows, head_rows = _rows_after(embed, matrices), _rows_after(head, matrices)
    check_vocabulary(embed_rows, head_rows)
    _replace_embedding_and_head_(embed, head, matrices, untied=untied)
    _resize_head_bias_(head, adapter)
    config: Any = model.config  # a frozen dataclass of the family
    model.config = replace(config, vocabulary=embed_rows, tied=config.tied and not untied)
    for entry in entries.values():
        if entry not in (embed, head) and entry.name in matrices:
            _replace_matrix_(entry, matrices)
    for key, tensor in adapter.full.items():
        _put_parameter_(entries, key, tensor)


def _in_decoder_order(adapter: Adapter, entries: Mapping[str, WeightEntry]) -> Adapter:
    """The adapter, with its full weights (N, K) and biases, whose rows are in the decoder's order."""
    full = dict(adapter.full)
    for key, tensor in adapter.full.items():
        entry = entries[key.rpartition(".")[0]]
        if entry.transposed and tensor.ndim == 2:
            full[key] = tensor.t().contiguous()
        if entry.order is not None:
            full[key] = entry.order.from_checkpoint(full[key])
    return replace(adapter, full=full)


def _embedding_and_head(entries: Mapping[str, WeightEntry]) -> tuple[WeightEntry, WeightEntry]:
    """The weight-map entries of the embedding and of the head."""
    embed = next(entry for entry in entries.values() if isinstance(entry.layer, FrozenEmbedding))
    return embed, next(entry for entry in entries.values() if entry.is_head)


def check_vocabulary(embed_rows: int, head_rows: int) -> None:
    """AdapterError unless embedding and head have the same number of rows with the adapter."""
    if embed_rows != head_rows:
        raise AdapterError(
            f"With the adapter the embedding has {embed_rows:,} rows and the head {head_rows:,}.",
            hint="The vocabulary was resized in training, but only one of the two was saved: save both, with PEFT's "
            "save_embedding_layers=True or modules_to_save.",
        )


def _rows_after(entry: WeightEntry, matrices: Matrices) -> int:
    """The rows of an entry's matrix once the adapter's `matrices` are applied."""
    if entry.name in matrices:
        return len(matrices[entry.name])
    assert entry.matrix is not None  # None for a norm only
    return entry.matrix.outputs[entry.rows_key]


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
        check_shape(entries[name], tensor)
    for name, (token_ids, trained_rows) in adapter.tokens.items():  # PEFT's trainable_token_indices
        matrices[name] = _with_tokens(entries[name], matrices.get(name), token_ids, trained_rows)
    untied = False
    if embed.matrix is head.matrix and (embed.name in matrices or head.name in matrices):
        # A weight outside PEFT's modules_to_save (`adapter.separate`) belongs to both modules.
        for name, other in ((embed.name, head.name), (head.name, embed.name)):
            if name in matrices and other not in matrices and name not in adapter.separate:
                matrices[other] = matrices[name]
        e, h = matrices.get(embed.name), matrices.get(head.name)
        differ = e is None or h is None or not (e.shape == h.shape and torch.equal(e, h))
        # PEFT saves a module of modules_to_save also if its training changed nothing: then the two stay tied.
        untied = differ and not _all_equal_quantized(((embed, e), (head, h)), adapter)
    changed = {
        name: matrix for name, matrix in matrices.items() if not _equals_quantized(entries[name], matrix, adapter)
    }
    return changed, untied


def _with_tokens(entry: WeightEntry, weight: Tensor | None, token_ids: tuple[int, ...], trained_rows: Tensor) -> Tensor:
    """The adapter's `weight` (V, K), or the model's if it is None, with the `trained_rows` (len(token_ids), K)."""
    matrix, key = entry.matrix, entry.rows_key
    assert matrix is not None
    rows, columns = weight.shape if weight is not None else (matrix.outputs[key], matrix.in_features)
    shape = (rows, columns)
    check_tokens(entry, shape, token_ids, trained_rows)
    if weight is None:
        weight = dequantize(matrix.scheme, matrix.of(key), shape, dtype=matrix.dtype)  # (V, K)
    changed = weight.float().clone()  # (V, K)
    changed[list(token_ids)] = trained_rows.to(changed.device, changed.dtype)
    return changed


def check_tokens(entry: WeightEntry, shape: Shape, token_ids: tuple[int, ...], trained_rows: Tensor) -> None:
    """AdapterError unless the rows (n, K) of n trained tokens are rows of a matrix of `shape` (V, K)."""
    if tuple(trained_rows.shape) != (len(token_ids), shape[1]) or max(token_ids, default=0) >= shape[0]:
        raise AdapterError(
            f"The adapter's rows for {len(token_ids)} tokens of {entry.name}, the last of which is "
            f"{max(token_ids, default=0):,}, are {tuple(trained_rows.shape)}; this model's matrix is {shape}.",
            hint="Give the model that it was trained on.",
        )


def check_shape(entry: WeightEntry, tensor: Tensor) -> None:
    """AdapterError unless a full weight (N, K) has the shape of the model's, or is that of a resized vocabulary."""
    assert entry.matrix is not None
    shape = (entry.matrix.outputs[entry.rows_key], entry.matrix.in_features)
    resized = entry.is_embedding and tensor.ndim == 2 and tensor.shape[1] == shape[1] and len(tensor) > 0
    if tuple(tensor.shape) != shape and not resized:
        raise AdapterError(
            f"The adapter's {entry.name}.weight is {tuple(tensor.shape)}, this model's is {shape}.",
            hint="Give the model that it was trained on.",
        )


def _all_equal_quantized(matrices: Iterable[tuple[WeightEntry, Tensor | None]], adapter: Adapter) -> bool:
    """`_equals_quantized` of all matrices that are not None."""
    return all(matrix is None or _equals_quantized(entry, matrix, adapter) for entry, matrix in matrices)


def _equals_quantized(entry: WeightEntry, tensor: Tensor, adapter: Adapter) -> bool:
    """Whether a matrix, quantized like the model's, has the same values: then it is the base's own."""
    assert entry.matrix is not None
    matrix, key = entry.matrix, entry.rows_key
    shape = (matrix.outputs[key], matrix.in_features)
    if tuple(tensor.shape) != shape:
        return False
    in_two_passes = matrix.scheme.first_pass is not matrix.scheme
    # Only bitsandbytes can quantize dynamic8, and nf4-double has the mean of the rows in the checkpoint's order. A base
    # layer that PEFT saved is frozen.
    if matrix.scheme.name == "dynamic8" or (in_two_passes and entry.order is not None):
        return f"{entry.name}.weight" in adapter.base_layers
    parts = matrix.of(key)
    blocks = [slice(0, shape[0])] if in_two_passes else row_blocks(shape, matrix.scheme)
    return all(_same_block(tensor[block], parts, shape, block, matrix.scheme) for block in blocks)


def _same_block(rows: Tensor, parts: dict[str, Tensor], shape: tuple[int, int], block: slice, scheme: Scheme) -> bool:
    """Whether `rows` equal the rows `block` of the model's matrix, of `shape`."""
    model_rows = full_rows(parts, shape, block, scheme)
    if scheme.name == "none":
        return _equal(model_rows, rows)
    quantized = scheme.quantize(rows.to(model_rows.device).float())
    return torch.equal(dequantize(scheme, quantized, tuple(rows.shape)), model_rows)  # type: ignore[arg-type]


def _equal(target: Tensor, tensor: Tensor) -> bool:
    return torch.equal(target, tensor.to(target.device, target.dtype))


def _replace_embedding_and_head_(embed: WeightEntry, head: WeightEntry, matrices: Matrices, *, untied: bool) -> None:
    tied = embed.matrix is head.matrix and not untied
    if tied and embed.name in matrices:
        assert isinstance(embed.layer, FrozenEmbedding)
        assert isinstance(head.layer, FrozenLinear)
        _replace_matrix_(embed, matrices)
        head.layer.replace_matrix_(embed.layer.matrix)
        return
    for entry in (embed, head):
        if entry.name in matrices:
            _replace_matrix_(entry, matrices)


def _replace_matrix_(entry: WeightEntry, matrices: Matrices) -> None:
    """Gives the layer of an entry an unquantized matrix with the adapter's rows for this entry.

    The matrix may stack several entries (q, k and v): the rows of the others are the model's, dequantized.
    """
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
    if isinstance(layer, FrozenLinear):
        layer.replace_matrix_(new)
    else:
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
    """The model's tensor that a key names, if it is a norm's weight or a bias; None if it is a matrix."""
    name, _, kind = key.rpartition(".")
    return entries[name].parameter(kind)


def _put_parameter_(entries: Mapping[str, WeightEntry], key: str, tensor: Tensor) -> None:
    target = _parameter(entries, key)
    if target is None:
        name, _, kind = key.rpartition(".")
        if kind == "weight" and entries[name].matrix is not None:
            return  # `put_weights_` has replaced the matrix
        raise AdapterError(f"The model has no parameter for the adapter's {key}.")
    if target.shape != tensor.shape:
        raise AdapterError(f"The adapter's {key} is {tuple(tensor.shape)}, the model's {tuple(target.shape)}.")
    target.copy_(tensor)
