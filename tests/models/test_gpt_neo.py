"""GPT-Neo's config and checkpoints: the kinds of attention of its layers, and the buffers of older files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import LENGTH, VOCABULARY, like_neo
from transformers import GPTNeoConfig

from octavo.errors import ModelError
from octavo.models import Decoder, build, parse
from octavo.ops.quantize import scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load

SIZES = {"model_type": "gpt_neo", "vocab_size": 97, "hidden_size": 48, "num_heads": 4, "window_size": 5}


def windows(**config: Any) -> list[int | None]:
    return [layer.spec.window for layer in parse({**SIZES, **config}).attention]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_layers": 4, "attention_types": [[["global", "local"], 2]]}, [None, 5, None, 5]),
        ({"num_layers": 3, "attention_types": [[["local"], 1], [["global"], 2]]}, [5, None, None]),
        ({"num_layers": 2, "attention_layers": ["local", "local"]}, [5, 5]),
        ({"num_layers": 3}, [None, 5, None]),
    ],
)
def test_each_layer_has_the_attention_of_the_config(config: dict[str, Any], expected: list[int | None]) -> None:
    assert windows(**config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 3, "attention_types": [[["global", "local"], 2]]}, "for each of 3 layers"),
        ({"num_layers": 2, "attention_types": [[["global", "other"], 1]]}, "must be global or local"),
        ({"num_layers": 2, "attention_layers": ["global", "sparse"]}, "must be global or local"),
        ({"num_layers": 2, "attention_types": [["global", "local"]]}, "attention_types"),
        ({"num_layers": 2, "attention_types": "global"}, r"attention_types is .global.; it must be a list"),
        ({"num_layers": 2, "attention_types": [[["global"], 10**9]]}, "repetitions"),
        ({"num_layers": 2, "activation_function": "relu"}, "asks for the activation"),
        ({"num_layers": 2, "hidden_size": 50}, "num_heads 4 does not divide"),
    ],
)
def test_what_octavo_does_not_compute_is_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build({**SIZES, **config})


def test_buffers_of_older_files_are_ignored(models_of: Callable[[Any], tuple[Any, Decoder]], tmp_path: Path) -> None:
    theirs, ours = models_of(GPTNeoConfig(**like_neo(4, ["global", "local"], 7)))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.attention"
        tensors |= {f"{name}.bias": torch.ones(1, 1, 8, 8), f"{name}.masked_bias": torch.tensor(-1e9)}
    save_file(tensors, tmp_path / "model.safetensors")
    cpu = torch.device("cpu")
    again = load(FolderSource(tmp_path), scheme_named("none"), dtype=torch.float32, device=cpu)
    ids = torch.arange(LENGTH)[None] % VOCABULARY
    assert torch.equal(again(ids), ours(ids))
