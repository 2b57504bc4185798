"""Which cells of a grid of learning rates and ranks are tried, and for how many steps.

1. Every learning rate, at the rank that is nearest to the default one.
2. The other ranks, at the best learning rate, for as many steps.
3. The best cell, and the same rank with the next lower learning rate, for as many steps as the time allows.

Each trial begins with the untrained adapter and has a complete learning-rate schedule. The default settings are in
rounds 1 and 3: the answer to whether another cell is better is a comparison on equal terms.

Short runs prefer higher learning rates than long ones. Successive halving (Jamieson and Talwalkar 2016, arXiv
1502.07943) over all cells makes its first runs so short that it discards the rate that is best for a whole run: with a
quarter of the grid's time it reached 62 % of the grid's improvement in a trial of 12 cells. With alpha in proportion to
the rank, the best learning rate depends little on the rank, so that one axis after the other takes 8 trials instead of
13 and more: each of them has more steps. And of two rates that cannot be told apart the lower one is chosen
(outcome.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FINAL_FACTOR = 2  # a trial of the last round has about so many times the steps of the others
MIN_STEPS = 6  # of a trial: fewer teach nothing (commands/finetune/length.py), even at a high learning rate
RESERVE = 0.08  # of the time, for steps that take longer than those measured


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the grid."""

    lr: float
    rank: int

    def __str__(self) -> str:
        return f"lr {self.lr:g}, rank {self.rank}"


@dataclass(frozen=True)
class Costs:
    """Measured seconds: of an optimizer step, and of an evaluation on the text that chooses, or on the other half."""

    step: float
    evaluation: float
    verdict: float

    def trial(self, steps: float, *, last: bool = False) -> float:
        """Seconds of a trial; in the last round it is evaluated on both halves."""
        return steps * self.step + self.evaluation + last * self.verdict


def learning_rates(cells: Sequence[Cell], default: Cell) -> list[Cell]:
    """The cells of round 1: every learning rate at the rank nearest to the default one, and the default settings."""
    middle = min({cell.rank for cell in cells}, key=lambda rank: (abs(math.log(rank / default.rank)), rank))
    return list(dict.fromkeys([default, *sorted(cell for cell in cells if cell.rank == middle)]))


def other_ranks(cells: Sequence[Cell], losses: Mapping[Cell, float]) -> list[Cell]:
    """The cells of round 2: the best learning rate of the grid so far with the ranks that it was not tried with."""
    best = _best(losses, cells)
    return [] if best is None else sorted(c for c in cells if c.lr == best.lr and c not in losses)


def finalists(cells: Sequence[Cell], losses: Mapping[Cell, float], default: Cell) -> list[Cell]:
    """The cells of the last round, the best and the default settings first.

    If the time ends early, these two can be compared. The third is the best rank with the next lower learning rate, or,
    if there is none, the second best cell.
    """
    best = _best(losses, losses)
    if best is None:
        return [default]
    lower = [cell for cell in cells if cell.rank == best.rank and cell.lr < best.lr]
    second = max(lower) if lower else _best({cell: losses[cell] for cell in losses if cell != best}, losses)
    return list(dict.fromkeys([best, default, *([second] if second else [])]))


def _best(losses: Mapping[Cell, float], among: Sequence[Cell] | Mapping[Cell, float]) -> Cell | None:
    """The cell with the lowest loss; None if no loss is a number."""
    found = {cell: loss for cell, loss in losses.items() if cell in among and math.isfinite(loss)}
    return min(found, key=lambda cell: (found[cell], cell), default=None)


def steps_of_first_rounds(seconds: float, trials: int, finals: int, costs: Costs, *, most: int) -> int:
    """Steps of each of so many trials, if `finals` more with FINAL_FACTOR times the steps follow in `seconds`.

    At most `most` steps, which are those of a whole run; 0 if not even MIN_STEPS fit.
    """
    left = (1 - RESERVE) * seconds - trials * costs.trial(0) - finals * costs.trial(0, last=True)
    steps = math.floor(left / costs.step / (trials + FINAL_FACTOR * finals))
    if FINAL_FACTOR * steps > most:  # the last round takes no more than whole runs
        steps = math.floor((left - finals * most * costs.step) / costs.step / trials)
    return _bounded(steps, most)


def steps_of_last_round(seconds: float, finals: int, costs: Costs, *, most: int) -> int:
    """Steps of each trial of the last round, in `seconds`. At most `most`; 0 if not even MIN_STEPS fit."""
    left = (1 - RESERVE) * seconds / finals - costs.trial(0, last=True)
    return _bounded(math.floor(left / costs.step), most)


def _bounded(steps: int, most: int) -> int:
    return min(steps, most) if steps >= min(MIN_STEPS, most) else 0
