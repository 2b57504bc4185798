"""The modules of each GGUF architecture, and how llama.cpp's converter stores their weights.

The converter (convert_hf_to_gguf.py) changes two things besides names, which `to_hugging_face` undoes:

    rows of q and k   rotary embedding rotates pairs of values of a head. In a llama, llama.cpp pairs (0, 1), (2, 3), ..
                      and Hugging Face (0, D/2), (1, D/2 + 1), ..: the rows are permuted (LlamaModel.permute)
    norms of Gemma    stored as 1 + w in float32. Subtracting 1 is exact for values from 1/2 on: 1 + w, which the model
                      multiplies by, has the bits of the file. w itself has those of the original if it is a bfloat16
                      of at least 2^-16; a smaller one was rounded to a multiple of 2^-24. Below 1/2 the error of
                      1 + w is at most 2^-24, and 0 for an original in bfloat16

Legend: D the size of a head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from octavo.errors import ModelError
from octavo.models.weight_map import RowOrder
from octavo.store.gguf_header import Header
from octavo.store.gguf_vocabulary import ELSEWHERE

# Hugging Face module -> GGUF module. Modules of a block have the prefix model.layers.N. and blk.N.
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
# A norm after attention and after the MLP, which Hugging Face names alike in Gemma and OLMo 2.
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GEMMA = LLAMA | POST_NORMS | {"pre_feedforward_layernorm": "ffn_norm"}


@dataclass(frozen=True)
class Architecture:
    """A GGUF architecture: its class and model_type in Hugging Face's config.json, and the modules of a block."""

    hugging_face: str
    model_type: str
    block: Mapping[str, str]
    permuted: bool = False  # the rows of q and k
    norm_shift: float = 0.0  # added to the weights of norms


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "llama", LLAMA, permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", LLAMA),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", LLAMA | QK_NORMS),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", GEMMA, norm_shift=1.0),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", GEMMA | QK_NORMS, norm_shift=1.0),
    "granite": Architecture("GraniteForCausalLM", "granite", LLAMA, permuted=True),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", LLAMA | QK_NORMS | POST_NORMS),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", LLAMA, permuted=True),
}


# model_type of config.json -> that of an architecture with the same tensors and computations.
SAME = {"mistral": "llama"}


def architecture_of(header: Header) -> tuple[str, Architecture]:
    """(GGUF name, architecture) of a file; ModelError for one that is not in ARCHITECTURES."""
    name = str(header.metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{header.path}: octavo does not support the GGUF architecture {name!r}; it supports "
            f"{', '.join(ARCHITECTURES)}.",
            hint=ELSEWHERE,
        )
    return name, ARCHITECTURES[name]


def gguf_name(name: str, architecture: Architecture) -> str:
    """The name in the GGUF file of the Hugging Face tensor `name`."""
    module, _, suffix = name.rpartition(".")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{block[1]}.{architecture.block[block[2]]}.{suffix}" if block else f"{TOP[module]}.{suffix}"


def to_gguf(name: str, values: Tensor, architecture: Architecture, config: Mapping[str, Any]) -> Tensor:
    """The values in the GGUF file of the Hugging Face tensor `name`: the inverse of `to_hugging_face`."""
    if architecture.norm_shift and name.endswith("norm.weight"):
        return values.float() + architecture.norm_shift
    order = _order(name, architecture, config)
    return values if order is None else order.to_checkpoint(values)


def architecture_named(model_type: str) -> tuple[str, Architecture] | None:
    """(GGUF name, architecture) of a model_type of config.json; None for one that is not in ARCHITECTURES."""
    model_type = SAME.get(model_type, model_type)
    return next((pair for pair in ARCHITECTURES.items() if pair[1].model_type == model_type), None)


def to_hugging_face(name: str, values: Tensor, architecture: Architecture, config: Mapping[str, Any]) -> Tensor:
    """The Hugging Face tensor `name` from its values in the GGUF file."""
    if architecture.norm_shift and name.endswith("norm.weight"):
        values = values - architecture.norm_shift
    order = _order(name, architecture, config)
    return values if order is None else order.from_checkpoint(values)


def _order(name: str, architecture: Architecture, config: Mapping[str, Any]) -> RowOrder | None:
    """The order of the rows of q and k in the file; None where it is that of Hugging Face."""
    heads = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
    for part, key in heads.items():
        if architecture.permuted and part in name:
            return RowOrder((config[key], config["head_dim"] // 2, 2), (0, 2, 1))
    return None
