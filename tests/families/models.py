"""A tiny random model of every family: a folder with a tokenizer, the model of transformers and that of octavo.

The configs are those of tests/infer, and one for each model type that is not there: 64 columns, a block of nf4; 264
tokens, of which the tokenizer has 258.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.infer.conftest import CONFIGS as SERVED
from tests.infer.conftest import LLAMA, NO_IDS, _write_model
from tests.models.families import GROWTH, SLIDING, YARN, composite
from torch import Tensor
from transformers import (
    Gemma3Config,
    GraniteConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from octavo.models import COMPOSITES, FAMILIES, Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load

VOCABULARY = 264
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, **LLAMA, **NO_IDS}
MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.3}
LAYERS = {"layer_types": [SLIDING, "full_attention"], "sliding_window": 6}
OTHERS: dict[str, Any] = {
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "ministral": MinistralConfig(**SHAPE, **LAYERS, head_dim=16),
    "ministral3": Ministral3Config(**SHAPE, head_dim=16, rope_parameters=YARN | GROWTH),
    "qwen2": Qwen2Config(**SHAPE),
    "granite": GraniteConfig(**SHAPE, **MULTIPLIERS),
    "olmo3": Olmo3Config(**SHAPE, **LAYERS),
    "phi3": Phi3Config(**SHAPE),
    "gemma3": composite(
        Gemma3Config, "siglip_vision_model", tied=False, model_type="gemma3_text", query_pre_attn_scalar=16,
        head_dim=16, **SHAPE, **LAYERS,
    ),
    "mistral3": composite(Mistral3Config, "pixtral", tied=False, model_type="mistral", **SHAPE, sliding_window=None),
}  # fmt: skip
CONFIGS = {config.model_type: config for key, config in SERVED.items() if key != "tied"} | OTHERS
# A row of docs/families.md each: the model types that octavo reads.
MODEL_TYPES = [model_type for model_type, _ in (*FAMILIES.values(), *COMPOSITES.values())]
QUICK = ("llama", "gpt_neox")  # in `make test`; the other families are in `make test-all`


@dataclass(repr=False)
class Family:
    """A tiny random model in a folder, float32."""

    name: str
    folder: Path
    theirs: Any  # transformers' model
    tokenizer: PreTrainedTokenizerFast
    cached: dict[str, Any] = field(default_factory=dict)  # what several tests of the family use

    def ours(self, scheme: str = "none") -> Decoder:
        return load(FolderSource(self.folder), scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


def each_family(function: Any) -> Any:
    """Parametrizes a test with all families; those that are not QUICK are exhaustive."""
    params = [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.exhaustive], id=name) for name in MODEL_TYPES
    ]
    return pytest.mark.parametrize("family", params, indirect=True)(function)


def write_family(name: str, folder: Path) -> Family:
    theirs, tokenizer = _write_model(folder, CONFIGS[name])
    tokenizer.save_pretrained(folder)
    return Family(name, folder, theirs, tokenizer)


def some_ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(1, 258, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    actual = model(some_ids() if ids is None else ids)
    return actual if isinstance(actual, Tensor) else actual.logits
