"""What a checkpoint is to the loader: a config, names, one tensor in memory at a time; and the folder of one.

`FolderSource` reads a Hugging Face folder. store/gguf.py reads a GGUF file in the same terms,
store/opening.py chooses between them.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.bounded_json import read_object
from octavo.errors import ModelError
from octavo.store.files import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAFETENSORS_INDEX = "model.safetensors.index.json"
# (index of several files, the name of a single one, suffix), in the order of preference.
WEIGHT_FILES = (
    (SAFETENSORS_INDEX, "model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
)
# Where a tokenizer's vocabulary may stand. transformers makes one without any word of a folder that has none of them.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
# For hints: hivemind/gpt-j-6B-8bit is weights alone, without config.json and tokenizer.
GPTJ_FILES = "for hivemind/gpt-j-6B-8bit and what was tuned from it, they are in EleutherAI/gpt-j-6B"
# What torch.load raises on a damaged file: its unpickler trusts that the program is whole.
BROKEN_PICKLE = (
    pickle.UnpicklingError, struct.error, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError,
    AttributeError, AssertionError,
)  # fmt: skip


class Source(Protocol):
    """An opened checkpoint. `config` is what its config.json says, `generation_config` what generation_config.json
    says ({} without one), `files` are those that hold weights.
    """

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def generation_config(self) -> dict[str, Any]: ...

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


@dataclass(frozen=True)
class ConfigSource:
    """A model of which the config alone is here: enough to plan with. It has no weights and no tokenizer."""

    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return []

    def names(self) -> list[str]:
        return []

    def tensor(self, name: str) -> Tensor:
        raise ModelError(f"{name} was not fetched: the config alone was.")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        raise ModelError("The tokenizer was not fetched: the config alone was.")


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
    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it. No pickle is looked at where there are safetensors."""
        for index, single, suffix in WEIGHT_FILES:
            if (self.folder / index).is_file():
                return self._indexed(index)
            # Beside the model's own file may lie others: training_args.bin, consolidated.safetensors.
            own = self.folder / single
            found = [own] if own.is_file() else sorted(self.folder.glob(f"*{suffix}"))
            if found:
                return {name: path for path in found for name in self._names_in(path)}
        raise ModelError(
            f"{self.folder} holds no weights (no *.safetensors).",
            hint="Is this a model's folder? If the hub has the model only as .bin, pass --allow-pickle.",
        )

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
        tensors = self._pickle(path)
        if name not in tensors:
            raise ModelError(f"{path} lacks {name}.", hint="Is the file complete? Fetch it again.")
        return tensors[name]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.folder)

    def _check_allowed(self, path: Path) -> None:
        """Whatever an index calls it: what is no safetensors file would be read as a pickle."""
        if path.suffix != ".safetensors" and not self.allow_pickle:
            raise ModelError(
                f"{path} is a pickle: a format that can carry programs.",
                hint="octavo reads it with weights_only, which refuses programs. If you trust where it comes "
                "from, pass --allow-pickle.",
            )

    def _indexed(self, index: str) -> dict[str, Path]:
        files = read_json(self.folder / index).get("weight_map")
        if not isinstance(files, dict):
            raise ModelError(f"{self.folder / index} has no weight_map.", hint="Fetch the file again.")
        return {name: self._inside(file) for name, file in files.items()}

    def _inside(self, file: object) -> Path:
        path = self.folder / str(file)
        self._check_allowed(path)
        if path.name != file or not path.is_file():
            raise ModelError(f"{self.folder}: the index names {file!r}, which is not a file of the folder.")
        return path

    def _names_in(self, path: Path) -> list[str]:
        self._check_allowed(path)
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


def fingerprint(source: Source) -> str:
    """sha256 over the hashes of the weight files: the identity of a base, whatever its folder is called.

    A folder that octavo wrote says in its manifest.json what it was made from, and has that identity: an adapter
    belongs to the folder and to its original alike. The files of other folders are read through.
    """
    manifest = source.files[0].parent / "manifest.json"
    if manifest.is_file():
        content = read_json(manifest)
        if "origin" in content and all(_has_size(manifest.parent / n, e) for n, e in content["files"].items()):
            return str(content["origin"])
    digest = hashlib.sha256()
    for path in source.files:
        found = path.stat()
        digest.update(f"{path.name} {_sha256_of_state(path, found.st_size, found.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@cache
def _sha256_of_state(path: Path, size: int, changed_ns: int) -> str:
    """The hash of a file in the state that size and time tell: a run, or each of several adapters, asks once more."""
    return sha256_of(path)


def _has_size(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["size"]


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, read weights-only. ModelError if it is broken or holds more than tensors."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no zip file, cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        raise _broken(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{path} does not hold a table of tensors.", hint="Is it a model's pytorch_model.bin?")
    return tensors


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder. Never runs code from it."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARY_FILES)}).",
            hint="Copy tokenizer.json and tokenizer_config.json of the model that the weights come from into it; "
            f"{GPTJ_FILES}.",
        )
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
    """The object in a JSON file of a model folder; ModelError if it is missing, broken or out of bounds."""
    return read_object(path, error=ModelError)


def _broken(path: Path, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"{path} cannot be read: {reason}", hint="Is the file complete? Fetch it again.")
