"""The families, and the map between the names of a checkpoint and the modules here.

This is the only place where a family is chosen. To add one: a file with Config, Model and WEIGHTS, and a line
for each of its architectures in FAMILIES.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from octavo.bounded_json import shortened, shown
from octavo.errors import ModelError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, FrozenMatrix
from octavo.models import gptj, llama
from octavo.models.config_fields import ConfigFields

# The architectures of a config.json, each with its model_type, and the family that computes it.
FAMILIES: dict[str, tuple[str, ModuleType]] = {
    "GPTJForCausalLM": ("gptj", gptj),
    "LlamaForCausalLM": ("llama", llama),
    "MistralForCausalLM": ("mistral", llama),
    "Qwen2ForCausalLM": ("qwen2", llama),
}
_BY_TYPE: dict[str, ModuleType] = dict(FAMILIES.values())

Model = gptj.Model | llama.Model


@dataclass(frozen=True)
class WeightEntry:
    """Where one named module of a checkpoint lives: `layer`, and if it is a frozen layer, `key` among its rows."""

    name: str  # in the checkpoint, e.g. model.layers.3.self_attn.q_proj
    layer: nn.Module
    key: str  # the last part of the name, q_proj

    @property
    def matrix(self) -> FrozenMatrix | None:
        """The matrix that holds the name's rows, or None for a norm."""
        return self.layer.matrix if isinstance(self.layer, FrozenLinear | FrozenEmbedding) else None

    @property
    def rows_key(self) -> str:
        """The key of the rows in the matrix: the embedding's for a tied head."""
        assert self.matrix is not None
        return self.key if self.key in self.matrix.outputs else next(iter(self.matrix.outputs))

    @property
    def is_linear(self) -> bool:
        return isinstance(self.layer, FrozenLinear)

    @property
    def is_head(self) -> bool:
        return self.name == "lm_head"

    @property
    def is_embedding(self) -> bool:
        """Whether it is a vocabulary's table: the embedding or the head."""
        return isinstance(self.layer, FrozenEmbedding) or self.is_head

    def parameter(self, kind: str) -> Tensor | None:
        """The full-precision "weight" or "bias" of this name, a view; None if it has none (or a frozen one)."""
        if isinstance(self.layer, FrozenLinear):
            if kind == "bias" and self.rows_key in self.layer.bias_names:
                return self.layer.bias_of(self.rows_key)
            return None
        if isinstance(self.layer, FrozenEmbedding):
            return None
        parameter = getattr(self.layer, kind, None)
        return parameter.detach() if isinstance(parameter, nn.Parameter) else None


def family(config: Mapping[str, Any]) -> tuple[str, ModuleType]:
    """(model_type, the family's module) of a config.json; ModelError lists what octavo supports.

    `model_type` decides, as in transformers, if `architectures` is missing or is one of the supported ones too;
    where `model_type` is missing, `architectures` decides.
    """
    fields = ConfigFields(config)
    architectures, model_type = fields.texts("architectures"), fields.text("model_type", default="")
    known = [name for name in architectures if name in FAMILIES]
    hint = f"octavo supports {', '.join(sorted(FAMILIES))}."
    if architectures and not known:
        raise ModelError(
            f"octavo does not support this model's architecture: {shortened(', '.join(architectures))}.", hint=hint
        )
    if model_type and model_type not in _BY_TYPE:
        raise ModelError(f"octavo does not support this model's type: model_type is {shown(model_type)}.", hint=hint)
    if not model_type and not known:
        raise ModelError("The model's config.json names neither architectures nor a model_type.", hint=hint)
    if not model_type:
        return FAMILIES[known[0]]
    return model_type, _BY_TYPE[model_type]


def parse(config: Mapping[str, Any]) -> gptj.Config | llama.Config:
    """The sizes of a config.json, checked; ModelError names a field that is missing, mistyped or out of bounds."""
    model_type, module = family(config)
    parsed: gptj.Config | llama.Config = module.Config.from_dict({**config, "model_type": model_type})
    return parsed


def build(config: Mapping[str, Any]) -> Model:
    """The model of a config.json, without weights (its parameters are on the meta device). Raises as `parse` does."""
    parsed = parse(config)
    with torch.device("meta"):
        model = gptj.Model(parsed) if isinstance(parsed, gptj.Config) else llama.Model(parsed)
    return model.eval()


def table_names(config: Mapping[str, Any]) -> tuple[str, str]:
    """(name of the embedding, name of the head) in a checkpoint of this config's family."""
    weights: dict[str, str] = family(config)[1].WEIGHTS
    names = {path: name for name, path in weights.items()}
    return names["embed"], names["head"]


def weight_map(model: Model) -> dict[str, WeightEntry]:
    """Every named module of the model's checkpoint format, in the order of the layers."""
    weights: dict[str, str] = _module_of(model).WEIGHTS
    found = {}
    for name, path in _expanded(weights, len(model.blocks)):
        found[name] = WeightEntry(name, model.get_submodule(path), name.rpartition(".")[2])
    return found


def layer_of(name: str) -> int | None:
    """The index of the block that a checkpoint name belongs to, or None."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _module_of(model: Model) -> ModuleType:
    return gptj if isinstance(model, gptj.Model) else llama


def _expanded(weights: Mapping[str, str], layers: int) -> list[tuple[str, str]]:
    """The table with {i} written out, blocks in order, what comes before and after them kept in place."""
    items = list(weights.items())
    inner = [item for item in items if "{i}" in item[0]]
    first = items.index(inner[0])
    blocks = [(name.format(i=i), path.format(i=i)) for i in range(layers) for name, path in inner]
    return [*items[:first], *blocks, *items[first + len(inner) :]]
