"""What a search has found, and how sure that is: the choice against the default settings and against the second."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from octavo.commands.tune.record import Record, ShortRun, with_nats
from octavo.commands.tune.rounds import Cell
from octavo.intervals import CONFIDENCE, Units, difference
from octavo.runs.events import Interval


@dataclass(frozen=True)
class Comparison:
    """How much lower the loss of the choice is than that of another cell, in nats a token, on one half of the text.

    `probability` is that the true difference is positive, for text of this kind; None without an interval.
    """

    other: str
    lower_by: float
    interval: Interval | None
    probability: float | None

    @property
    def clear(self) -> bool:
        """Whether the interval has positive values alone."""
        return self.interval is not None and self.interval.low > 0


@dataclass(frozen=True)
class Outcome:
    """The choice of a search. `steps` are those of the trials that chose; comparisons are on the text of `measured_on`.

    None for a comparison that no trial was made for.
    """

    choice: Cell
    default: Cell
    steps: int
    whole: int  # steps of a run on all of the text
    measured_on: str  # "verdict": text that chose nothing, or "choosing"
    against_base: Comparison | None
    against_default: Comparison | None
    against_second: Comparison | None
    complete: bool  # whether all rounds were done in time

    @property
    def beats_default(self) -> bool:
        """Whether the choice is better than the default settings, with 95 % confidence."""
        return self.against_default is not None and self.against_default.clear

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {**asdict(self), "beats_default": self.beats_default, "sentences": self.sentences()}

    def sentences(self) -> list[str]:
        """The outcome in words."""
        share = f", on {self.steps / self.whole:.0%} of the text" if self.steps < self.whole else ""
        lines = [f"Best: {self.choice}, after {self.steps:,} steps of each trial in the last round{share}."]
        if self.against_base:
            lines.append(f"Against the base: {_text(self.against_base)}")
        if self.choice == self.default:
            lines.append("The default settings are the best of the cells.")
        elif self.against_default is None:
            lines.append("The default settings were not tried in the same round, so nothing compares them.")
        else:
            lines.append(f"Against the default settings ({self.default}): {_text(self.against_default)}")
            if not self.beats_default:
                lines.append("No cell is clearly better than the default settings: they may be kept.")
        if self.against_second:
            lines.append(f"Against the second ({self.against_second.other}): {_text(self.against_second)}")
        if self.measured_on == "choosing":
            lines.append("These differences are of the text that chose the cell, so they are somewhat too large.")
        if not self.complete:
            lines.append("The time ended before the last round was complete: --resume with a higher --minutes goes on.")
        lines.append("An interval is about other text of this kind, and not about another seed.")
        if share:
            lines.append(f"A run on all of the text has {self.whole:,} steps. It may order these cells otherwise.")
        return lines


def outcome_of(record: Record, choosing: Units, verdict: Units, *, default: Cell) -> Outcome | None:
    """The outcome of the trials so far; None before one of them has a loss.

    The units are those of both halves of the text, whose losses are replaced by the recorded ones.
    """
    for one in reversed(record.rounds):
        equal = [trial for trial in record.trials if trial.round <= one.number and trial.steps == one.steps]
        if one.last and any(trial.verdict is not None for trial in equal):  # on text that chose nothing
            equal = [trial for trial in equal if trial.verdict is not None]
        tried = {trial.cell: trial for trial in equal if loss_of(trial, choosing)}
        if (default in tried and len(tried) > 1) or (one.number == 1 and tried):
            break
    else:
        return None
    ordered = sorted(tried, key=lambda cell: loss_of(tried[cell], choosing) or math.inf)
    if one.steps < record.identity.get("steps", one.steps):
        ordered = _lower_rate_first(ordered, tried, choosing)
    choice, second = ordered[0], next((cell for cell in ordered[1:] if cell != default), None)
    judged = all(trial.verdict is not None for trial in tried.values())
    units = verdict if judged else choosing

    def nats(trial: ShortRun) -> Sequence[float]:
        found = trial.verdict if judged else trial.nats
        assert found is not None
        return found

    def against(name: str, other: Sequence[float]) -> Comparison:
        return compared(name, with_nats(units, other), with_nats(units, nats(tried[choice])))

    assert record.base is not None
    is_last = one.last or one.steps >= record.identity.get("steps", math.inf)
    complete = is_last and len(record.of_round(one.number)) == len(one.cells)
    return Outcome(
        choice, default, one.steps, record.identity.get("steps", one.steps), "verdict" if judged else "choosing",
        against("the base", record.base[1 if judged else 0]),
        against(str(default), nats(tried[default])) if default in tried and choice != default else None,
        against(str(second), nats(tried[second])) if second is not None else None,
        complete,
    )  # fmt: skip


def _lower_rate_first(ordered: list[Cell], tried: Mapping[Cell, ShortRun], choosing: Units) -> list[Cell]:
    """The cells, best first. A lower learning rate of the same rank is first if the text cannot tell it from the best:
    it changes the model less, and a rate that is too high does more harm to a whole run than one that is too low."""
    best = ordered[0]
    for cell in sorted((cell for cell in ordered if cell.rank == best.rank and cell.lr < best.lr), reverse=True):
        nats, best_nats = tried[cell].nats, tried[best].nats
        assert nats is not None
        assert best_nats is not None
        bounds = difference(with_nats(choosing, nats), with_nats(choosing, best_nats))
        if bounds is not None and bounds.low <= 0:
            return [cell, *(other for other in ordered if other != cell)]
    return ordered


def loss_of(trial: ShortRun, choosing: Units) -> float | None:
    """The mean loss on the text that chooses; None if it is not finite."""
    if trial.nats is None:
        return None
    loss = math.fsum(trial.nats) / float(choosing.tokens.sum())
    return loss if math.isfinite(loss) else None


def compared(name: str, other: Units, choice: Units) -> Comparison:
    """The paired difference. P(difference > 0) is that of a normal distribution with the interval's mean and width."""
    bounds = difference(other, choice)
    lower_by = float((other.nats.sum() - choice.nats.sum()) / other.tokens.sum())
    if bounds is None:
        return Comparison(name, lower_by, None, None)
    error = (bounds.high - bounds.low) / 2 / NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    probability = NormalDist().cdf(lower_by / error) if error > 0 else float(lower_by > 0)
    return Comparison(name, lower_by, bounds, probability)


def _text(one: Comparison) -> str:
    word = "lower" if one.lower_by >= 0 else "higher"
    size = f"the loss is {abs(one.lower_by):.4f} nats per token {word}"
    if one.interval is None or one.probability is None:
        return f"{size}, without an interval: the text has too few documents or rows."
    low, high = one.interval.low, one.interval.high
    return f"{size} (95 % interval of the gain {low:.4f} to {high:.4f}; better with probability {one.probability:.0%})."
