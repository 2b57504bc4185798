"""`octavo models` and `octavo models check`, from config.json files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Octavo
from tests.models.families import CASES
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
)

from octavo.models import COMPOSITES, FAMILIES, parse
from octavo.models.composite import is_other_part
from octavo.models.unread_keys import unread_keys
from octavo.ops.quantize import SCHEMES
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "llama, tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, mlp_bias=True),
    "granite": GraniteConfig(**SIZES, num_key_value_heads=1),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=24),
    "neox": GPTNeoXConfig(**SIZES),
}


def folder_of(config: Any, folder: Path) -> Path:
    config.architectures = [type(config).__name__.replace("Text", "").replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    return folder


def on_meta(config: Any) -> Any:
    auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def test_all_architectures_are_listed(octavo: Octavo) -> None:
    listed = json.loads(octavo("models", "--json").out)["architectures"]
    assert {row["architecture"]: row["model_type"] for row in listed} == {
        architecture: model_type for architecture, (model_type, _) in (FAMILIES | COMPOSITES).items()
    }
    assert {row["model_type"] for row in listed if row["fused"]} >= {
        "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj",
        "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3",
    }  # fmt: skip
    assert all(architecture in octavo("models").out for architecture in FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_a_config_alone_tells_the_parameters_of_the_model(case: str, octavo: Octavo, tmp_path: Path) -> None:
    """As transformers counts them, of a composite those of its text part."""
    CASES[case].save_pretrained(tmp_path)
    facts = json.loads(octavo("models", "check", tmp_path, "--json").out)
    theirs = on_meta(CASES[case])
    sizes = [parameter.numel() for name, parameter in theirs.named_parameters() if not is_other_part(name)]
    assert facts["parameters"] == sum(sizes)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_alone_tells_the_memory_and_the_targets_of_lora(case: str, octavo: Octavo, tmp_path: Path) -> None:
    facts = json.loads(octavo("models", "check", folder_of(CONFIGS[case], tmp_path), "--json").out)
    theirs = on_meta(CONFIGS[case])
    matrices = sum(parameter.numel() for parameter in theirs.parameters() if parameter.ndim == 2)
    others = sum(parameter.numel() for parameter in theirs.parameters() if parameter.ndim == 1)
    assert facts["layers"] == 3
    assert facts["weights_bytes"]["none"] == 2 * matrices + 4 * others
    assert "weights_gib" not in facts, "0.0 for a small model"
    modules = {
        name.rpartition(".")[2] for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert modules - set(facts["lora_targets"]) <= {"lm_head"}  # GPT-NeoX calls its head embed_out in files


@pytest.mark.parametrize(("width", "unit"), [(64, "MiB"), (4096, "GiB")])
def test_the_memory_of_all_schemes_is_in_one_unit(width: int, unit: str, octavo: Octavo, tmp_path: Path) -> None:
    folder = folder_of(LlamaConfig(**SIZES | {"hidden_size": width}), tmp_path)
    checked = octavo("models", "check", folder)
    assert checked.out.count(f"memory in {unit}") == checked.out.count("iB") == 1
    assert " 0.000 " not in checked.out
    assert "none: weights in bfloat16, 2 bytes each" in checked.err


def test_a_quantized_folder_names_its_scheme_and_how_others_are_loaded(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path
) -> None:
    plain = octavo("models", "check", tiny_llama)
    assert plain.out.count("quantized at load") == len(SCHEMES) - 1
    assert "as stored" in plain.out
    assert "The weights are stored in" not in plain.err
    write_folder(FolderSource(tiny_llama), tmp_path / "nf4", SCHEMES["nf4"])
    checked = octavo("models", "check", tmp_path / "nf4")
    lines = {
        cells[1].strip(): cells[3].strip() for line in checked.out.splitlines() if len(cells := line.split("│")) > 4
    }
    assert (lines["nf4"], lines["none"], lines["int8"]) == ("as stored", "dequantized", "dequantized, then quantized")
    assert "The weights are stored in nf4. --scheme auto loads them as they are" in checked.err
    assert json.loads(octavo("models", "check", tmp_path / "nf4", "--json").out)["stored_scheme"] == "nf4"


def test_keys_of_a_config_that_octavo_does_not_read_are_named(octavo: Octavo, tmp_path: Path) -> None:
    folder = folder_of(CONFIGS["llama, tied"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert json.loads(octavo("models", "check", folder, "--json").out)["unread_keys"] == []
    config["rope_parameters"] |= {"temperature": 3.0}
    (folder / "config.json").write_text(json.dumps({**config, "attention_gate": True, "hidden_dropout": 0.1}))
    checked = octavo("models", "check", folder, "--json")
    assert json.loads(checked.out)["unread_keys"] == ["attention_gate", "rope_parameters.temperature"]
    assert "octavo does not read attention_gate of config.json" in checked.err


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_all_keys_of_the_default_config_of_transformers_are_read(architecture: str) -> None:
    config = CONFIG_MAPPING[FAMILIES[architecture][0]]().to_dict()
    assert unread_keys(config, parse) == []


def test_what_is_not_supported_is_named(octavo: Octavo, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma4ForConditionalGeneration"]}')
    failed = octavo("models", "check", tmp_path)
    assert failed.code == 1
    assert "does not support this model's architecture: Gemma4ForConditionalGeneration" in failed.err
    missing = octavo("models", "check")
    assert (missing.code, "octavo models check FOLDER" in missing.err) == (2, True)
