"""Adapters of PEFT with full weights, resized vocabularies, trained tokens and biases, for several tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo.models import Decoder
from octavo.ops.quantize import scheme_named
from octavo.store.sources import FolderSource
from octavo.store.weights import load

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
TOLERANCE = 3e-4  # of float32 logits of about 7, as test_adapters.py derives it
BOTH = ["embed_tokens", "lm_head"]
Written = Callable[[str], tuple[Path, Tensor]]

# The family, LoraConfig's options, and "resize" and "save" for the steps before training and at the end.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "both": ("llama", {"modules_to_save": BOTH}),
    "linears": ("llama", {"modules_to_save": ["down_proj", "k_proj", "up_proj"]}),
    "an mlp": ("llama", {"modules_to_save": ["mlp"]}),
    "one linear": ("llama", {"modules_to_save": ["model.layers.1.mlp.gate_proj"]}),
    "norm and head": ("llama", {"modules_to_save": ["model.norm", "lm_head"], "bias": "lora_only"}),
    "all biases": ("llama", {"bias": "all"}),
    "saved along": ("llama", {"save": True}),
    "resized": ("llama", {"resize": 310}),
    "shrunk": ("llama", {"resize": 280}),
    "resized and trained": ("llama", {"resize": 310, "modules_to_save": BOTH}),
    "resized embedding with LoRA": ("llama", {"resize": 310, "target_modules": ["q_proj", *BOTH]}),
    "tokens": ("llama", {"trainable_token_indices": [7, 3, 250]}),
    "tokens of both": ("llama", {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [4]}}),
    "tokens resized": ("llama", {"trainable_token_indices": [7, 305], "resize": 310}),
    "tied head": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "tied embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "tied both": ("llama-tied", {"modules_to_save": BOTH}),
    "tied kept": ("llama-tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied saved along": ("llama-tied", {"save": True}),
    "tied resized": ("llama-tied", {"resize": 310}),
    "tied resized head": ("llama-tied", {"resize": 310, "target_modules": ["q_proj", "lm_head"]}),
    "tied resized embedding": ("llama-tied", {"resize": 310, "target_modules": ["q_proj", "embed_tokens"]}),
    "tied resized and trained": ("llama-tied", {"resize": 310, "modules_to_save": BOTH}),
    "tied tokens": ("llama-tied", {"trainable_token_indices": [7, 3, 250]}),
    "gptj linears": ("gptj", {"modules_to_save": ["fc_in", "fc_out", "lm_head"]}),
    "gptj q": ("gptj", {"modules_to_save": ["v_proj", "ln_1"]}),
    "gptj all biases": ("gptj", {"bias": "all"}),
    "gptj resized": ("gptj", {"resize": 310}),
    "gptj tokens": ("gptj", {"trainable_token_indices": {"wte": [5, 2]}}),
    "gptj tied head": ("gptj-tied", {"modules_to_save": ["lm_head"]}),
    "gptj tied both": ("gptj-tied", {"modules_to_save": ["wte", "lm_head"]}),
    "gptj tied resized": ("gptj-tied", {"resize": 310, "modules_to_save": ["wte", "lm_head"]}),
    "some biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "one bias": ("qwen2", {"target_modules": ["k_proj"], "bias": "lora_only"}),
    "qwen2 all biases": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "gpt2": (
        "gpt2",
        {
            "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"],
            "modules_to_save": ["wpe", "ln_f", "mlp.c_proj"],
        },
    ),
    "gpt2 all biases": ("gpt2", {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "neox": ("neox", {"target_modules": ["query_key_value", "dense"], "bias": "all", "modules_to_save": ["lm_head"]}),
    "neox qkv": ("neox", {"target_modules": ["dense_4h_to_h"], "modules_to_save": ["query_key_value"]}),
    "rslora and head": ("qwen2", {"use_rslora": True, "modules_to_save": ["lm_head"]}),
}  # fmt: skip


def model_of(folder: Path, scheme: str = "none", dtype: torch.dtype = torch.float32) -> Decoder:
    return load(FolderSource(folder), scheme_named(scheme), dtype=dtype, device=torch.device("cpu"))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output = model(IDS.clamp(max=279))
    return output if isinstance(output, Tensor) else output.logits


def base_of(folder: Path, resize: int | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder)
    if resize:
        base.resize_token_embeddings(resize)
        tables = {
            id(layer.weight): layer.weight for layer in (base.get_input_embeddings(), base.get_output_embeddings())
        }
        for table in tables.values():
            new = table.data[min(resize, 300) - 5 :]
            torch.nn.init.normal_(new, std=0.2, generator=torch.Generator().manual_seed(8))
    return base


def shake_(parameters: Iterator[torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def write_adapter(case: str, base: Path, out: Path) -> Tensor:
    """Writes PEFT's adapter of a case for the model in `base`, and returns the logits of PEFT's model."""
    options = CASES[case][1]
    lora_options = {key: value for key, value in options.items() if key not in ("resize", "save")}
    torch.manual_seed(0)
    defaults = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **{**defaults, **lora_options})
    model = get_peft_model(base_of(base, options.get("resize")), config)
    shake_(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(out, **({"save_embedding_layers": True} if options.get("save") else {}))
    return logits(model.eval())
