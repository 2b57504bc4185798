"""The choice of a search and its intervals, from recorded trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from octavo.commands.tune.outcome import Outcome, outcome_of
from octavo.commands.tune.record import Record, Round, ShortRun, read
from octavo.commands.tune.rounds import Cell
from octavo.errors import CheckpointError
from octavo.intervals import DOCUMENTS, Units, difference

DEFAULT, A, B = Cell(2e-4, 16), Cell(1e-3, 16), Cell(3e-3, 16)
N = 30
DRAW = np.random.default_rng(0)
BASE = DRAW.uniform(300, 500, N)


def units(seed: int) -> Units:
    tokens = np.full(N, 100, dtype=np.int64)
    return Units(DOCUMENTS, np.zeros(N) + seed, tokens, N, N)


def nats(lower: float, noise: float = 1.0) -> tuple[float, ...]:
    """Losses of documents that are lower than BASE by `lower` nats a token."""
    return tuple((BASE - 100 * lower + DRAW.normal(0, noise, N)).tolist())


def record(path: Path, trials: Sequence[ShortRun], *, steps: int = 9, last: bool = True) -> Record:
    one = Record(path, {"seed": 0})
    one.begin()
    one.add_base(
        Units(DOCUMENTS, BASE, units(0).tokens, N, N),
        Units(DOCUMENTS, BASE, units(0).tokens, N, N),
        {"step": 1.0, "evaluation": 1.0, "verdict": 1.0},
    )
    one.add_round(Round(1, steps, (DEFAULT, A, B), last))
    for trial in trials:
        one.add_trial(trial)
    return one


def found(one: Record) -> Outcome:
    outcome = outcome_of(one, units(0), units(1), default=DEFAULT)
    assert outcome is not None
    return outcome


def test_the_choosing_half_chooses_and_the_other_half_measures(tmp_path: Path) -> None:
    trials = [
        ShortRun(DEFAULT, 1, 9, 1.0, nats(0.3), nats(0.31)),
        ShortRun(A, 1, 9, 1.0, nats(0.5), nats(0.4)),
        ShortRun(B, 1, 9, 1.0, nats(0.4), nats(0.6)),
    ]
    outcome = found(record(tmp_path / "trials.jsonl", trials))
    assert (outcome.choice, outcome.measured_on, outcome.complete) == (A, "verdict", True)
    assert outcome.against_default is not None
    assert outcome.against_second is not None
    assert outcome.against_default.lower_by == pytest.approx(0.09, abs=0.01)
    assert outcome.against_second.lower_by == pytest.approx(-0.2, abs=0.01)
    tokens = units(0).tokens
    before, after = (np.array(trials[number].verdict) for number in (0, 1))
    expected = difference(Units(DOCUMENTS, before, tokens, N, N), Units(DOCUMENTS, after, tokens, N, N))
    assert outcome.against_default.interval == expected
    assert outcome.beats_default
    assert outcome.against_default.probability == pytest.approx(1.0)
    assert outcome.against_second.probability == pytest.approx(0.0)


def test_a_cell_that_is_not_clearly_better_than_the_defaults_is_said_to_be_none(tmp_path: Path) -> None:
    noisy = [
        ShortRun(DEFAULT, 1, 9, 1.0, nats(0.3), nats(0.3, 40.0)),
        ShortRun(A, 1, 9, 1.0, nats(0.31), nats(0.31, 40.0)),
    ]
    outcome = found(record(tmp_path / "trials.jsonl", noisy))
    assert outcome.choice == A
    assert not outcome.beats_default
    assert "No cell is clearly better than the default settings: they may be kept." in outcome.sentences()
    assert outcome.against_default is not None
    assert outcome.against_default.probability is not None
    assert 0.05 < outcome.against_default.probability < 0.95


def test_the_defaults_can_be_the_best(tmp_path: Path) -> None:
    trials = [ShortRun(DEFAULT, 1, 9, 1.0, nats(0.5), nats(0.5)), ShortRun(A, 1, 9, 1.0, nats(0.2), nats(0.2))]
    outcome = found(record(tmp_path / "trials.jsonl", trials))
    assert (outcome.choice, outcome.against_default, outcome.beats_default) == (DEFAULT, None, False)
    assert "The default settings are the best of the cells." in outcome.sentences()


def test_without_a_last_round_the_text_that_chose_measures_and_that_is_said(tmp_path: Path) -> None:
    trials = [ShortRun(DEFAULT, 1, 9, 1.0, nats(0.3)), ShortRun(A, 1, 9, 1.0, nats(0.5)), ShortRun(B, 1, 9, 1.0, None)]
    outcome = found(record(tmp_path / "trials.jsonl", trials, last=False))
    assert (outcome.choice, outcome.measured_on, outcome.complete) == (A, "choosing", False)
    assert any("text that chose the cell" in sentence for sentence in outcome.sentences())


def test_a_record_is_read_back_without_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    trials = [ShortRun(DEFAULT, 1, 9, 1.0, nats(0.3), nats(0.3)), ShortRun(B, 1, 9, 1.0, None)]
    written = record(path, trials)
    with path.open("ab") as file:
        file.write(b'{"kind": "trial", "cell": {"lr": 0.0')
    again = read(path, {"seed": 0})
    assert (again.trials, again.rounds, again.base) == (written.trials, written.rounds, written.base)
    assert again.spent == pytest.approx(written.spent)
    assert again.spent > 0


def test_a_search_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    record(tmp_path / "trials.jsonl", [])
    with pytest.raises(CheckpointError, match="other settings: seed"):
        read(tmp_path / "trials.jsonl", {"seed": 1})
