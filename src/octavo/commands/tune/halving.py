"""Successive halving over a grid of learning rates and ranks: which cells are tried, for how many steps.

Round 1 trains every cell for a few steps, with a complete learning-rate schedule of so many steps. Each further round
trains the best third of the cells again, from the start, for more steps (Jamieson and Talwalkar 2016, arXiv 1502.07943;
a factor of 3 as in Hyperband, arXiv 1603.06560). All rounds get the same time, so a third of the cells gets about three
times the steps. Short runs prefer higher learning rates than long ones: so no round is shorter than MIN_STEPS, and the
last one has several cells.

The default settings are in every round: the answer to whether another cell is better is a comparison on equal terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FACTOR = 3
FINALISTS = 2  # cells of the last round, with the default settings one more
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


def round_sizes(cells: int) -> list[int]:
    """How many cells each round tries, without the default settings: all, then a third, .. down to FINALISTS."""
    sizes = [cells]
    while sizes[-1] > FINALISTS:
        sizes.append(max(FINALISTS, math.ceil(sizes[-1] / FACTOR)))
    return sizes


def promoted(losses: Mapping[Cell, float], count: int, *, default: Cell) -> list[Cell]:
    """The `count` cells with the lowest losses, best first, and the default cell as one more if it is not among them.

    A loss that is not a number is the highest.
    """
    ordered = sorted(losses, key=lambda cell: (not math.isfinite(losses[cell]), losses[cell], cell))
    best = ordered[:count]
    return best if default in best else [*best, default]


def steps_of_round(seconds: float, sizes: Sequence[int], costs: Costs, *, most: int) -> int:
    """Steps of each trial of the next round, if `sizes` are the trials of this and the later rounds.

    The rounds share the time, of which the last one also spends a verdict for each of its trials. At most `most` steps,
    which are those of a whole run; 0 if not even MIN_STEPS fit.
    """
    left = (1 - RESERVE) * seconds - sizes[-1] * costs.verdict
    steps = math.floor((left / len(sizes) / sizes[0] - costs.evaluation) / costs.step)
    return min(steps, most) if steps >= min(MIN_STEPS, most) else 0


def affordable(cells: Sequence[Cell], seconds: float, costs: Costs, *, most: int, default: Cell) -> list[Cell]:
    """The cells of the first round: all, or, if there is no time for MIN_STEPS of each, fewer ranks.

    [] if there is no time for even the learning rates at one rank.
    """
    ranks = sorted({cell.rank for cell in cells}, key=lambda rank: (abs(math.log(rank / default.rank)), rank))
    for count in range(len(ranks), 0, -1):
        some = [cell for cell in cells if cell.rank in ranks[:count]]
        if steps_of_round(seconds, trials(some, default=default), costs, most=most):
            return some
    return []


def trials(cells: Sequence[Cell], *, default: Cell) -> list[int]:
    """The trials of each round of a search over `cells`, with the default settings where they are one more."""
    return [size + (number > 0 or default not in cells) for number, size in enumerate(round_sizes(len(cells)))]
