"""Rotary positions (RoFormer, arXiv 2104.09864) as the settings of a config.json describe them.

Pair i of the R rotated values of a head turns by the angle p f_i at position p:

    default    f_i = theta^(-2i/R)
    linear     f_i / factor: positions are compressed into the original context (arXiv 2306.15595)
    llama3     f_i / factor for pairs that turn less than low_freq_factor times in the original context, f_i for those
               that turn more than high_freq_factor times, a linear ramp between (Llama 3.1, arXiv 2407.21783)
    yarn       the same, between beta_slow and beta_fast turns with a ramp over i; cos and sin are scaled (2309.00071)
    longrope   f_i / short_factor_i in sequences of at most the original context, f_i / long_factor_i in longer ones;
               cos and sin are scaled (2402.13753)
    dynamic    in sequences of L positions, longer than the original context C, theta grows by the factor
               (factor L / C - factor + 1)^(R / (R - 2))

The length that longrope and dynamic ask for is that of a document in training, and over a cache the most positions that
a request may have, its prompt and its longest answer: keys that are stored once cannot turn by other angles later.
transformers takes the longest sequence of a batch, and while an answer grows beyond the original context it stores keys
under angles that change: an answer that crosses the original context differs from transformers'.

Frequencies are computed on the CPU, as transformers does: the power function of a GPU rounds differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.models.config_fields import ConfigFields

DEFAULT_THETA = 10000.0
MAX_THETA, MAX_FACTOR = 1e15, 1e6  # far above published models
TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


@dataclass(frozen=True)
class Rotary:
    """The rotary positions of a layer."""

    frequencies: tuple[float, ...]  # (R/2,)
    scale: float = 1.0  # of cos and sin
    original: int = 0  # the original context, for the two types below
    long: tuple[float, ...] = ()  # longrope: the frequencies of sequences longer than `original`
    dynamic: tuple[float, float, int] | None = None  # (theta, factor, R)

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies are others in long sequences."""
        return bool(self.long) or self.dynamic is not None

    def at(self, length: Tensor | int, device: torch.device) -> Tensor:
        """(R/2,) for sequences of `length`; (B, T, R/2) if it is (B, T), the length of each position's sequence."""
        short = _on_device(self.frequencies, device)
        if not self.depends_on_length or (isinstance(length, int) and length <= self.original):
            return short
        long = _on_device(self.long, device) if self.long else self._stretched(length, device)
        if isinstance(length, int):
            return long
        return torch.where((length > self.original)[..., None], long, short)

    def regime(self, length: int) -> int:
        """A number that is equal for lengths with the same frequencies."""
        if length <= self.original:
            return 0
        return 1 if self.long else length

    def _stretched(self, length: Tensor | int, device: torch.device) -> Tensor:
        assert self.dynamic is not None
        theta, factor, rotated = self.dynamic
        lengths = torch.as_tensor(length, device=device).clamp_min(self.original).reshape(-1, 1)  # (n, 1)
        growth = (factor * lengths / self.original - (factor - 1)) ** (rotated / (rotated - 2))
        exponents = torch.arange(0, rotated, 2, device=device).float() / rotated  # (R/2,)
        frequencies = 1.0 / (theta * growth) ** exponents  # (n, R/2)
        return frequencies[0] if isinstance(length, int) else frequencies.view(*length.shape, -1)


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(R/2,), copied once: a copy from pageable CPU memory makes a GPU wait, and cannot be in a CUDA graph."""
    return torch.tensor(values, device=device)


def default_frequencies(theta: float, rotated: int) -> Tensor:
    """(R/2,) float32 for R = `rotated` values of a head."""
    return 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated)


def rotary_of(
    fields: ConfigFields,
    head_size: int,
    *,
    theta: float = DEFAULT_THETA,
    share: float | None = None,
    layer_type: str = "",
) -> Rotary:
    """The rotary positions of a config.json; ModelError for what octavo does not support.

    `theta` is the family's default. `share` is the part of a head that it rotates where the file does not say; None for
    a family that always rotates whole heads. With a `layer_type` the settings may be those of this type of layers.
    """
    rope = _settings(fields, layer_type)
    theta = fields.number("rope_theta", least=1.0, most=MAX_THETA, default=theta)
    theta = rope.number("rope_theta", least=1.0, most=MAX_THETA, default=theta)
    rotated = head_size
    if share is not None:
        share = fields.number("partial_rotary_factor", least=0.0, most=1.0, default=share)
        rotated = int(head_size * rope.number("partial_rotary_factor", least=0.0, most=1.0, default=share))
    base = default_frequencies(theta, rotated)  # (R/2,): an odd R is rounded up, except in the exponents
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    context = fields.positions()
    if kind == "linear":
        base = base / _factor(rope)
    elif kind == "llama3":
        base = _llama3(base, rope, original_context(fields, rope))
    elif kind == "yarn":
        return _yarn(base, theta, rope, original_context(fields, rope), context)
    elif kind == "longrope":
        return _longrope(base, rope, original_context(fields, rope), context)
    elif kind == "dynamic":
        if rotated <= 2:
            raise rope.wrong(f"{rotated} values of a head are rotated; positions of type dynamic need more than 2")
        return Rotary(_values(base), original=context, dynamic=(theta, _factor(rope), rotated))
    elif kind != "default":
        raise ModelError(
            f"The model's config asks for rotary positions of type {shown(kind)}.",
            hint=f"octavo supports {', '.join(TYPES)}. Use a model with one of these.",
        )
    return Rotary(_values(base))


def context_of(fields: ConfigFields) -> int:
    """The positions that a model was made for; dynamic rotary positions extend them by their factor."""
    rope = _settings(fields, "")
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    return int(fields.positions() * (_factor(rope) if kind == "dynamic" else 1))


def _settings(fields: ConfigFields, layer_type: str) -> ConfigFields:
    """`rope_scaling`, the older key, wins over `rope_parameters` as in transformers."""
    rope = fields.object("rope_scaling") or fields.object("rope_parameters") or ConfigFields({})
    return (rope.object(layer_type) if layer_type else None) or rope


def original_context(fields: ConfigFields, rope: ConfigFields) -> int:
    """The original context: transformers reads it outside of the rotary settings first (Phi-3's files)."""
    inside = rope.positions("original_max_position_embeddings", default=fields.positions())
    return fields.positions("original_max_position_embeddings", default=inside)


def _factor(rope: ConfigFields, key: str = "factor", default: float | None = None) -> float:
    return rope.number(key, least=1e-3, most=MAX_FACTOR, default=default)


def _values(frequencies: Tensor) -> tuple[float, ...]:
    return tuple(frequencies.tolist())


def _llama3(base: Tensor, rope: ConfigFields, original: int) -> Tensor:
    factor, low, high = _factor(rope), _factor(rope, "low_freq_factor"), _factor(rope, "high_freq_factor")
    if low >= high:
        raise rope.wrong(f"low_freq_factor is {low:g}; it must be less than high_freq_factor, {high:g}")
    turns = original / (2 * math.pi / base)  # (R/2,) of each pair in the original context; rounded as in transformers
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * base / factor + kept * base


def _yarn(base: Tensor, theta: float, rope: ConfigFields, original: int, context: int) -> Rotary:
    """Pairs up to `low` keep their frequencies, pairs from `high` on have them divided by the factor."""
    rotated, factor = 2 * len(base), _factor(rope, default=context / original)
    if theta <= 1:
        raise rope.wrong(f"rope_theta is {theta:g}; positions of type yarn need more than 1")

    def pair_of(turns: float) -> float:
        """The pair, a real number, that turns so many times in the original context."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(_factor(rope, "beta_fast", 32.0)), pair_of(_factor(rope, "beta_slow", 1.0))
    if rope.flag("truncate", default=True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    divided = ((torch.arange(len(base)) - low) / (high - low or 1e-3)).clamp(0, 1)  # (R/2,)
    scale = _factor(rope, "attention_factor", _yarn_scale(rope, factor))
    return Rotary(_values(base / factor * divided + base * (1 - divided)), scale)


def _yarn_scale(rope: ConfigFields, factor: float) -> float:
    """The scale of cos and sin, where the file does not say: 0.1 ln(factor) + 1, or a ratio of two such numbers."""

    def scale_of(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    above = rope.number("mscale", least=0.0, most=MAX_FACTOR, default=0.0)
    below = rope.number("mscale_all_dim", least=0.0, most=MAX_FACTOR, default=0.0)
    return scale_of(above) / scale_of(below) if above and below else scale_of(1.0)


def _longrope(base: Tensor, rope: ConfigFields, original: int, context: int) -> Rotary:
    factor = _factor(rope, default=context / original)
    if original < 2:
        raise rope.wrong("original_max_position_embeddings is 1; positions of type longrope need more")
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    scale = _factor(rope, "attention_factor", grown)
    short, long = (
        _values(base / torch.tensor(rope.numbers(key, count=len(base), least=1e-3, most=MAX_FACTOR)))
        for key in ("short_factor", "long_factor")
    )
    return Rotary(short, scale, original, long)
