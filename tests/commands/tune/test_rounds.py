"""Which cells a search tries, and for how many steps."""

from __future__ import annotations

import math

import pytest

from octavo.commands.tune.rounds import (
    FINAL_FACTOR,
    MIN_STEPS,
    RESERVE,
    Cell,
    Costs,
    finalists,
    learning_rates,
    least_seconds,
    other_ranks,
    steps_of_first_rounds,
    steps_of_last_round,
)

DEFAULT = Cell(2e-4, 16)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
GRID = [Cell(lr, rank) for lr in RATES for rank in (4, 16, 64)]
OF_RATES = {Cell(lr, 16): loss for lr, loss in zip(RATES, (3.0, 2.0, 1.0, 1.5), strict=True)}


def test_the_first_round_has_each_learning_rate_and_the_default_settings() -> None:
    assert learning_rates(GRID, DEFAULT) == [DEFAULT, *OF_RATES]
    assert learning_rates([Cell(2e-4, 16), Cell(1e-3, 16)], DEFAULT) == [DEFAULT, Cell(1e-3, 16)]
    assert learning_rates([Cell(1e-3, 8), Cell(1e-3, 64)], DEFAULT) == [DEFAULT, Cell(1e-3, 8)]


def test_the_second_round_has_the_other_ranks_at_the_best_rate() -> None:
    assert other_ranks(GRID, OF_RATES) == [Cell(1e-3, 4), Cell(1e-3, 64)]
    assert other_ranks(GRID, {**OF_RATES, DEFAULT: 0.1}) == [Cell(1e-3, 4), Cell(1e-3, 64)], "2e-4 is not in the grid"
    assert other_ranks([cell for cell in GRID if cell.rank == 16], OF_RATES) == []
    assert other_ranks(GRID, dict.fromkeys(OF_RATES, math.nan)) == []


@pytest.mark.parametrize(
    ("share", "rate"), [(1.0, 1e-3), (0.2, 1e-3), (0.1, 3e-4), (0.01, 3e-4), (0.001, 1e-4), (1e-9, 1e-4)]
)
def test_the_learning_rate_of_short_trials_is_scaled_to_a_whole_run_of_one_pass(share: float, rate: float) -> None:
    losses = {**OF_RATES, DEFAULT: 2.5}
    assert finalists(GRID, losses, DEFAULT, share=share, passes=0.9) == [Cell(rate, 16), DEFAULT]
    assert finalists(GRID, losses, DEFAULT, share=share, passes=4.0) == [Cell(1e-3, 16), DEFAULT]


def test_a_better_rank_is_a_finalist_at_the_scaled_rate() -> None:
    found = {**OF_RATES, Cell(1e-3, 4): 0.9, Cell(1e-3, 64): 1.2, DEFAULT: 2.5}
    assert finalists(GRID, found, DEFAULT, share=0.1, passes=1.0) == [Cell(3e-4, 16), DEFAULT, Cell(3e-4, 4)]
    worse = {**found, Cell(1e-3, 4): 1.1}
    assert finalists(GRID, worse, DEFAULT, share=0.1, passes=1.0) == [Cell(3e-4, 16), DEFAULT]


def test_trials_that_diverged_are_no_finalists() -> None:
    found = {Cell(1e-3, 16): math.nan, Cell(3e-3, 16): math.inf, Cell(3e-4, 16): 2.0, DEFAULT: 9.0}
    assert finalists(GRID, found, DEFAULT, share=1.0, passes=1.0) == [Cell(3e-4, 16), DEFAULT]
    assert finalists(GRID, dict.fromkeys(OF_RATES, math.nan), DEFAULT, share=1.0, passes=1.0) == [DEFAULT]


@pytest.mark.parametrize("seconds", [400.0, 1000.0, 3333.0])
def test_the_rounds_take_the_time_and_no_more(seconds: float) -> None:
    costs = Costs(step=0.5, evaluation=2.0, verdict=3.0)
    first = steps_of_first_rounds(seconds, 5, 3, costs, most=10**6)
    left = seconds - 5 * costs.trial(first)
    last = steps_of_last_round(left, 3, costs, most=10**6)
    assert last >= FINAL_FACTOR * first
    left -= 3 * costs.trial(last, last=True)
    assert 0 <= left <= RESERVE * seconds + 3 * costs.step


def test_a_trial_has_no_more_steps_than_a_whole_run_and_not_too_few() -> None:
    costs = Costs(1.0, 0.0, 0.0)
    assert steps_of_first_rounds(1e9, 13, 0, costs, most=70) == 70
    assert steps_of_first_rounds(13 * MIN_STEPS, 13, 0, costs, most=70) == 0, "the reserve is missing"
    assert steps_of_first_rounds(13 * (MIN_STEPS + 1), 13, 0, costs, most=70) == MIN_STEPS
    assert steps_of_first_rounds(13 * 4, 13, 0, costs, most=3) == 3, "a whole run is shorter than the least"
    assert steps_of_last_round(1e9, 3, costs, most=70) == 70
    assert steps_of_last_round(3 * MIN_STEPS, 3, costs, most=70) == 0


def test_time_that_whole_runs_in_the_last_round_do_not_need_is_for_the_others() -> None:
    seconds = (7 * 60 + 3 * 70) / (1 - RESERVE)
    assert steps_of_first_rounds(seconds + 1, 7, 3, Costs(1.0, 0.0, 0.0), most=70) == 60


@pytest.mark.parametrize("most", [4, MIN_STEPS, 40, 500])
@pytest.mark.parametrize("costs", [Costs(1.0, 3.0, 2.0), Costs(0.5, 0.0, 0.0)])
def test_the_shortest_search_is_the_shortest_that_has_steps(most: int, costs: Costs) -> None:
    whole = Costs(costs.step, costs.evaluation + costs.verdict, 0.0)

    def begins(seconds: float) -> bool:
        """As the search decides it: whole runs of 13 cells, or the rounds of 5 of them and 2 finals."""
        if steps_of_first_rounds(seconds, 13, 0, whole, most=most) == most:
            return True
        return steps_of_first_rounds(seconds, 5, 2, costs, most=most) > 0

    least = least_seconds(5, 13, 2, costs, most=most)
    assert begins(least * 1.001)
    assert not begins(least * 0.97)
