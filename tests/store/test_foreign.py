"""Weights of other programs are refused with the name of their format, before any is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.errors import ModelError
from octavo.models import build
from octavo.store.contents import entries
from octavo.store.resolve import open_source
from octavo.store.sources import FolderSource

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "FP8"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "x" * 10000}}, "xxx"),
    ({"quantization_config": {"bits": 4}}, "does not name"),
    ({"quantization_config": ["awq"]}, "a list of 1"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_the_error_of_a_quantization_config_names_the_format(
    change: dict[str, Any], message: str, llama_folder: Path
) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=f"quantized with .*{message}") as caught:
        open_source(str(llama_folder))
    assert "16 or 32 bits" in caught.value.hint
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantization_config_is_ignored(value: Any, llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    assert open_source(str(llama_folder)).names()


@pytest.mark.parametrize(
    ("end", "message"),
    [("qweight", "GPTQ"), ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"), ("weight_scale_inv", "FP8")],
)
def test_the_error_of_tensors_of_another_format_names_it_without_a_config(
    end: str, message: str, llama_folder: Path
) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{end}"] = torch.ones(4)
    save_file(tensors, llama_folder / "model.safetensors")
    source = FolderSource(llama_folder)
    with pytest.raises(ModelError, match=f"quantized with .*{message}"):
        entries(source, build(source.config))
