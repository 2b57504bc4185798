"""OLMo 3: OLMo 2 with sliding windows in three of four layers, and rotary positions for each type of layer.

Long-context models have yarn in the layers without a window alone.

Source: OLMo 3 (arXiv 2512.13961).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from octavo.models import olmo2
from octavo.models.config_fields import ConfigFields
from octavo.models.layer_attention import FULL, SLIDING, sliding_layers
from octavo.models.rotary import rotary_of

INTERVAL = 4  # every fourth layer has no window, where config.json does not say which


@dataclass(frozen=True)
class Config(olmo2.Config):
    """The sizes and settings of a config.json."""

    theta = 500_000.0

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Reads a Hugging Face config.json; ModelError names what octavo does not support."""
        fields = ConfigFields(source)
        plain = {key: value for key, value in source.items() if key not in ("rope_scaling", "rope_parameters")}
        base = super().from_dict(plain)
        of_type = {
            kind: rotary_of(_rotary_fields(fields, kind), base.head_size, theta=cls.theta) for kind in (FULL, SLIDING)
        }
        kinds = [SLIDING if slides else FULL for slides in cls.sliding(fields, base.layers)]
        layers = tuple(layer._replace(rotary=of_type[kind]) for layer, kind in zip(base.attention, kinds, strict=True))
        return cls(**{**vars(base), "attention": layers})

    @classmethod
    def sliding(cls, fields: ConfigFields, layers: int) -> list[bool]:
        """Whether each layer has a sliding window."""
        return sliding_layers(fields, [(layer + 1) % INTERVAL != 0 for layer in range(layers)])


def _rotary_fields(fields: ConfigFields, kind: str) -> ConfigFields:
    """The fields of a file with the rotary settings of one type of layers.

    `rope_parameters` has them by type; the older key `rope_scaling` is for the layers without a window.
    """
    by_type = fields.object("rope_parameters")
    if by_type and not {FULL, SLIDING} & by_type.source.keys():
        raise fields.wrong(f"rope_parameters has neither {FULL} nor {SLIDING}, the types of an OLMo 3's layers")
    own = by_type.object(kind) if by_type else None
    older = fields.object("rope_scaling") if kind == FULL else None
    rope = {**(own.source if own else {}), **(older.source if older else {})}
    others = {key: value for key, value in fields.source.items() if key != "rope_scaling"}
    return ConfigFields({**others, "rope_parameters": rope}, fields.where)


weight_map, Block = olmo2.weight_map, olmo2.Block
