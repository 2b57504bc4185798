"""Which cells of a grid of learning rates and ranks are tried, and for how many steps.

1. Every learning rate, at the rank that is nearest to the default one.
2. If there is time, the other ranks at the best learning rate, for as many steps.
3. The cells that this makes likely for a whole run, and the default settings, for FINAL_FACTOR times the steps.

Each trial begins with the untrained adapter and has a complete learning-rate schedule. The default settings are in
rounds 1 and 3: the answer to whether another cell is better is a comparison on equal terms.

**A trial has a share of the steps and the same share of the text** (trial.py), so that it makes as many passes as a
whole run. On all of the text a short trial makes fewer passes than a whole run and cannot overfit, so it prefers rates
that are too high: of SmolLM2 over Python sources 3e-3 is best after 27 steps, and has two thirds of the improvement of
1e-4 to 3e-4 after 800 steps, 5 passes; 213 steps on all of the plays chose 1e-3, with half of the improvement.
On a tenth and a quarter of the text 3e-4 was best for both, as in whole runs (docs/log.md). Of a whole run of at most
one pass, which cannot overfit either, the best rate falls with its steps as steps^-0.3 (arXiv 2409.19913): there the
rate of round 1 is scaled. Successive halving (arXiv 1502.07943) reached 62 % of a grid's improvement.
With alpha in proportion to the rank, a higher rank is much like a higher rate, so the rank is tried last.
Of two rates that cannot be told apart the lower one is chosen (outcome.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FINAL_FACTOR = 3  # a trial of the last round has about so many times the steps of the others
RATE_POWER = 0.3  # of a whole run of one pass or less
RANKS_SHARE = 0.25  # of a whole run, which trials must have if ranks are tried too: a rank shows in long runs
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


def finalists(
    cells: Sequence[Cell], losses: Mapping[Cell, float], default: Cell, *, share: float, passes: float
) -> list[Cell]:
    """The cells of the last round, after trials with a `share` of the steps of a whole run of so many `passes`.

    First the learning rate of the grid that is nearest to the best one for a whole run, at the rank of round 1;
    then the default settings, so that these two can be compared if the time ends early; then the best other rank, if
    one was better.
    """
    rates = [cell for cell in learning_rates(cells, default) if cell in cells]
    best = _best(losses, rates)
    if best is None:
        return [default]
    wanted = best.lr * (min(1.0, share) ** RATE_POWER if passes <= 1 else 1.0)
    likely = min(rates, key=lambda cell: abs(math.log(cell.lr / wanted)))
    overall = _best(losses, [cell for cell in cells if cell.lr == best.lr])
    ranked = [Cell(likely.lr, overall.rank)] if overall and overall.rank != likely.rank else []
    return list(dict.fromkeys([likely, default, *ranked]))


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


def least_seconds(first: int, every: int, finals: int, costs: Costs, *, most: int) -> float:
    """The time of the shortest search: whole runs of `every` cells, or MIN_STEPS steps of `first` cells and the finals.

    With less, `steps_of_first_rounds` has no steps for either. The untuned model is measured before it.
    """
    steps = min(MIN_STEPS, most)
    rounds = first * costs.trial(steps) + finals * costs.trial(min(FINAL_FACTOR * steps, most), last=True)
    return min(rounds, every * costs.trial(most, last=True)) / (1 - RESERVE)


def steps_of_last_round(seconds: float, finals: int, costs: Costs, *, most: int) -> int:
    """Steps of each trial of the last round, in `seconds`. At most `most`; 0 if not even MIN_STEPS fit."""
    left = (1 - RESERVE) * seconds / finals - costs.trial(0, last=True)
    return _bounded(math.floor(left / costs.step), most)


def _bounded(steps: int, most: int) -> int:
    return min(steps, most) if steps >= min(MIN_STEPS, most) else 0
