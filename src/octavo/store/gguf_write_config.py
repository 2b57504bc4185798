"""The config of a model as the metadata of a GGUF file: the inverse of store/gguf_config.py.

llama.cpp computes some things by the name of the architecture alone. A model that needs them otherwise is refused: what
is read back from the metadata must be the config that it was written from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelError
from octavo.models import parse
from octavo.models.config_fields import ConfigFields
from octavo.models.layer_attention import FULL, SLIDING
from octavo.models.rotary import DEFAULT_THETA, rotary_of
from octavo.store.gguf_config import GEMMA3_LOCAL_THETA, GEMMA_PATTERN, GRANITE_SCALES
from octavo.store.gguf_names import ARCHITECTURES, Architecture, architecture_named

SCALINGS = ("default", "linear", "llama3")  # of rotary positions
MERGE = "Write a Hugging Face folder with `octavo merge` instead."


def checked_architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    """(GGUF name, architecture) of a model. ModelError if octavo cannot write it, or llama.cpp does not run it."""
    model_type = str(config.get("model_type"))
    if (found := architecture_named(model_type)) is None:
        raise ModelError(
            f"octavo cannot write a {model_type} model as GGUF; it writes {', '.join(ARCHITECTURES)} and mistral.",
            hint=("llama.cpp does not run GPT-J. " if model_type == "gptj" else "") + MERGE,
        )
    return found


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a model's architecture, without its name before them, in the types of the format."""
    name, _ = checked_architecture(config)
    parsed: Any = parse(config)
    entries: dict[str, Any] = {
        "context_length": context_of(config),
        "embedding_length": parsed.width,
        "block_count": parsed.layers,
        "feed_forward_length": parsed.mlp_width,
        "attention.head_count": parsed.heads,
        "attention.head_count_kv": parsed.key_value_heads,
        "attention.key_length": parsed.head_size,
        "attention.value_length": parsed.head_size,
        "attention.layer_norm_rms_epsilon": float(parsed.norm_eps),
        "rope.dimension_count": parsed.head_size,
        "vocab_size": parsed.vocabulary,
        **_rope(config),
    }
    if name in GEMMA_PATTERN:
        entries |= _gemma(config, name)
    if name == "granite":
        for key, stored in GRANITE_SCALES.items():
            if config.get(key) is not None:
                entries[stored] = float(config[key])
    return entries


def context_of(config: Mapping[str, Any]) -> int:
    """The positions of the file: those within the sliding window of a Mistral, which llama.cpp does not compute."""
    context = int(parse(config).context)
    window = config.get("sliding_window")
    return min(context, window) if config.get("model_type") == "mistral" and window else context


def as_written(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that the file must be read back as."""
    if config.get("model_type") != "mistral":
        return dict(config)
    return {**config, "sliding_window": None, "max_position_embeddings": context_of(config)}


def rope_divisors(config: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    """(D/2,) The divisors of Llama 3's frequencies, the tensor rope_freqs.weight; None for other rotary positions."""
    parameters = _rope_parameters(config)
    if parameters["rope_type"] != "llama3":
        return None
    head_size = parse(config).head_size
    plain = {"rope_type": "default", "rope_theta": parameters["rope_theta"]}
    base, scaled = (
        np.array(rotary_of(ConfigFields({"rope_parameters": some}), head_size).frequencies)
        for some in (plain, parameters)
    )
    divisors: npt.NDArray[np.float32] = (base / scaled).astype(np.float32)
    return divisors


def _rope_parameters(config: Mapping[str, Any], layers: str = FULL) -> dict[str, Any]:
    """rope_type, rope_theta and the settings of the type, as newer and older configs have them."""
    given = config.get("rope_parameters") or {}
    given = given.get(layers, given)
    scaling = config.get("rope_scaling") or {}
    theta = given.get("rope_theta", config.get("rope_theta", getattr(parse(config), "theta", DEFAULT_THETA)))
    kind = given.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in SCALINGS:
        raise ModelError(f"Rotary positions of the type {kind!r} cannot be written as GGUF.", hint=MERGE)
    return {**scaling, **given, "rope_type": kind, "rope_theta": float(theta)}


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _rope_parameters(config)
    entries: dict[str, Any] = {"rope.freq_base": parameters["rope_theta"]}
    if parameters["rope_type"] == "linear":
        entries |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    return entries


def _gemma(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if config.get("sliding_window"):
        entries["attention.sliding_window"] = int(config["sliding_window"])
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap) is not None:
            entries[cap] = float(config[cap])
    if name == "gemma3":
        local = (config.get("rope_parameters") or {}).get(SLIDING, {})
        theta = local.get("rope_theta", config.get("rope_local_base_freq", GEMMA3_LOCAL_THETA))
        entries["rope.freq_base_swa"] = float(theta)
    return entries
