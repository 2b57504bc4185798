"""The frequencies of rotary positions (RoFormer, arXiv 2104.09864), from the settings of a config.json.

Pair i of the R rotated values of a head turns by the angle p f_i at position p:

    default    f_i = theta^(-2i/R)
    linear     f_i / factor: positions are compressed into the original context (arXiv 2306.15595)
    llama3     f_i / factor for pairs that turn less than low_freq_factor times in the original context, f_i for those
               that turn more than high_freq_factor times, a linear ramp between (Llama 3.1, arXiv 2407.21783)

Frequencies are computed on the CPU, as transformers does: the power function of a GPU rounds differently.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.models.config_fields import ConfigFields

DEFAULT_THETA = 10000.0
MAX_THETA, MAX_FACTOR = 1e15, 1e6  # far above published models


def default_frequencies(theta: float, rotated: int) -> Tensor:
    """(R/2,) float32 for R = `rotated` values of a head."""
    return 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated)


def frequencies(fields: ConfigFields, rotated: int) -> Tensor:
    """(R/2,) float32 for R = `rotated` values of a head. ModelError for a rope type that is not supported."""
    # `rope_scaling`, the older key, wins over `rope_parameters` as in transformers.
    rope = fields.object("rope_scaling") or fields.object("rope_parameters") or ConfigFields({})
    theta = fields.number("rope_theta", least=1.0, most=MAX_THETA, default=DEFAULT_THETA)
    theta = rope.number("rope_theta", least=1.0, most=MAX_THETA, default=theta)
    base = default_frequencies(theta, rotated)  # (R/2,)
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    if kind == "linear":
        base = base / rope.number("factor", least=1e-3, most=MAX_FACTOR)
    elif kind == "llama3":
        base = _llama3(base, rope, fields.positions())
    elif kind != "default":
        raise ModelError(
            f"The model's config asks for rotary positions of type {shown(kind)}.",
            hint="octavo supports default, linear and llama3. Use a model with one of these.",
        )
    return base


def _llama3(base: Tensor, rope: ConfigFields, context: int) -> Tensor:
    factor = rope.number("factor", least=1e-3, most=MAX_FACTOR)
    original = rope.positions("original_max_position_embeddings", default=context)
    low = rope.number("low_freq_factor", least=1e-3, most=MAX_FACTOR)
    high = rope.number("high_freq_factor", least=1e-3, most=MAX_FACTOR)
    if low >= high:
        raise rope.wrong(f"low_freq_factor is {low:g}; it must be less than high_freq_factor, {high:g}")
    turns = original * base / (2 * math.pi)  # (R/2,) of each pair in the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * kept + base / factor * (1 - kept)
