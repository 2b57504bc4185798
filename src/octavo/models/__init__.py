"""The families, and the map between the names of a checkpoint and the modules here.

This is the only place where a family is chosen. To add one: a file with `Config`, `weight_map` and `Block`, and a line
for each of its architectures in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from octavo.bounded_json import shortened, shown
from octavo.errors import ModelError
from octavo.models import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    granite,
    llama,
    ministral3,
    olmo2,
    olmo3,
    phi3,
    qwen3,
    smollm3,
)
from octavo.models.checks import check_config, check_entries, check_paths
from octavo.models.composite import COMPOSITES as COMPOSITES
from octavo.models.composite import TEXT_PREFIX as TEXT_PREFIX
from octavo.models.composite import is_other_part as is_other_part
from octavo.models.composite import names_in as names_in
from octavo.models.composite import names_in_file as names_in_file
from octavo.models.composite import text_config as text_config
from octavo.models.config_fields import ConfigFields
from octavo.models.decoder import Decoder as Decoder
from octavo.models.decoder import DecoderConfig as DecoderConfig
from octavo.models.weight_map import WeightEntry as WeightEntry
from octavo.models.weight_map import WeightPath as WeightPath
from octavo.models.weight_map import layer_of as layer_of

# The architectures of a config.json, each with its model_type, and the family that computes it.
FAMILIES: dict[str, tuple[str, ModuleType]] = {
    "GPT2LMHeadModel": ("gpt2", gpt2),
    "GPTJForCausalLM": ("gptj", gptj),
    "LlamaForCausalLM": ("llama", llama),
    "MistralForCausalLM": ("mistral", llama),
    "MinistralForCausalLM": ("ministral", llama),
    "Ministral3ForCausalLM": ("ministral3", ministral3),
    "Qwen2ForCausalLM": ("qwen2", llama),
    "Qwen3ForCausalLM": ("qwen3", qwen3),
    "SmolLM3ForCausalLM": ("smollm3", smollm3),
    "GraniteForCausalLM": ("granite", granite),
    "Olmo2ForCausalLM": ("olmo2", olmo2),
    "Gemma2ForCausalLM": ("gemma2", gemma2),
    "Gemma3ForCausalLM": ("gemma3_text", gemma3),
    "Olmo3ForCausalLM": ("olmo3", olmo3),
    "Phi3ForCausalLM": ("phi3", phi3),
    "GPTNeoXForCausalLM": ("gpt_neox", gpt_neox),
    "GPTNeoForCausalLM": ("gpt_neo", gpt_neo),
}


def family(config: Mapping[str, Any]) -> tuple[str, ModuleType]:
    """(model_type, the family's module) of a config.json; ModelError lists what octavo supports.

    `model_type` decides, as in transformers, if `architectures` is missing or is one of the supported ones too;
    where `model_type` is missing, `architectures` decides.
    """
    fields = ConfigFields(text_config(config) or config)
    architectures, model_type = fields.texts("architectures"), fields.text("model_type", default="")
    known = [name for name in architectures if name in FAMILIES]
    hint = _why_not([*architectures, model_type]) + "`octavo models` lists the architectures that octavo supports."
    if architectures and not known:
        raise ModelError(
            f"octavo does not support this model's architecture: {shortened(', '.join(architectures))}.", hint=hint
        )
    by_type = dict(FAMILIES.values())
    if model_type and model_type not in by_type:
        raise ModelError(f"octavo does not support this model's type: model_type is {shown(model_type)}.", hint=hint)
    if not model_type and not known:
        raise ModelError("The model's config.json names neither architectures nor a model_type.", hint=hint)
    if not model_type:
        return FAMILIES[known[0]]
    return model_type, by_type[model_type]


# Parts of the names of architectures and model types, and what octavo does not compute of them.
REFUSED = {
    "moe": "mixtures of experts", "mixtral": "mixtures of experts", "gptoss": "mixtures of experts",
    "deepseek": "mixtures of experts", "qwen35": "layers with a recurrent state",
    "qwen3next": "layers with a recurrent state", "mamba": "layers with a recurrent state",
    "lfm": "layers with a recurrent state", "nemotronh": "layers with a recurrent state",
    "falconh": "layers with a recurrent state", "hybrid": "layers with a recurrent state",
    "gemma4": "keys and values shared between layers", "gemma3n": "keys and values shared between layers",
}  # fmt: skip


def _why_not(names: Sequence[str]) -> str:
    for name in names:
        plain = name.lower().replace("_", "")
        for part, what in REFUSED.items():
            if part in plain:
                return f"octavo does not support {what} yet. "
    return ""


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """The sizes of a config.json, checked; ModelError names a field that is missing, mistyped or out of bounds."""
    text = text_config(config)
    model_type, module = family(config)
    parsed: DecoderConfig = module.Config.from_dict({**(text or config), "model_type": model_type})
    check_config(parsed)
    return parsed if text is None else replace(parsed, text_prefix=TEXT_PREFIX)  # type: ignore[type-var]


def build(config: Mapping[str, Any]) -> Decoder:
    """The decoder of a config.json, without weights (its parameters are on the meta device).

    Raises as `parse` does; ModelError too if the family's weight map does not fill the decoder (models/checks.py).
    """
    parsed = parse(config)
    block = _family_of(parsed).Block
    with torch.device("meta"):
        decoder = Decoder(parsed, [block(parsed) for _ in range(parsed.layers)])
    check_paths(decoder, weight_map(parsed))
    check_entries(decoder, weight_entries(decoder).values(), tied=parsed.tied)
    return decoder.eval()


def _family_of(config: DecoderConfig) -> ModuleType:
    return next(module for _, module in FAMILIES.values() if module.Config is type(config))


def table_names(config: Mapping[str, Any]) -> tuple[str, str]:
    """(name of the embedding, name of the head) in a checkpoint of this config's family."""
    paths = weight_map(parse(config))
    names = {path.path: name for name, path in paths.items()}
    return names["embed"], names["head"]


def embedding_keys() -> frozenset[str]:
    """The last parts of the names that embeddings have in checkpoints, of all families."""
    return frozenset(module.Config.embedding for _, module in FAMILIES.values())


def head_keys() -> frozenset[str]:
    """The last parts of the names that heads have in checkpoints, of all families."""
    return frozenset(module.Config.head for _, module in FAMILIES.values())


def weight_map(config: DecoderConfig) -> dict[str, WeightPath]:
    """The layer of every module of a checkpoint with this config, in the order of the layers."""
    paths: dict[str, WeightPath] = _family_of(config).weight_map(config)
    own = f"model.{config.text_prefix}"
    return {own + name.removeprefix("model.") if name.startswith("model.") else name: paths[name] for name in paths}


def module_names(config: DecoderConfig) -> list[str]:
    """The modules of a checkpoint with this config, under the names that transformers and PEFT give them."""
    return [path.module or name for name, path in weight_map(config).items()]


def weight_entries(model: Decoder) -> dict[str, WeightEntry]:
    """The weight map of a built decoder, with its layers."""

    def entry(name: str, path: WeightPath) -> WeightEntry:
        module, key, is_head = path.module or name, name.rpartition(".")[2], path.path == "head"
        layer = model.get_submodule(path.path)
        return WeightEntry(name, layer, module, key, path.order, is_head=is_head, transposed=path.transposed)

    return {name: entry(name, path) for name, path in weight_map(model.config).items()}
