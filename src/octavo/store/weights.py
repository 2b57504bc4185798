"""Loads the weights of a source into a model or a folder, quantizing them block by block of rows.

A folder that octavo writes under a scheme is a Hugging Face folder with one more entry in config.json,
"octavo": {"format": .., "scheme": ..}. Its frozen tensors have the names of hivemind/gpt-j-6B-8bit: NAME.weight are
the quantized values, NAME.absmax the scales, and NAME.code the code table of dynamic8 and nf4-double. nf4-double has
NAME.nested_absmax and NAME.nested_offset too. Under the scheme `none` it is a plain Hugging Face folder.

Legend: (N, K) of a matrix, N outputs and K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import ModelError
from octavo.models import Decoder, WeightEntry, build, weight_entries
from octavo.models.weight_map import RowOrder
from octavo.ops.quantize import SCHEMES, dequantize
from octavo.ops.scheme import Parts, Scheme, Shape, parts_of_rows
from octavo.store.contents import Item, check_shapes, entries, is_transposed, misshapen, scheme_at, stored_scheme_at
from octavo.store.sources import Source

PLAIN_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of unquantized weights
# Values that are quantized at a time. Their float32 copy of 4 MiB stays in the cache of a core and reuses allocator
# memory. That is 10x faster than whole tensors, whose copies the system provides page by page.
BLOCK_VALUES = 2**20


def load(
    source: Source,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model of `source`, frozen under `scheme`, with compute type `dtype` on `device`, in eval mode.

    Weights stored under the same scheme are taken bit for bit. Other weights are quantized while they are read.
    Memory: the quantized model, plus on the CPU a few blocks of rows and the tensor being read (a memory-mapped file
    such as safetensors takes none). ModelError for a tensor that is missing, unknown, of a wrong shape or not finite.
    """
    model = build(source.config)
    items = entries(source, model)
    check_shapes(source, items)
    _allocate_(model, scheme, dtype=dtype, device=device)
    for done, (name, item) in enumerate(items.items()):
        if item.is_matrix:
            old, new = stored_scheme_at(source, item.entry), scheme_at(item.entry, scheme)
            _put_matrix(source, name, item.entry, stored=old, scheme=new, dtype=dtype, device=device)
        else:
            _put_parameter(name, item, source.tensor(name))
        if progress:
            progress(done + 1, len(items))
    return model


def allocated(config: Mapping[str, Any], scheme: Scheme, *, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model of a config.json with uninitialized memory under `scheme`; on the meta device only the shapes."""
    model = build(config)
    _allocate_(model, scheme, dtype=dtype, device=device)
    return model


def _allocate_(model: Decoder, scheme: Scheme, *, dtype: torch.dtype, device: torch.device) -> None:
    _allocate_parameters_(model, device)
    for entry in {id(entry.matrix): entry for entry in weight_entries(model).values()}.values():
        if entry.matrix is not None:
            entry.matrix.allocate(scheme_at(entry, scheme), dtype, device)


def _allocate_parameters_(model: Decoder, device: torch.device) -> None:
    """Empty norms and biases on `device`. nn.Module.to_empty does the same, but imports 500 modules for it."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def matrix_parts(source: Source, name: str, entry: WeightEntry, stored: Scheme) -> Parts:
    """The stored parts of one frozen weight. ModelError for a wrong shape or type, or values that are not finite."""
    assert entry.matrix is not None
    shape = (entry.matrix.outputs[entry.rows_key], entry.matrix.in_features)
    module = name.removesuffix(".weight")
    parts = {}
    for part, (size, dtype) in stored.layout(shape, torch.float32).items():
        key = name if part == "weight" else f"{module}.{part}"
        if key != name and key not in source.names():
            raise ModelError(f"The checkpoint {source.files[0].parent} lacks {key}.")
        tensor = source.tensor(key)
        if part == "weight" and len(size) == 1:  # bitsandbytes writes a column
            tensor = tensor.reshape(-1)
        if is_transposed(entry, stored) and tensor.ndim == 2:
            tensor = tensor.t()  # a view
        if tuple(tensor.shape) != tuple(size):
            raise misshapen(key, tensor.shape, size)
        if tensor.dtype != dtype and not (stored.name == "none" and tensor.dtype in PLAIN_TYPES):
            raise ModelError(
                f"{key} is {tensor.dtype}, but the scheme {stored.name} stores {dtype}.",
                hint="Is config.json the one that belongs to the weights?",
            )
        if tensor.is_floating_point():
            check_finite(key, tensor)
        parts[part] = tensor
    return parts


def row_blocks(shape: Shape, *schemes: Scheme) -> Iterator[slice]:
    """Slices over all rows of an (N, K) matrix, about BLOCK_VALUES values each.

    Under each of `schemes` the parts of the slices, concatenated, are the parts of the matrix.
    """
    rows, columns = shape
    step = 1
    while step < rows and not all(scheme.stacks((step, columns)) for scheme in schemes):
        step *= 2  # the blocks of the schemes are powers of two
    step *= max(1, BLOCK_VALUES // (step * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def full_rows(parts: Parts, shape: Shape, rows: slice, scheme: Scheme) -> Tensor:
    """A slice of `row_blocks` in floating point (rows, K): as stored, or dequantized to float32."""
    block = parts_of_rows(parts, shape, rows, scheme)
    if scheme.name == "none":
        return block["weight"].contiguous()  # a copy if the matrix is stored transposed
    return dequantize(scheme, block, (rows.stop - rows.start, shape[1]))


def put_rows_(target: Parts, shape: Shape, rows: slice, scheme: Scheme, weight: Tensor) -> Parts:
    """Quantizes `weight`, a slice of `row_blocks`, into the parts `target` of the matrix. Returns the slice's parts."""
    quantized = scheme.quantize(weight)
    for part, view in parts_of_rows(target, shape, rows, scheme).items():
        view.copy_(quantized[part])
    return quantized


def requantized(parts: Parts, shape: Shape, stored: Scheme, scheme: Scheme, device: torch.device) -> Parts:
    """The parts under `scheme`, on `device`, of a matrix that is stored under `stored`, in blocks of rows."""
    first = scheme.first_pass
    layout = first.layout(shape, torch.float32)
    target = {part: torch.empty(size, dtype=dtype, device=device) for part, (size, dtype) in layout.items()}
    for rows in row_blocks(shape, stored, first):
        put_rows_(target, shape, rows, first, full_rows(parts, shape, rows, stored).to(device))
    return scheme.finish(target)


def _put_matrix(
    source: Source,
    name: str,
    entry: WeightEntry,
    *,
    stored: Scheme,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    assert entry.matrix is not None
    shape = (entry.matrix.outputs[entry.rows_key], entry.matrix.in_features)
    parts = matrix_parts(source, name, entry, stored)
    # Scales of the whole matrix are computed in the checkpoint's order of rows, so that a folder has the same bits.
    in_two_passes = stored is not scheme and scheme.first_pass is not scheme
    if in_two_passes and (entry.order is None or scheme.stacks((entry.order.run, shape[1]))):
        parts, stored = requantized(parts, shape, stored, scheme, device), scheme
    if entry.order is not None:
        check_row_order(name, entry, stored)
        parts = _reordered(parts, entry.order)
    if in_two_passes and stored is not scheme:
        parts, stored = requantized(parts, shape, stored, scheme, device), scheme
    if stored is scheme and scheme.name != "none":
        # The weights of one matrix share a code table, which the first of them has put into the matrix.
        shared = "code" in parts and entry.rows_key != next(iter(entry.matrix.outputs))
        if shared and not torch.equal(entry.matrix.parts["code"], parts["code"].to(device)):
            raise ModelError(f"{name} has another code table than the layers that share its matrix.")
        entry.matrix.put(entry.rows_key, parts)
        return
    target = entry.matrix.of(entry.rows_key)
    for rows in row_blocks(shape, stored, scheme):
        weight = full_rows(parts, shape, rows, stored).to(device)
        if scheme.name == "none" and dtype != weight.dtype:
            weight = weight.to(dtype)
            check_finite(f"{name} as {dtype}", weight, hint="Choose another compute type.")
        put_rows_(target, shape, rows, scheme, weight)


def check_row_order(name: str, entry: WeightEntry, stored: Scheme) -> None:
    """ModelError if a weight is reordered at load and its stored scales belong to rows that the order separates."""
    assert entry.matrix is not None
    columns = entry.matrix.in_features
    if entry.order is None or stored.stacks((entry.order.run, columns)):
        return
    raise ModelError(
        f"{name} is reordered at load in runs of {entry.order.run:,} x {columns:,} values, which are not whole blocks "
        f"of the scheme {stored.name}.",
        hint=f"Write it with --scheme {' or '.join(_storable(entry.order, columns))}. A run, `octavo evaluate` and "
        f"`octavo serve` can also quantize to {stored.name} while they load.",
    )


def _storable(order: RowOrder, columns: int) -> list[str]:
    """The schemes under which a matrix with this order of rows can be stored."""
    return [name for name, scheme in SCHEMES.items() if name != "none" and scheme.stacks((order.run, columns))]


def _reordered(parts: Parts, order: RowOrder) -> Parts:
    """The parts of a checkpoint's matrix (N, K) with its rows in the decoder's order. Its runs are whole blocks."""
    runs = order.of_runs
    count = prod(runs.shape)
    return {
        part: tensor if part == "code" else runs.from_checkpoint(tensor.reshape(count, -1)).reshape(tensor.shape)
        for part, tensor in parts.items()
    }


def _put_parameter(name: str, item: Item, tensor: Tensor) -> None:
    target = item.entry.parameter(item.kind)
    assert target is not None
    if tensor.shape != target.shape:
        raise misshapen(name, tensor.shape, target.shape)
    check_finite(name, tensor)
    order = item.entry.order
    target.copy_(tensor if order is None else order.from_checkpoint(tensor))


def check_finite(name: str, tensor: Tensor, *, hint: str = "The checkpoint is damaged.") -> None:
    """ModelError unless all values of a tensor are finite."""
    # A NaN or an infinity appears in the minimum or the maximum. Unlike isfinite() this allocates nothing.
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise ModelError(f"{name} holds values that are not finite.", hint=hint)
