"""The interface of a checkpoint to the loader: a config, tensor names, one tensor in memory at a time.

`FolderSource` implements it for a Hugging Face folder, store/gguf.py for a GGUF file. store/resolve.py selects one.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from octavo.bounded_json import read_object, shortened, shown
from octavo.errors import ModelError
from octavo.models import names_in, parse
from octavo.store.base_model import full_names
from octavo.store.foreign import refuse_pointer
from octavo.store.manifest import read_manifest, sha256_of_state, verify
from octavo.store.tied import has_own_head, names_of_head
from octavo.store.tokenizer_files import check_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAFETENSORS_INDEX = "model.safetensors.index.json"
# (index of several files, name of a single file, suffix), in the order of preference.
WEIGHT_FILES = (
    (SAFETENSORS_INDEX, "model.safetensors", ".safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", ".bin"),
)
# The exceptions of torch.load on a damaged file: its unpickler assumes that the program is complete.
BROKEN_PICKLE = (
    pickle.UnpicklingError, struct.error, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError,
    AttributeError, AssertionError,
)  # fmt: skip


class Source(Protocol):
    """An opened checkpoint.

    `config` is the content of config.json, except that tie_word_embeddings is False if the stored head differs from the
    embedding. `generation_config` is generation_config.json, {} without one. `files` are the files with weights.
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

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor as stored, without reading it."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that belongs to the weights."""
        ...


@runtime_checkable
class DerivedSource(Protocol):
    """A source of other weights than those in its files, which has an identity of its own."""

    def fingerprint(self) -> str:
        """The identity of the weights, as of `fingerprint`."""
        ...


@dataclass(frozen=True)
class ConfigSource:
    """A model of which only the config is here, for planning. It has no weights and no tokenizer."""

    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return []

    def names(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise ModelError(f"{name} was not read: only the model's config.json was.")

    def tensor(self, name: str) -> Tensor:
        raise ModelError(f"{name} was not read: only the model's config.json was.")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        raise ModelError("The tokenizer was not read: only the model's config.json was.")


@dataclass
class FolderSource:
    """A Hugging Face folder. safetensors are preferred; pickles are read weights-only, and only if allowed."""

    folder: Path
    allow_pickle: bool = False
    _shard: tuple[Path, dict[str, Tensor]] | None = field(default=None, repr=False)
    _headers: dict[Path, dict[str, tuple[int, ...]]] = field(default_factory=dict, repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json. Errors about weights or the model family are left to the code that reads those."""
        stored = self._stored_config
        with suppress(ModelError):
            if parse(stored).tied:
                names = self._checkpoint_names
                if has_own_head(stored, names, lambda name: self._stored(names[name])):
                    return {**stored, "tie_word_embeddings": False}
        return stored

    @cached_property
    def _stored_config(self) -> dict[str, Any]:
        return read_json(self.folder / "config.json")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def _file_of(self) -> dict[str, Path]:
        """Tensor name -> the file that contains it. If there are safetensors, pickles are ignored."""
        for index, single, suffix in WEIGHT_FILES:
            if (self.folder / index).is_file():
                return self._indexed(index)
            # Other files may be next to the model's own: training_args.bin, consolidated.safetensors.
            standard = self.folder / single
            others = (path for path in sorted(self.folder.glob(f"*{suffix}")) if path.is_file())
            files = [standard] if standard.is_file() else list(others)
            if files:
                file_of = {name: path for path in files for name in self._names_in(path)}
                if not file_of:
                    raise ModelError(f"{files[0]} holds no tensor.", hint="Is the file complete? Fetch it again.")
                return file_of
        raise ModelError(
            f"{self.folder} holds no weights (no *.safetensors).",
            hint="Is this a model's folder? If the hub has the model only as .bin, pass --allow-pickle.",
        )

    @property
    def files(self) -> list[Path]:
        return sorted(set(self._file_of.values()))

    @cached_property
    def _checkpoint_names(self) -> dict[str, str]:
        """The name of each tensor in transformers -> its name in the file."""
        if not (self.folder / "config.json").is_file():
            return {name: name for name in self._file_of}
        names = names_in(self._stored_config, self._file_of)
        return {full: names[name] for full, name in full_names(self._stored_config, names).items()}

    @cached_property
    def _stored_name(self) -> dict[str, str]:
        """Tensor name -> its name in the file; that of a tied head where the embedding is not stored."""
        names = dict(self._checkpoint_names)
        with suppress(ModelError):
            if parse(self._stored_config).tied:
                for name, stored in names_of_head(self._stored_config, names).items():
                    names[name] = names.pop(stored)
        return names

    def names(self) -> list[str]:
        return list(self._stored_name)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored_name[name]
        path = self._file_of[stored]
        if path.suffix != ".safetensors":
            return tuple(self._stored(stored).shape)
        shapes = self._shapes_in(path)
        if stored not in shapes:
            raise _lacks(path, stored)
        return shapes[stored]

    def tensor(self, name: str) -> Tensor:
        return self._stored(self._stored_name[name])

    def _stored(self, name: str) -> Tensor:
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
            raise _lacks(path, name)
        return tensors[name]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        vocabulary = parse(self._stored_config).vocabulary  # checked first: transformers prints a config's content
        tokenizer = load_tokenizer(self.folder)
        check_ids(tokenizer, vocabulary, where=str(self.folder))
        return tokenizer

    def _check_allowed(self, path: Path) -> None:
        """ModelError for a pickle that is not allowed. Every file without the suffix .safetensors is read as one."""
        if path.suffix != ".safetensors" and not self.allow_pickle:
            raise ModelError(
                f"{path} is a pickle: a format that can carry programs.",
                hint="octavo reads it with weights_only, which refuses programs. If you trust where it comes "
                "from, pass --allow-pickle.",
            )

    def _indexed(self, index: str) -> dict[str, Path]:
        files = read_json(self.folder / index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ModelError(f"{self.folder / index} has no weight_map.", hint="Fetch the file again.")
        named = {file: self._inside(file, index) for file in dict.fromkeys(map(str, files.values()))}
        if missing := [file for file, path in named.items() if not path.is_file()]:
            raise ModelError(
                f"{self.folder} lacks {len(missing):,} of the {len(named):,} files that {index} names: "
                f"{shortened(', '.join(missing))}.",
                hint="The download is not complete: fetch the missing files.",
            )
        return {name: named[str(file)] for name, file in files.items()}

    def _inside(self, file: str, index: str) -> Path:
        path = self.folder / file
        if path.name != file or "\0" in file:
            raise ModelError(f"{self.folder}: {index} names {shown(file)}, which is not a file of the folder.")
        self._check_allowed(path)
        return path

    def _names_in(self, path: Path) -> list[str]:
        self._check_allowed(path)
        if path.suffix == ".bin":
            return list(self._pickle(path))
        return list(self._shapes_in(path))

    def _shapes_in(self, path: Path) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, from the header of a safetensors file, which is read once."""
        if path not in self._headers:
            try:
                with safe_open(path, framework="pt") as file:
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise _broken(path, error) from error
            self._headers[path] = shapes
        return self._headers[path]

    def _pickle(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a .bin, memory-mapped if its format allows it. One file is kept open."""
        if self._shard is None or self._shard[0] != path:
            self._shard = (path, load_pickle(path))
        return self._shard[1]


def fingerprint(source: Source) -> str:
    """SHA-256 over the hashes of the weight files: the identity of a base, whatever its folder is called.

    A folder that octavo wrote has the identity of its origin, which is in its manifest.json, so that an adapter belongs
    to both. ModelError if a file of such a folder is not as it was written. Files of other folders are read completely.
    """
    if isinstance(source, DerivedSource):
        return source.fingerprint()
    folder = source.files[0].parent
    manifest = read_manifest(folder)
    if manifest is not None and all(path.name in manifest.files for path in source.files):
        verify(folder)
        return manifest.origin
    digest = hashlib.sha256()
    for path in source.files:
        digest.update(f"{path.name} {sha256_of_state(path)}\n".encode())
    return digest.hexdigest()


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin, read weights-only. ModelError if it is broken or contains anything but tensors."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip file, cannot be memory-mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_PICKLE as error:
        raise _broken(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{path} does not hold a dict of tensors.", hint="Is it a model's pytorch_model.bin?")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; ModelError if it is missing, broken or out of bounds."""
    return read_object(path, error=ModelError)


def _lacks(path: Path, name: str) -> ModelError:
    return ModelError(f"{path} lacks {shortened(name)}.", hint="Is the file complete? Fetch it again.")


def _broken(path: Path, error: Exception) -> ModelError:
    refuse_pointer(path)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"{path} cannot be read: {shortened(reason)}", hint="Is the file complete? Fetch it again.")
