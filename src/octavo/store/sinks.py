"""The writing counterpart of store/sources.py: a model in some format, written tensor by tensor.

`folder_sink` implements it for a Hugging Face folder. Another format is one more function that takes a path and a
`Header` and is a context of a `Sink`; store/hf_folder.py streams every source and scheme into it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from octavo._version import __version__
from octavo.errors import UsageError
from octavo.store.files import json_bytes, new_folder, sha256_of
from octavo.store.manifest import FORMAT
from octavo.store.sources import SAFETENSORS_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_BYTES = 2**29  # a shard is in memory until it is written


@dataclass(frozen=True)
class Header:
    """What a model has besides its tensors.

    `config` is the content of config.json, and `generation_config` that of generation_config.json, {} for none.
    `scheme` is the name of the scheme of the frozen weights, `origin` the identity of the weights that the model is
    made from (`sources.fingerprint`). `readme` is the model card, "" for none.
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerFast
    scheme: str
    origin: str
    readme: str = ""


class Sink(Protocol):
    """A model that is being written. Its tensors come in the order of the forward pass, each once."""

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> int:
        """Writes tensors of the module `name` and returns their bytes.

        `tensors` are by kind: the parts of a frozen weight ("weight", and under a scheme "absmax" and "code"), or one
        "weight" or "bias" that is not frozen. The sink may hold them until it closes, so they must not change.
        """
        ...


@contextmanager
def folder_sink(out: Path, header: Header, *, replace: bool = False) -> Iterator[Sink]:
    """A sink for the Hugging Face folder `out`, which appears when the context ends; an error leaves `out` unchanged.

    Tensors have the names NAME.KIND in safetensors files of up to SHARD_BYTES. UsageError if `out` is not empty and
    `replace` is not set.
    """
    if not replace:
        check_free(out)
    with new_folder(out, replace=replace) as temporary:
        header.tokenizer.save_pretrained(temporary)
        shards = _Shards(temporary)
        yield shards
        shards.finish()
        _write_json(temporary / "config.json", header.config)
        if header.generation_config:
            _write_json(temporary / "generation_config.json", header.generation_config)
        if header.readme:
            (temporary / "README.md").write_text(header.readme, encoding="utf-8", errors="replace")
        _write_manifest(temporary, header)


def check_free(out: Path) -> None:
    """UsageError unless `out` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} already holds something.", hint="Give a folder that does not exist yet.")


def check_new_file(out: Path) -> None:
    """UsageError if there is something at `out` already."""
    if out.exists():
        raise UsageError(f"{out} exists already.", hint="Give a file that does not exist yet.")


class _Shards:
    """Collects tensors and writes them to a safetensors file per `SHARD_BYTES`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, Tensor] = {}
        self.open_bytes = 0
        self.total_bytes = 0
        self.files: list[list[str]] = []

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> int:
        return sum(self._add(f"{name}.{kind}", tensor) for kind, tensor in tensors.items())

    def _add(self, name: str, tensor: Tensor) -> int:
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


def _write_manifest(folder: Path, header: Header) -> None:
    """Writes manifest.json with the size and the SHA-256 of every file."""
    files = {}
    for path in sorted(folder.iterdir()):
        shutil.copymode(folder / "config.json", path)  # safetensors and tokenizers set other file modes
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    about = {"octavo": __version__, "format": FORMAT, "scheme": header.scheme, "origin": header.origin}
    (folder / "manifest.json").write_bytes(json_bytes({**about, "files": files}))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
