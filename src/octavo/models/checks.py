"""Checks of a family: that its Config has what the decoder reads, and that its weight map fills the whole decoder.

A layer without a module of the checkpoint would compute with uninitialized memory, and a module in a wrong block with
wrong weights; neither shows in shapes alone. `build` therefore checks every decoder before weights are read. What no
check can see are layers of equal shape that are exchanged within a block, and a missing row order: parity with
transformers shows these (tests/models/test_parity.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from torch import nn

from octavo.errors import ModelError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.models.decoder import DecoderConfig
from octavo.models.weight_map import RowOrder, WeightEntry, WeightPath, layer_of

HINT = "This is a mistake in the model's family, src/octavo/models; see docs/adding-a-model.md."
Tensors = dict[tuple[int, str, str], str]  # (id of the matrix or the layer, key of its rows, kind) -> description


def check_config(config: DecoderConfig) -> None:
    """ModelError if a family's Config lacks something that the decoder reads."""
    missing = [name for name in vars(DecoderConfig) if not name.startswith("_") and not hasattr(config, name)]
    if missing:
        raise ModelError(f"{type(config).__module__}.Config lacks {', '.join(missing)}.", hint=HINT)
    where = f"{type(config).__module__}.Config"
    if len(config.attention) != config.layers:
        raise ModelError(f"{where} has the attention of {len(config.attention)} of {config.layers} layers.", hint=HINT)
    for layer in config.attention:
        if layer.rotary is not None and (rotated := 2 * len(layer.rotary.frequencies)) > config.head_size:
            raise ModelError(f"{where} rotates {rotated} values of a head of {config.head_size}.", hint=HINT)


def check_paths(decoder: nn.Module, paths: Mapping[str, WeightPath]) -> None:
    """ModelError unless every path of a weight map is that of a layer, in the block that the module's name says."""
    layers = dict(decoder.named_modules())
    modules: dict[str, str] = {}  # in PEFT's files -> in the checkpoint
    for name, path in paths.items():
        if (other := modules.setdefault(path.module or name, name)) != name:
            raise ModelError(f"The weight map gives {other} and {name} one module, {path.module or name}.", hint=HINT)
        if (number := layer_of(name)) is not None and layer_of(f"{path.path}.") != number:
            raise ModelError(f"The weight map gives {name} the layer {path.path!r}, of another block.", hint=HINT)
        if path.path not in layers:
            parent = path.path.rpartition(".")[0]
            siblings = ", ".join(layer for layer, _ in layers[parent].named_children()) if parent in layers else ""
            raise ModelError(
                f"The weight map gives {name} the layer {path.path!r}, which the decoder does not have"
                + (f"; {parent or 'it'} has {siblings}." if siblings else "."),
                hint=HINT,
            )


def check_entries(decoder: nn.Module, entries: Iterable[WeightEntry], *, tied: bool) -> None:
    """ModelError unless the weight map fills all rows and parameters of the decoder, each with one module."""
    expected: Tensors = _tensors_of(decoder)
    filled: dict[tuple[int, str, str], str] = {}  # -> the name of its module
    for entry in entries:
        _check_rows(entry, tied=tied)
        for slot in _filled_by(entry, tied=tied):
            if slot in filled:
                names = f"{filled[slot]} and {entry.name}"
                raise ModelError(f"The weight map gives {expected[slot]} two modules: {names}.", hint=HINT)
            filled[slot] = entry.name
    if missing := [description for slot, description in expected.items() if slot not in filled]:
        more = f" and {len(missing) - 1:,} more" * (len(missing) > 1)
        raise ModelError(f"The weight map gives no module for {missing[0]}{more}.", hint=HINT)


def _check_rows(entry: WeightEntry, *, tied: bool) -> None:
    """ModelError unless the module's last name is a name of its matrix, and its row order has as many rows."""
    if entry.transposed and (entry.matrix is None or entry.is_embedding):
        raise ModelError(f"{entry.name} is transposed, but it is no linear of a block.", hint=HINT)
    if entry.matrix is None:
        sizes = {len(parameter) for kind in ("weight", "bias") if (parameter := entry.parameter(kind)) is not None}
        if entry.order is not None and not all(_orders(entry.order, size) for size in sizes):
            raise ModelError(f"The row order of {entry.name}, {entry.order}, is none of {sizes} values.", hint=HINT)
        return
    if entry.order is not None and entry.is_embedding:
        raise ModelError(f"{entry.name} has a row order, but its rows are in the order of the token ids.", hint=HINT)
    if entry.key not in entry.matrix.outputs and not (tied and entry.is_head):
        names = ", ".join(entry.matrix.outputs)
        raise ModelError(f"{entry.name} is on a matrix whose outputs are {names}: none is {entry.key}.", hint=HINT)
    rows, order = entry.matrix.outputs[entry.rows_key], entry.order
    if order is not None and not _orders(order, rows):
        raise ModelError(f"The row order of {entry.name}, {order}, is none of {rows:,} rows.", hint=HINT)


def _orders(order: RowOrder, rows: int) -> bool:
    return min(order.shape) > 0 and prod(order.shape) == rows and sorted(order.axes) == list(range(len(order.shape)))


def _tensors_of(decoder: nn.Module) -> Tensors:
    """The tensors of a decoder that a checkpoint fills: rows of matrices, biases of linears, other parameters.

    ModelError for a parameter with two names and for a buffer: loading makes new parameters, and no buffers.
    """
    tensors: Tensors = {}
    for path, layer in decoder.named_modules():
        if isinstance(layer, FrozenLinear | FrozenEmbedding):
            for key in layer.matrix.outputs:
                tensors.setdefault((id(layer.matrix), key, "weight"), f"the rows {key} of {path}")
        if isinstance(layer, FrozenLinear):
            tensors |= {(id(layer), key, "bias"): f"the bias {key} of {path}" for key in layer.bias_names}
        own = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
        if len(set(own.values())) < len(own):
            raise ModelError(f"Two of the names {', '.join(own)} of {path} are one parameter.", hint=HINT)
        for name in own:
            if not (isinstance(layer, FrozenLinear) and name == "bias"):
                tensors[id(layer), "", name] = f"the parameter {path}.{name}"
        if buffers := [name for name, _ in layer.named_buffers(recurse=False)]:
            raise ModelError(
                f"{path} has the buffer {buffers[0]}, which no checkpoint fills: compute it in forward.", hint=HINT
            )
    return tensors


def _filled_by(entry: WeightEntry, *, tied: bool) -> Iterator[tuple[int, str, str]]:
    """The tensors that loading one module fills (store/weights.py)."""
    if entry.matrix is not None:
        if not (tied and entry.is_head):
            yield id(entry.matrix), entry.rows_key, "weight"
        if entry.parameter("bias") is not None:
            yield id(entry.layer), entry.rows_key, "bias"
        return
    for kind in ("weight", "bias"):
        if entry.parameter(kind) is not None:
            yield id(entry.layer), "", kind
