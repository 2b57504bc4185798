"""Writes a source as a Hugging Face folder under a quantization scheme, for `octavo quantize`.

It streams: in memory are one open shard, one quantized tensor and a few blocks of rows. The folder is written under a
temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo._version import __version__
from octavo.errors import UsageError
from octavo.models import build, weight_entries
from octavo.ops.quantize import Parts, Scheme, Shape, dequantise, stored_bytes
from octavo.store.contents import check_shapes, entries, scheme_at, stored_scheme
from octavo.store.files import json_bytes, new_folder, sha256_of
from octavo.store.sources import SAFETENSORS_INDEX, Source, fingerprint
from octavo.store.weights import check_row_order, full_rows, matrix_parts, put_rows_, row_blocks

SHARD_BYTES = 2**29  # a shard is in memory until it is written


@dataclass(frozen=True)
class WrittenLayer:
    """One frozen weight as written. `error` is ||W - W'|| / ||W||, and 0 if the weight was not quantized."""

    name: str
    shape: tuple[int, int]
    stored_bytes: int
    error: float


class _Shards:
    """Collects tensors and writes them to a safetensors file per `SHARD_BYTES`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, Tensor] = {}
        self.open_bytes = 0
        self.total_bytes = 0
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> int:
        size = tensor.numel() * tensor.itemsize
        if self.open and self.open_bytes + size > SHARD_BYTES:
            self.flush()
        # safetensors rejects tensors that share memory, as the code tables of several weights do.
        tensor = tensor.contiguous()
        address = tensor.untyped_storage().data_ptr()
        shared = any(other.untyped_storage().data_ptr() == address for other in self.open.values())
        self.open[name] = tensor.clone() if shared else tensor
        self.open_bytes += size
        self.total_bytes += size
        return size

    def flush(self) -> None:
        if self.open:
            save_file(self.open, self._path(len(self.files)), metadata={"format": "pt"})
            self.files.append(list(self.open))
            self.open, self.open_bytes = {}, 0

    def finish(self) -> None:
        """Renames the files to their final names, and writes an index if there are several."""
        self.flush()
        count = len(self.files)
        weight_map = {}
        for i, names in enumerate(self.files):
            final = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._path(i).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            _write_json(self.folder / SAFETENSORS_INDEX, index)

    def _path(self, index: int) -> Path:
        return self.folder / f"part-{index}.safetensors"


def write_folder(
    source: Source,
    out: Path,
    scheme: Scheme,
    *,
    on_layer: Callable[[WrittenLayer], None] | None = None,
    replace: bool = False,
) -> int:
    """Writes `source` into the folder `out` under `scheme`, and returns the bytes of its tensors.

    `on_layer` is called for each frozen weight. UsageError if `out` is not empty and `replace` is not set.
    """
    if not replace:
        check_free(out)
    for entry in weight_entries(build(source.config)).values():
        if entry.order is not None and entry.matrix is not None:
            check_row_order(f"{entry.name}.weight", entry, scheme)  # the folder could not be loaded
    with new_folder(out, replace=replace) as temporary:
        source.tokenizer().save_pretrained(temporary)  # first, so that a model without a tokenizer fails at once
        shards = _Shards(temporary)
        _write_tensors(source, scheme, shards, on_layer)
        shards.finish()
        _write_json(temporary / "config.json", _config(source, scheme))
        if source.generation_config:
            _write_json(temporary / "generation_config.json", source.generation_config)
        _list_files(temporary, scheme, origin=fingerprint(source))
    return shards.total_bytes


def check_free(out: Path) -> None:
    """UsageError unless `out` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} already holds something.", hint="Give a folder that does not exist yet.")


def _write_tensors(
    source: Source, scheme: Scheme, shards: _Shards, on_layer: Callable[[WrittenLayer], None] | None
) -> None:
    model = build(source.config)
    stored = stored_scheme(source)
    items = entries(source, model)
    check_shapes(source, items)
    for name, item in items.items():
        if not item.is_matrix:
            shards.add(name, source.tensor(name))
            continue
        shape, old, new = item.shape, scheme_at(item.entry, stored), scheme_at(item.entry, scheme)
        parts, error = matrix_parts(source, name, item.entry, old), 0.0
        if old is not new:
            parts, error = _requantized(parts, shape, old, new)
        module = name.removesuffix(".weight")
        size = sum(
            shards.add(name if part == "weight" else f"{module}.{part}", tensor) for part, tensor in parts.items()
        )
        if on_layer:
            on_layer(WrittenLayer(name, shape, size, error))


def _requantized(parts: Parts, shape: Shape, stored: Scheme, scheme: Scheme) -> tuple[Parts, float]:
    """(parts under `scheme` of a matrix that is stored under `stored`, relative error ||W - W'|| / ||W||)."""
    target = {part: torch.empty(size, dtype=kind) for part, (size, kind) in scheme.layout(shape, torch.float32).items()}
    error, norm = 0.0, 0.0  # squared
    for rows in row_blocks(shape, stored, scheme):
        weight = full_rows(parts, shape, rows, stored).float()  # (rows, K)
        block = put_rows_(target, shape, rows, scheme, weight)
        restored = dequantise(scheme, block, (rows.stop - rows.start, shape[1]))  # (rows, K)
        error += float(torch.linalg.vector_norm(weight - restored)) ** 2
        norm += float(torch.linalg.vector_norm(weight)) ** 2
    return target, math.sqrt(error / norm) if norm else 0.0


def _config(source: Source, scheme: Scheme) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "octavo"}
    if scheme.name != "none":
        config["octavo"] = {"scheme": scheme.name, "version": __version__}
    elif stored_scheme(source).name != "none":
        config["dtype"] = "float32"
    return config


def _list_files(folder: Path, scheme: Scheme, *, origin: str) -> None:
    """Writes manifest.json with the size and the SHA-256 of every file."""
    files = {}
    for path in sorted(folder.iterdir()):
        shutil.copymode(folder / "config.json", path)  # safetensors and tokenizers set other file modes
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"octavo": __version__, "scheme": scheme.name, "origin": origin, "files": files}
    (folder / "manifest.json").write_bytes(json_bytes(manifest))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
