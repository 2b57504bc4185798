"""SmolLM3: a Llama in which some layers have no rotary positions.

Sources: SmolLM3 (huggingface.co/blog/smollm3); RoPE and NoPE layers in turns (arXiv 2501.18795).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from octavo.models import llama
from octavo.models.config_fields import MAX_LAYERS, ConfigFields
from octavo.models.layer_attention import sliding_layers

INTERVAL = 4  # every fourth layer has no rotary positions, where config.json does not say which


@dataclass(frozen=True)
class Config(llama.Config):
    """The sizes and settings of a config.json."""

    theta = 2_000_000.0

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        base = super().from_dict({"tie_word_embeddings": True, "sliding_window": None, **source})
        rotates = _rotary_layers(ConfigFields(source), base.layers)
        layers = [
            layer if rotated else layer._replace(rotary=None)
            for layer, rotated in zip(base.attention, rotates, strict=True)
        ]
        return cls(**{**vars(base), "attention": tuple(layers)})

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """Whether each layer has a sliding window: those without rotary positions, if any."""
        flag = fields.flag("use_sliding_window")  # of the default alone: layer_types count without it too
        return sliding_layers(fields, [flag and not rotated for rotated in _rotary_layers(fields, layers)])


def _rotary_layers(fields: ConfigFields, layers: int) -> list[bool]:
    """Whether each layer rotates its queries and keys."""
    interval = fields.size("no_rope_layer_interval", most=MAX_LAYERS, default=INTERVAL)
    rotates = fields.flags("no_rope_layers", default=[(i + 1) % interval != 0 for i in range(layers)])
    if len(rotates) != layers:
        raise fields.wrong(f"no_rope_layers has {len(rotates)} values for {layers} layers")
    return rotates


weight_map, Block = llama.weight_map, llama.Block
