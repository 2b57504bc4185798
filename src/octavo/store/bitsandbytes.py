"""NF4 checkpoints of transformers, which bitsandbytes quantized, as a source with octavo's names, bit for bit.

A quantized linear X has the tensors (n weights, blocks of 64 and of 256):

    X.weight                                uint8 (n/2, 1), or the same bytes in another dtype (bnb_4bit_quant_storage)
    X.weight.absmax                         float32 (n/64,); with double quantization uint8
    X.weight.quant_map                      float32 (16,), the values of NF4
    X.weight.nested_absmax                  float32 (n/16384,), with double quantization
    X.weight.nested_quant_map               float32 (256,), with double quantization
    X.weight.quant_state.bitsandbytes__nf4  JSON in uint8: shape, block sizes, nested_offset

The scheme is nf4, or nf4-double with double quantization. Other modules, the embedding and the head among them, are not
quantized; config["octavo"]["unquantized"] lists them (`contents.stored_scheme_at`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from octavo.bounded_json import JsonError, integer, number, parse, shown
from octavo.errors import ModelError
from octavo.ops.quantize4 import NESTED_BLOCK, NF4_BLOCK, NF4_CODE
from octavo.ops.scheme import Shape
from octavo.store.contents import FORMAT
from octavo.store.foreign import is_nf4
from octavo.store.sources import FolderSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STATE = ".weight.quant_state.bitsandbytes__nf4"
PARTS = {  # octavo's part -> the suffix of bitsandbytes
    "absmax": ".weight.absmax",
    "nested_absmax": ".weight.nested_absmax",
    "nested_offset": ".weight.nested_absmax",  # one value of the JSON, for each of nested_absmax
    "code": ".weight.nested_quant_map",
}
MOST = 3.4e38  # of a float32
OTHER_BLOCKS = "Quantize it again with the defaults of bitsandbytes, or give the model in 16 or 32 bits."


class State(NamedTuple):
    """What the JSON of a quantized linear says."""

    shape: Shape
    offset: float  # of double quantization


def with_scheme(config: Mapping[str, Any], *, unquantized: list[str] | None = None) -> dict[str, Any]:
    """A config.json with octavo's entry in place of the quantization_config of an NF4 checkpoint; others unchanged."""
    settings = config.get("quantization_config")
    if not is_nf4(settings):
        return dict(config)
    assert isinstance(settings, Mapping)
    scheme = "nf4-double" if settings.get("bnb_4bit_use_double_quant") is True else "nf4"
    entry = {"format": FORMAT, "scheme": scheme, "unquantized": unquantized or []}
    return {key: value for key, value in config.items() if key != "quantization_config"} | {"octavo": entry}


@dataclass
class Nf4Source:
    """An NF4 checkpoint in a folder, with octavo's config and names."""

    folder: FolderSource
    _states: dict[str, State] = field(default_factory=dict, repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        stored = [name.removesuffix(".weight") for name in self.folder.names() if name.endswith(".weight")]
        return with_scheme(self.folder.config, unquantized=[name for name in stored if name not in self._modules])

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.folder.generation_config

    @property
    def files(self) -> list[Path]:
        return self.folder.files

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.folder.tokenizer()

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The names of the quantized linears."""
        return frozenset(name.removesuffix(STATE) for name in self.folder.names() if name.endswith(STATE))

    @cached_property
    def _origin(self) -> dict[str, tuple[str, str]]:
        """Tensor name -> (module, part) of the parts of quantized linears."""
        stored = set(self.folder.names())
        names = {f"{module}.weight": (module, "weight") for module in self._modules}
        for module in self._modules:
            names |= {f"{module}.{part}": (module, part) for part, end in PARTS.items() if module + end in stored}
        return names

    def names(self) -> list[str]:
        theirs = tuple({*PARTS.values(), ".weight.quant_map", STATE})
        others = [name for name in self.folder.names() if not name.endswith(theirs) and name not in self._origin]
        return [*others, *self._origin]

    def shape(self, name: str) -> tuple[int, ...]:
        module, part = self._origin.get(name, ("", ""))
        if not module:
            return self.folder.shape(name)
        if part == "weight":
            return (-(-prod(self._state(module).shape) // 2),)
        return self.folder.shape(module + PARTS[part])

    def tensor(self, name: str) -> Tensor:
        module, part = self._origin.get(name, ("", ""))
        if not module:
            return self.folder.tensor(name)
        if part == "weight":
            return self.folder.tensor(name).view(torch.uint8).reshape(-1)
        tensor = self.folder.tensor(module + PARTS[part])
        if part == "nested_offset":
            return torch.full_like(tensor, self._state(module).offset)
        return tensor

    def _state(self, module: str) -> State:
        """The JSON of a module, checked. ModelError for a layout other than that of the schemes."""
        if module not in self._states:
            self._states[module] = _read_state(self.folder, module)
        return self._states[module]


def _read_state(folder: FolderSource, module: str) -> State:
    name = module + STATE
    try:
        content = parse(bytes(folder.tensor(name).tolist()))
        if not isinstance(content, dict):
            raise JsonError(f"it is {shown(content)}")
        for key, read in (("blocksize", NF4_BLOCK), ("nested_blocksize", NESTED_BLOCK)):
            if (block := integer(content, key, least=1, most=2**31, default=read)) != read:
                raise ModelError(
                    f"{module} in {folder.folder} has the {key} {block:,}; octavo reads {read}.", hint=OTHER_BLOCKS
                )
        shape, offset = content.get("shape"), number(content, "nested_offset", least=-MOST, most=MOST, default=0.0)
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise JsonError(f"shape is {shown(shape)}")
    except ValueError as error:
        raise ModelError(f"{name} in {folder.folder}: {error}.", hint="The checkpoint is damaged.") from error
    if folder.tensor(f"{module}.weight.quant_map").tolist() != list(NF4_CODE):
        raise ModelError(f"{module}.weight.quant_map in {folder.folder} is not the table of NF4.", hint=OTHER_BLOCKS)
    return State((shape[0], shape[1]), offset)
