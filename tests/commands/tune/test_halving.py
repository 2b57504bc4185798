"""Which cells successive halving tries, and for how many steps."""

from __future__ import annotations

import math

import pytest

from octavo.commands.tune.halving import (
    FINALISTS,
    MIN_STEPS,
    RESERVE,
    Cell,
    Costs,
    affordable,
    promoted,
    round_sizes,
    steps_of_round,
    trials,
)

DEFAULT = Cell(2e-4, 16)
GRID = [Cell(lr, rank) for lr in (1e-4, 3e-4, 1e-3, 3e-3) for rank in (4, 16, 64)]


@pytest.mark.parametrize(("cells", "sizes"), [(12, [12, 4, 2]), (27, [27, 9, 3, 2]), (3, [3, 2]), (2, [2])])
def test_each_round_keeps_a_third(cells: int, sizes: list[int]) -> None:
    assert round_sizes(cells) == sizes


def test_the_default_settings_are_in_every_round() -> None:
    assert trials(GRID, default=DEFAULT) == [13, 5, 3]
    assert trials([*GRID, DEFAULT], default=DEFAULT) == [13, 6, 3]
    losses = {cell: float(number) for number, cell in enumerate([*GRID, DEFAULT])}
    assert promoted(losses, 4, default=DEFAULT) == [*GRID[:4], DEFAULT]
    assert promoted({**losses, DEFAULT: -1.0}, 4, default=DEFAULT) == [DEFAULT, *GRID[:3]]


def test_a_trial_that_diverged_is_the_last() -> None:
    losses = {GRID[0]: math.nan, GRID[1]: 2.0, GRID[2]: math.inf, DEFAULT: 9.0}
    assert promoted(losses, 2, default=DEFAULT) == [GRID[1], DEFAULT]


def test_the_rounds_take_the_time_and_no_more() -> None:
    costs, sizes = Costs(step=0.5, evaluation=2.0, verdict=3.0), [13, 5, 3]
    for seconds in (400.0, 1000.0, 3333.0):
        left = seconds
        steps = []
        for number, size in enumerate(sizes):
            steps.append(steps_of_round(left, sizes[number:], costs, most=10**6))
            left -= size * (steps[-1] * costs.step + costs.evaluation)
        left -= sizes[-1] * costs.verdict
        # Of the last round less than a step of each trial is left, and the reserve of each round.
        assert 0 <= left <= 3 * costs.step + 3 * RESERVE * seconds
        assert steps == sorted(steps)
        assert steps[-1] > 2 * steps[0]


def test_a_trial_has_no_more_steps_than_a_whole_run_and_not_too_few() -> None:
    costs = Costs(1.0, 0.0, 0.0)
    assert steps_of_round(1e9, [13, 5, 3], costs, most=70) == 70
    assert steps_of_round(13 * MIN_STEPS, [13], costs, most=70) == 0, "the reserve is missing"
    assert steps_of_round(13 * (MIN_STEPS + 1), [13], costs, most=70) == MIN_STEPS
    assert steps_of_round(13 * 4, [13], costs, most=3) == 3, "a whole run is shorter than the least"


def test_with_little_time_fewer_ranks_are_tried_those_near_the_default_first() -> None:
    costs = Costs(1.0, 1.0, 1.0)
    assert affordable(GRID, 10_000, costs, most=99, default=DEFAULT) == GRID
    some = affordable(GRID, 260, costs, most=99, default=DEFAULT)
    assert {cell.rank for cell in some} < {4, 16, 64}
    assert 16 in {cell.rank for cell in some}
    assert {cell.lr for cell in some} == {cell.lr for cell in GRID}
    assert affordable(GRID, 30, costs, most=99, default=DEFAULT) == []
    assert (len(round_sizes(len(GRID))), FINALISTS) == (3, 2), "the times above are for three rounds"
