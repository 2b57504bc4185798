"""What can be compared between two runs, and the paired difference of their held-out losses.

Two runs that were measured on the same tokens of the same documents are compared document by document (intervals.py).
With another tokenizer the same text has other tokens, so losses per token differ in their unit; bits per byte do not.
Of different texts no number can be compared, since one text is harder to predict than another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from octavo.commands.compare.read import ReadRun
from octavo.commands.scores import difference_text
from octavo.intervals import MIN_UNITS, Units, difference
from octavo.reporting import shown
from octavo.runs.events import Difference, HeldOutLosses, Interval
from octavo.runs.loss_unit import bits_per_byte
from octavo.runs.packed_numbers import unpack_counts, unpack_floats

Comparable = Literal["loss", "bits_per_byte", "nothing"]
# The share by which the measured bytes of one text may differ between tokenizers: without a BOS token the first token
# of a document is not predicted.
BYTES_TOLERANCE = 0.01
MUCH = 5.0  # nats per token, from which on a perplexity changes more than a hundredfold
NO_DIFFERENCE = 5e-4  # in the unit that is shown, as in `difference_text`


@dataclass(frozen=True)
class Paired:
    """The run `after` against the run `before`. `lower_by` is in nats per token, or in bits per byte."""

    before: ReadRun
    after: ReadRun
    comparable: Comparable
    sentence: str
    lower_by: float | None = None
    interval: Interval | None = None


def same_text(a: HeldOutLosses | None, b: HeldOutLosses | None) -> Comparable:
    """Which numbers of two measurements can be compared."""
    if a is None or b is None:
        return "nothing"
    if a.labels == b.labels:
        return "loss"
    close = abs(a.bytes - b.bytes) <= BYTES_TOLERANCE * max(a.bytes, b.bytes)
    return "bits_per_byte" if a.text == b.text and close else "nothing"


def compare_pair(before: ReadRun, after: ReadRun) -> Paired:
    """The difference of the held-out losses of two tuned models, with an interval if they can be paired."""
    for run in (before, after):
        if run.losses is None:
            return Paired(before, after, "nothing", _unmeasured(run, before, after))
    a, b = before.losses, after.losses
    assert a is not None
    assert b is not None
    kind = same_text(a, b)
    units_a, units_b = units_of(a), units_of(b)
    if units_a is None or units_b is None:
        damaged = before if units_a is None else after
        sentence = f"{_both(before, after)}: the recorded held-out losses of {damaged.letter} are damaged."
        return Paired(before, after, "nothing", sentence)
    if kind == "loss":
        return _of_losses(before, after, units_a, units_b)
    if kind == "bits_per_byte":
        return _of_bits(before, after)
    reason = (
        "other parts of the held-out text were measured (--eval-rows, --seq-len, --truncate)"
        if a.text == b.text
        else "the held-out text differs"
    )
    return Paired(
        before,
        after,
        "nothing",
        f"{_both(before, after)}: {reason}. Neither perplexity nor loss can be compared, since one text is harder to "
        "predict than another. Bits per byte do not depend on the tokenizer, but they depend on the text too. The gain "
        "of each run over its own base is in the results. `octavo evaluate --adapter RUN --data TEXT` measures both on "
        "one text.",
    )


def units_of(losses: HeldOutLosses) -> Units | None:
    """The units as recorded; None if the event is damaged."""
    try:
        nats = np.array(unpack_floats(losses.nats), dtype=np.float64)
        tokens = np.array(unpack_counts(losses.tokens), dtype=np.int64)
    except ValueError:
        return None
    if len(nats) != len(tokens) or not len(nats) or not tokens.all():
        return None
    return Units(losses.over, nats, tokens, losses.documents, losses.rows)


def bits_per_nat_per_token(losses: HeldOutLosses) -> float:
    """What a loss in nats per token is multiplied by to be in bits per byte: tokens / (bytes ln 2); NaN if unknown."""
    units = units_of(losses)
    return float(units.tokens.sum()) / (losses.bytes * math.log(2)) if units and losses.bytes > 0 else math.nan


def _of_losses(before: ReadRun, after: ReadRun, a: Units, b: Units) -> Paired:
    assert before.losses is not None
    lower_by, unit = _loss(a) - _loss(b), bits_per_byte(bits_per_nat_per_token(before.losses))
    bounds = difference(a, b)
    names = f"{before.letter} ({before.name})", f"{after.letter} ({after.name})"
    sentence = difference_text(Difference(names[0], "", names[1], "", lower_by, bounds), b, unit)
    if bounds is None and min(len(a.nats), len(b.nats)) >= MIN_UNITS:
        sentence = sentence.partition("; it has no interval")[0] + (
            "; it has no interval: rows of another --seq-len are other units. More than "
            f"{MIN_UNITS} held-out documents would be the same units."
        )
    if (
        bounds is not None
        and not bounds.low <= 0 <= bounds.high
        and abs(unit.of(lower_by)) >= NO_DIFFERENCE
        and abs(lower_by) < MUCH
    ):
        low, high = sorted(100 * (1 - math.exp(-bound)) for bound in (bounds.low, bounds.high))
        sign, word = (-1, "higher") if lower_by < 0 else (1, "lower")
        low, high = sorted((sign * low, sign * high))
        sentence += (
            f" Its perplexity is {sign * 100 * (1 - math.exp(-lower_by)):.1f} % {word} ({low:.1f} to {high:.1f} %)."
        )
    return Paired(before, after, "loss", sentence, lower_by, bounds)


def _of_bits(before: ReadRun, after: ReadRun) -> Paired:
    a, b = (run.rows[-1].bits_per_byte if run.rows else None for run in (before, after))
    lower_by = a - b if a is not None and b is not None else None
    numbers = "" if lower_by is None else f" {before.letter} has {_bits(a)} bits per byte, {after.letter} {_bits(b)}."
    sentence = (
        f"{_both(before, after)}: the same held-out text has other tokens, those of another tokenizer. Loss and "
        "perplexity are per token, so they cannot be compared. Bits per byte of text can, without an interval."
        f"{numbers}"
    )
    return Paired(before, after, "bits_per_byte", sentence, lower_by)


def _unmeasured(run: ReadRun, before: ReadRun, after: ReadRun) -> str:
    state = run.summary.state
    reason = (
        "it has no held-out text, its losses are not finite, or it was trained before octavo recorded losses by "
        f"document (`octavo finetune --resume --out {run.name}` records them)"
        if state == "finished"
        else "a checkpoint has only the mean loss of its evaluation (`octavo evaluate --adapter RUN@STEP` measures it)"
        if state == "checkpoint"
        else f"it is not finished ({state})"
    )
    return f"{_both(before, after)}: {run.letter} has no held-out losses of the tuned model: {reason}."


def _both(before: ReadRun, after: ReadRun) -> str:
    return f"{after.letter} against {before.letter}"


def _bits(value: float | None) -> str:
    return "?" if value is None else shown(value)


def _loss(units: Units) -> float:
    return float(units.nats.sum() / units.tokens.sum())
