"""Weights of a source into a model, or into a folder: a block of rows at a time, quantised as it passes.

A folder that octavo writes under a scheme is a Hugging Face folder whose config.json has one more entry,
"octavo": {"scheme": ..}, and whose frozen tensors stand under the names of hivemind/gpt-j-6B-8bit:
NAME.weight holds the codes, NAME.absmax the scales, NAME.code the code table of dynamic8. Under the scheme
`none` it is a plain Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.errors import ModelError
from octavo.models import Model, WeightEntry, build, weight_entries
from octavo.ops.quantize import Parts, Scheme, Shape, dequantise
from octavo.store.contents import Item, check_shapes, entries, misshapen, scheme_at, stored_scheme
from octavo.store.sources import Source

PLAIN_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights under no scheme
# Numbers that are quantised at a time. A copy of them in float32, 4 MiB, stays in a core's cache and in memory that
# is handed out again: ten times as fast as whole tensors, whose copies come from the system page by page.
BLOCK_NUMBERS = 2**20


def load(
    source: Source,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of `source`, frozen under `scheme`, computing in `dtype` on `device`, in eval mode.

    What is stored under the same scheme is taken bit for bit; anything else is quantised as it passes.
    Memory: the quantised model, and of the host's a few blocks of rows beside the tensor that is read (which a
    mapped file, as of safetensors, lends without taking any). ModelError names what is missing, unknown, misshapen
    or not finite.
    """
    model = build(source.config)
    stored = stored_scheme(source)
    items = entries(source, model)
    check_shapes(source, items)
    _allocate_(model, scheme, dtype=dtype, device=device)
    for done, (name, item) in enumerate(items.items()):
        if item.is_matrix:
            own, wanted = scheme_at(item.place, stored), scheme_at(item.place, scheme)
            _put_matrix(source, name, item.place, stored=own, scheme=wanted, dtype=dtype, device=device)
        else:
            _put_parameter(name, item, source.tensor(name))
        if progress:
            progress(done + 1, len(items))
    return model


def allocated(config: Mapping[str, Any], scheme: Scheme, *, dtype: torch.dtype, device: torch.device) -> Model:
    """The model of a config.json with room for its numbers under `scheme`; on the meta device their shapes alone."""
    model = build(config)
    _allocate_(model, scheme, dtype=dtype, device=device)
    return model


def _allocate_(model: Model, scheme: Scheme, *, dtype: torch.dtype, device: torch.device) -> None:
    _make_room_(model, device)
    for place in {id(place.matrix): place for place in weight_entries(model).values()}.values():
        if place.matrix is not None:
            place.matrix.allocate(scheme_at(place, scheme), dtype, device)


def _make_room_(model: Model, device: torch.device) -> None:
    """Empty norms and biases on `device`. nn.Module.to_empty would do, but imports 500 modules to find out how."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def matrix_parts(source: Source, name: str, place: WeightEntry, stored: Scheme) -> Parts:
    """The stored parts of one frozen weight; shapes and types are as they must be, all numbers finite."""
    assert place.matrix is not None
    shape = (place.matrix.outputs[place.rows_key], place.matrix.in_features)
    module = name.removesuffix(".weight")
    parts = {}
    for part, (size, dtype) in stored.layout(shape, torch.float32).items():
        key = name if part == "weight" else f"{module}.{part}"
        if key != name and key not in source.names():
            raise ModelError(f"The checkpoint {source.files[0].parent} lacks {key}.")
        tensor = source.tensor(key)
        if part == "weight" and stored.name == "nf4":
            tensor = tensor.reshape(-1)
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
    """All rows of an (N, K) matrix in runs of about BLOCK_NUMBERS numbers, such that under each scheme the parts of
    the runs, put end to end, are the parts of the matrix.
    """
    rows, columns = shape
    step = 1
    while step < rows and not all(scheme.joins((step, columns)) for scheme in schemes):
        step *= 2  # the blocks of the schemes are powers of two
    step *= max(1, BLOCK_NUMBERS // (step * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def parts_of_rows(parts: Parts, shape: Shape, rows: slice, scheme: Scheme) -> Parts:
    """The parts of a run of `row_blocks`: views."""
    before = scheme.layout((rows.start, shape[1]), torch.float32)
    own = scheme.layout((rows.stop - rows.start, shape[1]), torch.float32)
    return {
        part: whole if part == "code" else whole.narrow(0, before[part][0][0], own[part][0][0])
        for part, whole in parts.items()
    }


def full_rows(parts: Parts, shape: Shape, rows: slice, scheme: Scheme) -> Tensor:
    """A run of `row_blocks` as floating-point numbers: as stored, or dequantised to float32."""
    own = parts_of_rows(parts, shape, rows, scheme)
    return own["weight"] if scheme.name == "none" else dequantise(scheme, own, (rows.stop - rows.start, shape[1]))


def put_rows_(target: Parts, shape: Shape, rows: slice, scheme: Scheme, weight: Tensor) -> Parts:
    """Quantises a run of `row_blocks` into its place among the parts of the matrix; the run's own parts."""
    made = scheme.quantise(weight)
    for part, room in parts_of_rows(target, shape, rows, scheme).items():
        room.copy_(made[part])
    return made


def _put_matrix(
    source: Source,
    name: str,
    place: WeightEntry,
    *,
    stored: Scheme,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    assert place.matrix is not None
    shape = (place.matrix.outputs[place.rows_key], place.matrix.in_features)
    parts = matrix_parts(source, name, place, stored)
    if stored is scheme and scheme.name != "none":
        # Names of one matrix share the code table that stands in it from the first of them on.
        shared = "code" in parts and place.rows_key != next(iter(place.matrix.outputs))
        if shared and not torch.equal(place.matrix.parts["code"], parts["code"].to(device)):
            raise ModelError(f"{name} has another code table than the layers beside it.")
        place.matrix.put(place.rows_key, parts)
        return
    target = place.matrix.of(place.rows_key)
    for rows in row_blocks(shape, stored, scheme):
        weight = full_rows(parts, shape, rows, stored).to(device)
        if scheme.name == "none" and dtype != weight.dtype:
            weight = weight.to(dtype)
            check_finite(f"{name} as {dtype}", weight, hint="Choose another compute type.")
        put_rows_(target, shape, rows, scheme, weight)


def _put_parameter(name: str, item: Item, tensor: Tensor) -> None:
    target = item.place.parameter(item.kind)
    assert target is not None
    if tensor.shape != target.shape:
        raise misshapen(name, tensor.shape, target.shape)
    check_finite(name, tensor)
    target.copy_(tensor)


def check_finite(name: str, tensor: Tensor, *, hint: str = "The checkpoint is damaged.") -> None:
    """ModelError unless all numbers of a tensor are finite."""
    # A NaN or an infinity shows in the smallest or the largest number; unlike isfinite() this copies nothing.
    if not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise ModelError(f"{name} holds numbers that are not finite.", hint=hint)
