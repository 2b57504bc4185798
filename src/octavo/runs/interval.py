"""The interval of a mean, as events record it (intervals.py computes it)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """The bounds of a mean, and how many units of which kind it was computed from (intervals.py).

    `level` is the share of such intervals that contain the mean.
    """

    low: float
    high: float
    units: int
    over: str
    level: float = 0.95


def half_width(bounds: Interval | None) -> float | None:
    """Half the width; None without an interval, or if that is not finite."""
    half = (bounds.high - bounds.low) / 2 if bounds else math.nan
    return half if math.isfinite(half) else None


def plus_minus(value: float, half: float) -> str:
    """The value and half of its interval, to two digits of the latter."""
    digits = 3 if half <= 0 else max(0, min(6, 1 - math.floor(math.log10(half))))
    return f"{value:.{digits}f} \N{PLUS-MINUS SIGN} {half:.{digits}f}"
