"""Ministral 3: a Llama with yarn, whose queries grow beyond the original context.

A query at position p is multiplied by 1 + b ln(1 + floor(p / n)) after its rotation, with b llama_4_scaling_beta and n
the original context, 16,384: a change of longer sequences alone.

Source: the published configs of Ministral 3 (Mistral AI, 2025); the growth is that of Llama 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from octavo.models import llama
from octavo.models.config_fields import ConfigFields
from octavo.models.rotary import original_context

HEAD_SIZE = 128  # where config.json names none
YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
MAX_GROWTH = 100.0  # far above published models


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        filled = {"head_dim": HEAD_SIZE, "rms_norm_eps": 1e-5, "sliding_window": None, **source}
        filled |= {"attention_bias": False, "mlp_bias": False}
        if not (source.get("rope_scaling") or source.get("rope_parameters")):
            filled["rope_parameters"] = YARN
        base = super().from_dict(filled)
        fields = ConfigFields(filled)
        rope = fields.object("rope_scaling") or fields.object("rope_parameters")
        assert rope is not None
        growth = rope.number("llama_4_scaling_beta", least=0.0, most=MAX_GROWTH, default=0.0)
        original = original_context(fields, rope)
        layers = tuple(layer._replace(query_growth=(growth, original) if growth else None) for layer in base.attention)
        return cls(**{**vars(base), "attention": layers})

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """All layers have a sliding window, if config.json names one."""
        return [True] * layers


weight_map, Block = llama.weight_map, llama.Block
