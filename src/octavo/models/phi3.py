"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: a Llama block whose checkpoints store q, k and v as one module.

So they store gate and up. The stacked rows are in the decoder's own order: both modules are read as they are, and LoRA
on them is PEFT's. Models of 128k positions have longrope; Phi-4-mini rotates three quarters of each head.

Sources: Phi-3 (arXiv 2404.14219), Phi-4 (2412.08905), LongRoPE (2402.13753).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from octavo.models import llama
from octavo.models.config_fields import ConfigFields
from octavo.models.weight_map import WeightPath

ORIGINAL_CONTEXT = 4096  # where config.json names none


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    share: ClassVar[float | None] = 1.0  # of a head that is rotated, where config.json does not say

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        # transformers' defaults, and its older names of longrope.
        filled = {"original_max_position_embeddings": ORIGINAL_CONTEXT, "rms_norm_eps": 1e-5, **source}
        filled |= {"attention_bias": False, "mlp_bias": False}
        for key in ("rope_scaling", "rope_parameters"):
            rope = filled.get(key)
            if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
                filled[key] = {**rope, "rope_type": "longrope"}
        ConfigFields(filled).positions("original_max_position_embeddings")  # checked also where only longrope needs it
        return super().from_dict(filled)

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """All layers have a sliding window, if config.json names one."""
        return [fields.source.get("sliding_window") is not None] * layers


def weight_map(config: Config) -> dict[str, WeightPath]:
    """The layer of each module of a checkpoint: those of a Llama, with q, k and v one module, and gate and up one."""
    names = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    names |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    paths = {}
    for name, path in llama.weight_map(config).items():
        parent, _, last = name.rpartition(".")
        paths[f"{parent}.{names.get(last, last)}" if parent else last] = path
    return paths


class Block(llama.Block):
    """One decoder block."""

    @staticmethod
    def rows(config: llama.Config) -> tuple[dict[str, int], dict[str, int]]:
        """The names and rows of the two stacked matrices."""
        qkv, gate_up = llama.Block.rows(config)
        return {"qkv_proj": sum(qkv.values())}, {"gate_up_proj": sum(gate_up.values())}
