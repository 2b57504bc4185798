"""A GGUF file as a source of weights, with Hugging Face names and row order, one tensor in memory at a time.

GGUF is llama.cpp's format: one or several files with metadata, tokenizer and block-quantized tensors. The architectures
of store/gguf_names.py are read. Features that octavo does not compute, such as experts, raise an error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.errors import ModelError
from octavo.models import build
from octavo.store.contents import items_of
from octavo.store.gguf_config import ROPE_FACTORS, config_of
from octavo.store.gguf_header import Header
from octavo.store.gguf_names import Architecture, architecture_of, gguf_name, to_hugging_face
from octavo.store.gguf_split import read_parts
from octavo.store.gguf_tensor import read_tensor
from octavo.store.gguf_tokenizer import build_tokenizer
from octavo.store.gguf_vocabulary import ELSEWHERE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class GgufSource:
    """An opened GGUF file. `config` is equivalent to the config.json of the Hugging Face model."""

    config: dict[str, Any]
    files: list[Path]
    _header: Header = field(repr=False)
    _architecture: Architecture = field(repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def generation_config(self) -> dict[str, Any]:
        """Empty: a GGUF file has no generation config."""
        return {}

    def names(self) -> list[str]:
        """Hugging Face tensor names in the order of the forward pass. A tied head has no tensor of its own."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` (one of `names()`), dequantized to float32, with rows in Hugging Face order.

        Raises ModelError if the file is shorter than when it was opened.
        """
        info = self._header.tensors[gguf_name(name, self._architecture)]
        return to_hugging_face(name, read_tensor(info, name), self._architecture, self.config)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The file's tokenizer. Raises ModelError if octavo cannot reproduce it exactly."""
        return build_tokenizer(
            self._header.metadata,
            where=str(self._header.path),
            max_length=self.config["max_position_embeddings"],
        )


def open_gguf(path: Path) -> GgufSource:
    """Opens the GGUF file at `path`: reads and checks the header, no weights.

    Raises ModelError if the file is broken, has an architecture not in ARCHITECTURES, uses a feature that octavo does
    not compute, or lacks a tensor, has an unknown one, or one of another shape than its metadata says.
    """
    header, files = read_parts(path)
    _, architecture = architecture_of(header)
    config = config_of(header)
    shapes = shapes_of(config)
    _check_tensors(header, architecture, shapes)
    n_tokens = len(header.metadata["tokenizer.ggml.tokens"])
    if n_tokens > config["vocab_size"]:
        raise ModelError(f"{path}: {n_tokens:,} tokens, but the embedding has {config['vocab_size']:,} rows.")
    return GgufSource(config=config, files=files, _header=header, _architecture=architecture, _shapes=shapes)


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, for every tensor of a model with this config, in the order of the forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, item in items_of(build(config)):
        parameter = None if item.is_matrix else item.entry.parameter(item.kind)
        shapes[name] = item.shape if parameter is None else tuple(parameter.shape)
    return shapes


def _check_tensors(header: Header, architecture: Architecture, shapes: dict[str, tuple[int, ...]]) -> None:
    """ModelError unless the file has exactly the tensors of `shapes`."""
    expected = {gguf_name(name, architecture): shape for name, shape in shapes.items()}
    for name, shape in expected.items():
        if name not in header.tensors:
            raise ModelError(f"{header.path}: the tensor {name} is missing.", hint=ELSEWHERE)
        if header.tensors[name].shape != shape:
            raise ModelError(
                f"{header.path}: the tensor {name} has the shape {header.tensors[name].shape}, not {shape}.",
                hint=ELSEWHERE,
            )
    unknown = sorted(header.tensors.keys() - expected.keys() - {ROPE_FACTORS})
    if unknown:
        raise ModelError(
            f"{header.path}: {len(unknown)} tensors that such a model lacks, the first is {unknown[0]}.",
            hint=ELSEWHERE,
        )
