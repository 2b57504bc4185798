"""The text part of a composite model as a model of its own, for folders that other programs read.

octavo writes no other part. With the config of the whole model transformers would start the missing parts with random
weights; as a text model the folder is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import FAMILIES, TEXT_PREFIX, text_config

# Settings of the whole model that hold for its text part, if that has none of its own.
INHERITED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")


def text_model_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json of the text part as a model of its own; None if the model is no composite."""
    text = text_config(config)
    if text is None:
        return None
    inherited = {key: config[key] for key in INHERITED if config.get(key) is not None}
    own = {key: value for key, value in text.items() if value is not None or key not in inherited}
    architecture = next(name for name, (model_type, _) in FAMILIES.items() if model_type == text["model_type"])
    return {"architectures": [architecture], **inherited, **own}


def text_module(name: str) -> str:
    """The name of a module of a composite model in its text part as a model of its own."""
    return name.replace(f"model.{TEXT_PREFIX}", "model.", 1) if name.startswith(f"model.{TEXT_PREFIX}") else name
