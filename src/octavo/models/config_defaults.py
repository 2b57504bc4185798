"""The attributes of a family's Config that most families do not set (`DecoderConfig`, models/decoder.py)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ConfigDefaults:
    """What the Configs of most families say: each inherits it, and overrides what it has."""

    position_embedding = ""
    head_bias = False
    embedding_scale = 1.0
    output_scale = 1.0
    logit_softcap = None
    text_prefix: str = field(default="", kw_only=True)
