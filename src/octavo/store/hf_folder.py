"""Writes a source into a sink under a quantization scheme, for `octavo quantize` and `octavo convert`.

It streams: in memory are what the sink holds (of a folder one open shard), one quantized tensor and a few blocks of
rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo._version import __version__
from octavo.models import build, weight_entries
from octavo.ops.quantize import dequantize, stored_bytes
from octavo.ops.scheme import Parts, Scheme, Shape
from octavo.store.contents import (
    FORMAT,
    check_shapes,
    entries,
    is_transposed,
    scheme_at,
    stored_scheme,
    stored_scheme_at,
)
from octavo.store.sinks import Header, Sink, check_free, folder_sink
from octavo.store.sources import Source, fingerprint
from octavo.store.text_part import text_model_config, text_module
from octavo.store.weights import check_row_order, full_rows, matrix_parts, put_rows_, requantized, row_blocks


@dataclass(frozen=True)
class WrittenLayer:
    """One frozen weight as written. `error` is ||W - W'|| / ||W||, and `norm` ||W||; both 0 if it was not quantized."""

    name: str
    shape: tuple[int, int]
    stored_bytes: int
    error: float
    norm: float = 0.0


def error_of_all(layers: Iterable[WrittenLayer]) -> float:
    """||W - W'|| / ||W|| over the values of all layers that were quantized."""
    quantized = [layer for layer in layers if layer.norm]
    norm = math.hypot(*(layer.norm for layer in quantized))
    return math.hypot(*(layer.error * layer.norm for layer in quantized)) / norm if norm else 0.0


def write_folder(
    source: Source,
    out: Path,
    scheme: Scheme,
    *,
    on_layer: Callable[[WrittenLayer], None] | None = None,
    replace: bool = False,
    readme: str = "",
) -> int:
    """Writes `source` into the folder `out` under `scheme`, and returns the bytes of its tensors.

    `on_layer` is called for each frozen weight, `readme` becomes README.md. UsageError if `out` is not empty and
    `replace` is not set.
    """
    if not replace:
        check_free(out)  # before the source is read
    header = dataclasses.replace(header_of(source, scheme), readme=readme)
    with folder_sink(out, header, replace=replace) as sink:
        return write_tensors(source, scheme, sink, on_layer=on_layer)


def header_of(source: Source, scheme: Scheme) -> Header:
    """The header of `source` as written under `scheme`. ModelError if it could not be loaded from there."""
    for entry in weight_entries(build(source.config)).values():
        if entry.order is not None and entry.matrix is not None:
            check_row_order(f"{entry.name}.weight", entry, scheme)
    tokenizer = source.tokenizer()  # before the weights are read, so that a model without one fails at once
    config = _config(source, scheme)
    return Header(config, source.generation_config, tokenizer, scheme.name, origin=fingerprint(source))


def write_tensors(
    source: Source, scheme: Scheme, sink: Sink, *, on_layer: Callable[[WrittenLayer], None] | None = None
) -> int:
    """Streams all tensors of `source` into `sink`, with the frozen weights under `scheme`; returns their bytes.

    Weights that are stored under the same scheme are copied bit for bit. Under none the text part of a composite model
    has the names of a text model, as in `header_of`. `on_layer` is called for each frozen weight.
    """
    model = build(source.config)
    items = entries(source, model)
    check_shapes(source, items)
    total = 0
    for name, item in items.items():
        module = text_module(item.entry.name) if scheme.name == "none" else item.entry.name
        if not item.is_matrix:
            total += sink.put(module, {item.kind: source.tensor(name)})
            continue
        shape, old, new = item.shape, stored_scheme_at(source, item.entry), scheme_at(item.entry, scheme)
        parts, error, norm = matrix_parts(source, name, item.entry, old), 0.0, 0.0
        if old is not new:
            parts, error, norm = _requantized(parts, shape, old, new)
        if is_transposed(item.entry, new):
            parts = {**parts, "weight": parts["weight"].t()}
        size = sink.put(module, parts)
        total += size
        if on_layer:
            on_layer(WrittenLayer(name, shape, size, error, norm))
    return total


def _requantized(parts: Parts, shape: Shape, stored: Scheme, scheme: Scheme) -> tuple[Parts, float, float]:
    """(parts under `scheme` of a matrix W stored under `stored`, relative error ||W - W'|| / ||W||, ||W||)."""
    in_two_passes = scheme.first_pass is not scheme
    if in_two_passes:
        target = requantized(parts, shape, stored, scheme, torch.device("cpu"))
    else:
        target = {
            part: torch.empty(size, dtype=kind) for part, (size, kind) in scheme.layout(shape, torch.float32).items()
        }
    error, norm = 0.0, 0.0  # squared
    for rows in row_blocks(shape, stored, scheme):
        weight = full_rows(parts, shape, rows, stored).float()  # (rows, K)
        if in_two_passes:
            restored = full_rows(target, shape, rows, scheme)
        else:  # the block is in the cache of a core
            block = put_rows_(target, shape, rows, scheme, weight)
            restored = dequantize(scheme, block, (rows.stop - rows.start, shape[1]))  # (rows, K)
        error += float(torch.linalg.vector_norm(weight - restored)) ** 2
        norm += float(torch.linalg.vector_norm(weight)) ** 2
    return target, math.sqrt(error / norm) if norm else 0.0, math.sqrt(norm)


def _config(source: Source, scheme: Scheme) -> dict[str, Any]:
    text = text_model_config(source.config) if scheme.name == "none" else None
    config = text or {key: value for key, value in source.config.items() if key != "octavo"}
    if scheme.name != "none":
        config["octavo"] = {"format": FORMAT, "scheme": scheme.name, "version": __version__}
    elif stored_scheme(source).name != "none":
        config["dtype"] = "float32"
    return config


def written_bytes(source: Source, scheme: Scheme) -> int:
    """The bytes of the tensors that `write_folder` would write."""
    unquantized = stored_scheme(source).name == scheme.name == "none"
    return sum(
        stored_bytes(scheme_at(item.entry, scheme), item.shape, dtype=torch.float32)
        if item.is_matrix and not unquantized
        else source.tensor(name).nbytes
        for name, item in entries(source, build(source.config)).items()
    )


def weight_names(source: Source) -> list[str]:
    """The names of the frozen weights, for a progress bar."""
    model = build(source.config)
    return [name for name, item in entries(source, model).items() if item.is_matrix]
