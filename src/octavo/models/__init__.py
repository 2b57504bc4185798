"""The families, and the map between the names of a checkpoint and the modules here.

This is the only place where a family is chosen. To add one: a file with `Config`, `weight_map` and `Block`, and a line
for each of its architectures in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from octavo.bounded_json import shortened, shown
from octavo.errors import ModelError
from octavo.models import gemma2, gemma3, gpt2, gpt_neo, gpt_neox, gptj, granite, llama, olmo2, qwen3, smollm3
from octavo.models.checks import check_config, check_entries, check_paths
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
    "Qwen2ForCausalLM": ("qwen2", llama),
    "Qwen3ForCausalLM": ("qwen3", qwen3),
    "SmolLM3ForCausalLM": ("smollm3", smollm3),
    "GraniteForCausalLM": ("granite", granite),
    "Olmo2ForCausalLM": ("olmo2", olmo2),
    "Gemma2ForCausalLM": ("gemma2", gemma2),
    "Gemma3ForCausalLM": ("gemma3_text", gemma3),
    "GPTNeoXForCausalLM": ("gpt_neox", gpt_neox),
    "GPTNeoForCausalLM": ("gpt_neo", gpt_neo),
}


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
    by_type = dict(FAMILIES.values())
    if model_type and model_type not in by_type:
        raise ModelError(f"octavo does not support this model's type: model_type is {shown(model_type)}.", hint=hint)
    if not model_type and not known:
        raise ModelError("The model's config.json names neither architectures nor a model_type.", hint=hint)
    if not model_type:
        return FAMILIES[known[0]]
    return model_type, by_type[model_type]


def parse(config: Mapping[str, Any]) -> DecoderConfig:
    """The sizes of a config.json, checked; ModelError names a field that is missing, mistyped or out of bounds."""
    model_type, module = family(config)
    parsed: DecoderConfig = module.Config.from_dict({**config, "model_type": model_type})
    check_config(parsed)
    return parsed


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
    return paths


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
