"""The input of every method of the benchmark: shapes of the two models, random weights, adapters and token ids.

A tensor is a function of the seed and its checkpoint name, so all methods have the same values in any order of
creation, without a file. The device's generator draws them, and a CPU and a GPU draw different values: compare on one
device. Importing this module imports torch only. family_shapes.py has more models: one of every family.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from family_shapes import FAMILY_SHAPES, tiny_config

STD = 0.02  # of the weights, as transformers initializes them
# B is not zero, so that A has a gradient in the first step and the first loss depends on the adapters. With inputs of
# unit variance the low-rank term is alpha / r * 0.01 * sqrt(16) * |A x| = 8 % of the frozen matmul's output.
LORA_STD = {"A": 0.02, "B": 0.01}
RANK, ALPHA = 16, 32.0
MODELS = (
    "gptj",
    "llama",
    "pythia",
    "qwen3",
    "llama-128k",
    "qwen3-8b",
    "gemma2-9b",
    "gemma3-12b",
    "phi4",
    "ministral-8b",
    "neox-20b",
)
LINEARS = {
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "pythia": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "phi4": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}
LINEARS["neox-20b"] = LINEARS["pythia"]
LINEARS |= dict.fromkeys(
    ("qwen3", "llama-128k", "qwen3-8b", "gemma2-9b", "gemma3-12b", "ministral-8b"), LINEARS["llama"]
)
# EleutherAI/gpt-j-6B; Pythia-6.9B (arXiv 2304.01373, table 1); Llama-3-8B (2407.21783, table 3) and Qwen3-8B
# (2505.09388, table 1), both with a vocabulary of 32,768. With their own vocabularies: llama-128k, qwen3-8b,
# Gemma 2 9B (2408.00118, whose loss has soft-capped logits), Gemma 3 12B (2503.19786), Phi-4 (2412.08905),
# Ministral-8B-Instruct-2410 and GPT-NeoX-20B (2204.06745).
_FULL: dict[str, dict[str, Any]] = {
    "gptj": {
        "model_type": "gptj",
        "vocab_size": 50400,
        "n_positions": 2048,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "n_inner": 16384,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "architectures": ["GPTJForCausalLM"],
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 32768,
        "max_position_embeddings": 8192,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "architectures": ["LlamaForCausalLM"],
    },
    "pythia": {
        "model_type": "gpt_neox",
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "architectures": ["GPTNeoXForCausalLM"],
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 32768,
        "max_position_embeddings": 40960,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "architectures": ["Qwen3ForCausalLM"],
    },
}
_FULL["llama-128k"] = {**_FULL["llama"], "vocab_size": 128256}
_FULL["qwen3-8b"] = {**_FULL["qwen3"], "vocab_size": 151936}
_FULL["gemma2-9b"] = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "architectures": ["Gemma2ForCausalLM"],
}
_FULL["gemma3-12b"] = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "tie_word_embeddings": True,
    "architectures": ["Gemma3ForCausalLM"],
}
_FULL["phi4"] = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 250000.0,
    "tie_word_embeddings": False,
    "architectures": ["Phi3ForCausalLM"],
}
_FULL["ministral-8b"] = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "max_position_embeddings": 32768,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000.0,
    "tie_word_embeddings": False,
    "architectures": ["MistralForCausalLM"],
}
_FULL["neox-20b"] = {
    **_FULL["pythia"],
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu_fast",
}
_TINY: dict[str, dict[str, Any]] = {
    "gptj": {"vocab_size": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_inner": 512,
             "bos_token_id": 0, "eos_token_id": 0},
    "llama": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "pythia": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
               "num_attention_heads": 4},
    "qwen3": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}  # fmt: skip
_TINY["gemma2-9b"] = _TINY["gemma3-12b"] = {**_TINY["qwen3"], "query_pre_attn_scalar": 32, "sliding_window": 32}
_TINY["phi4"] = _TINY["llama-128k"] = _TINY["llama"]
_TINY["qwen3-8b"] = _TINY["ministral-8b"] = _TINY["qwen3"]
_TINY["neox-20b"] = _TINY["pythia"]


def shapes(model: str, *, tiny: bool = False) -> dict[str, Any]:
    """The config.json of `model` (of MODELS or FAMILY_SHAPES). Tiny: two narrow layers."""
    if model in FAMILY_SHAPES:
        return tiny_config(FAMILY_SHAPES[model]) if tiny else FAMILY_SHAPES[model]
    return {**_FULL[model], **(_TINY[model] if tiny else {})}


def weight(
    name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype, *, seed: int = 0
) -> Tensor:
    """The tensor `name` of the checkpoint: norms are 1, biases 0, all others from N(0, 0.02).

    The values are representable in bfloat16, so that a float32 and a bfloat16 model have equal weights.
    """
    parts = name.split(".")
    if parts[-1] == "bias":
        return torch.zeros(shape, device=device, dtype=dtype)
    if any(part.endswith(("norm", "ln_1", "ln_2", "ln_f")) for part in parts):
        return torch.ones(shape, device=device, dtype=dtype)
    return _normal(name, shape, STD, device, dtype, seed)


def lora(name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """A (r, K) or B (N, r) by its name in PEFT's file, as base_model.model.lm_head.lora_A.weight; both random."""
    return _normal(name, shape, LORA_STD["A" if ".lora_A" in name else "B"], device, dtype, seed)


def batch_ids(
    model: str, batch: int, seq_len: int, *, seed: int, device: torch.device | str, tiny: bool = False
) -> Tensor:
    """Random token ids (B, T), one batch per seed.

    The loss is that of transformers with labels = ids: the mean over the (T - 1) * B next tokens, without mask and
    padding.
    """
    rows = torch.Generator().manual_seed(_seed("ids", seed))
    config = shapes(model, tiny=tiny)
    vocab_size = config.get("text_config", config)["vocab_size"]
    ids = torch.randint(vocab_size, (batch, seq_len), generator=rows)
    return ids.to(device)


def _normal(
    name: str, shape: tuple[int, ...], std: float, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Tensor:
    values = torch.empty(shape, device=device, dtype=torch.bfloat16)
    values.normal_(0.0, std, generator=torch.Generator(device).manual_seed(_seed(name, seed)))
    return values.to(dtype)


def _seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])
