"""The rotary factors of Llama 3.1 and later in a GGUF file, converted to the parameters of config.json.

llama.cpp's converter stores the divisor of each frequency (`rope_freqs.weight`, D/2 values for heads of size D), while
config.json names the formula and its four parameters. The parameters are searched for, and must reproduce the divisors.
Then the model computes with transformers' own formula, and a folder written from it contains the parameters.

Legend: D head size, f a stored divisor, F the largest one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.errors import ModelError
from octavo.models.config_fields import ConfigFields
from octavo.models.rotary import rotary_of
from octavo.store.gguf_vocabulary import ELSEWHERE

TOLERANCE = 1e-4  # relative; the converter computes in float32, and meaningful factors differ by much more
PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # in all Llama 3.1 to 3.3 models


def llama3_rope(factors: Tensor, *, theta: float, head_size: int, path: Path) -> dict[str, Any]:
    """The rope_parameters of config.json for these divisors (D/2,) of the frequencies; ModelError if none fit."""
    plain = {"rope_type": "default", "rope_theta": theta}
    base = _frequencies(plain, head_size)  # (D/2,)
    factors = factors.double()
    if factors.shape != base.shape or not bool((factors.isfinite() & (factors > 0)).all()):
        raise _unknown(path)
    if bool(torch.isclose(factors, torch.ones_like(factors), rtol=TOLERANCE).all()):
        return plain
    candidates = [{**PUBLISHED, "original_max_position_embeddings": 2**power} for power in range(4, 25)]
    for candidate in [*candidates, *_fitted(base, factors)]:
        parameters = {**plain, "rope_type": "llama3", "factor": _round(float(factors.max())), **candidate}
        try:
            scaled = _frequencies(parameters, head_size)  # (D/2,)
        except ModelError:  # for other factors the fitted parameters may be out of bounds
            continue
        if bool(torch.isclose(base / scaled, factors, rtol=TOLERANCE).all()):
            return parameters
    raise _unknown(path)


def _fitted(base: Tensor, factors: Tensor) -> list[dict[str, Any]]:
    """Parameters from the interpolated frequencies, where 1/f - 1/F = s (1 - 1/F) and s is linear in the frequency.

    Two frequencies determine only the ratios of the three parameters, so low_freq_factor is set to 1. With a single
    frequency high_freq_factor is set to 4 too.
    """
    most = float(factors.max())
    ramp = ((factors > 1 + TOLERANCE) & (factors < most * (1 - TOLERANCE))).nonzero().flatten().tolist()
    if not ramp:
        return []
    i, j = ramp[0], ramp[-1]
    shares = [(1 / float(factors[k]) - 1 / most) / (1 - 1 / most) for k in (i, j)]
    if i == j:
        width = PUBLISHED["high_freq_factor"] - PUBLISHED["low_freq_factor"]
        original = (shares[0] * width + PUBLISHED["low_freq_factor"]) / float(base[i]) * 2 * math.pi
        return [{**PUBLISHED, "original_max_position_embeddings": round(original)}]
    slope = (shares[0] - shares[1]) / (float(base[i]) - float(base[j])) * 2 * math.pi
    offset = shares[0] - slope * float(base[i]) / (2 * math.pi)  # -low / (high - low)
    if not (slope > 0 > offset):
        return []
    high = 1.0 - 1.0 / offset
    original = slope * (high - 1.0)
    return [
        {"low_freq_factor": 1.0, "high_freq_factor": _round(high), "original_max_position_embeddings": round(original)}
    ]


def _round(value: float) -> float:
    """Removes float32 rounding: 7.9999995 becomes 8."""
    return round(value, 3) if math.isclose(value, round(value, 3), rel_tol=TOLERANCE) else value


def _unknown(path: Path) -> ModelError:
    return ModelError(
        f"{path}: its rotary factors (the tensor rope_freqs.weight) are not those of Llama 3's formula.", hint=ELSEWHERE
    )


def _frequencies(parameters: dict[str, Any], head_size: int) -> Tensor:
    """(D/2,) float64, of the rope_parameters of a config.json."""
    found = rotary_of(ConfigFields({"rope_parameters": parameters}), head_size)
    return torch.tensor(found.frequencies, dtype=torch.float64)
