"""The unit in which people read a loss: bits per byte of text, which does not depend on the tokenizer.

Events and JSON have losses in nats per token. Bits per byte are tokens / (bytes ln 2) times as many, a factor of the
text and the tokenizer, so that differences and intervals are converted by the same factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.runs.events import ScoreRow
from octavo.runs.interval import Interval


@dataclass(frozen=True)
class LossUnit:
    """What a number of nats per token is multiplied by, and the name of the result."""

    factor: float
    name: str

    def of(self, nats: float) -> float:
        """A number of nats per token in this unit."""
        return nats * self.factor

    def bounds(self, interval: Interval) -> tuple[float, float]:
        """The bounds of an interval in nats per token in this unit."""
        return interval.low * self.factor, interval.high * self.factor


NATS = LossUnit(1.0, "nats per token")


def bits_per_byte(factor: float | None) -> LossUnit:
    """Bits per byte with their factor; nats per token if it is unknown, of a text without bytes for example."""
    return NATS if factor is None or not math.isfinite(factor) or factor <= 0 else LossUnit(factor, "bits per byte")


def unit_of(row: ScoreRow | None) -> LossUnit:
    """Bits per byte for the text of a row of scores; nats per token if the row does not have both numbers."""
    if row is None or row.bits_per_byte is None or not row.loss:
        return NATS
    return bits_per_byte(row.bits_per_byte / row.loss)
