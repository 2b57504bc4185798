"""`octavo tune` on a tiny model. The steps of the rounds are given: no verdict depends on the speed of the machine."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import WORDS

from octavo.commands.tune import search, trial
from octavo.commands.tune.record import Record, read
from octavo.commands.tune.rounds import Cell
from octavo.commands.tune.trial import OutOfTimeError, halves, share_of_text
from octavo.config import TrainOptions
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import CheckpointError

Octavo = Callable[..., Any]


@pytest.fixture
def arguments(tiny_llama: Path, tmp_path: Path) -> list[object]:
    for number in range(24):
        draw = random.Random(number)
        lines = [" ".join(draw.choice(WORDS) for _ in range(6)) for _ in range(3)]
        (folder := tmp_path / ("test" if number > 2 else "train")).mkdir(exist_ok=True)
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return [
        "tune", "--model", tiny_llama, "--data", tmp_path / "train", "--test-data", tmp_path / "test", "--seq-len", 48,
        "--dtype", "float32", "--scheme", "none", "--minutes", 500, "--out", tmp_path / "out", "--steps", 6,
        "--lr", "1e-3,1e-2,3e-2", "--rank", "2,4", "--json",
    ]  # fmt: skip


@pytest.fixture
def given_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "steps_of_first_rounds", lambda seconds, trials, finals, costs, *, most: 3)
    monkeypatch.setattr(search, "steps_of_last_round", lambda seconds, finals, costs, *, most: 5)


@pytest.mark.usefixtures("given_steps")
def test_a_search_narrows_the_grid_and_its_command_is_one_of_finetune(
    octavo: Octavo, arguments: list[object], tmp_path: Path
) -> None:
    done = octavo(*arguments, "--report", tmp_path / "tune.html")
    assert done.code == 0, done.err
    result = done.json
    steps = sorted([trial["steps"] for trial in cell["trials"]] for cell in result["cells"])
    # Three learning rates and the default settings, the other rank; the best rate again, perhaps with that rank.
    assert len(steps) == 5 or (len(steps) == 6 and [5] in steps)
    assert steps.count([3, 5]) >= 2
    assert [5] not in steps or len(steps) == 6
    assert {(cell["lr"], cell["rank"]) for cell in result["cells"] if cell["lr"] == 2e-4} == {(2e-4, 16)}
    assert result["choice"]["lr"] in (1e-2, 3e-2)
    assert (result["complete"], result["measured_on"], result["beats_default"]) == (True, "verdict", True)
    assert result["against_base"]["lower_by"] > result["against_default"]["lower_by"] > 0
    assert str(result["choice"]["rank"]) in (tmp_path / "tune.html").read_text()
    words = shlex.split(result["command"])
    words = words[words.index("finetune") :]
    assert words[words.index("--lr") + 1] == f"{result['choice']['lr']}"
    trained = octavo(*words, "--out", tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["steps"] == 6


def test_too_little_time_ends_with_the_minutes_that_are_needed_and_loses_nothing(
    octavo: Octavo, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any machine loading takes more than 0.006 s."""
    few = ["0.0001" if word == 500 else word for word in arguments if word != "--json"]
    done = octavo(*few)
    assert done.code == 3, done.err
    assert "The first trial needs about " in done.err
    assert "--minutes 0.0001 is too short for any trial to be finished" in done.err
    [line] = [line for line in done.err.splitlines() if "tune --resume --out" in line]
    words = shlex.split(line.partition("Go on with: ")[2])
    words = words[words.index("tune") :]
    assert int(words[words.index("--minutes") + 1]) >= 1
    monkeypatch.setattr(search, "steps_of_first_rounds", lambda seconds, trials, finals, costs, *, most: 3)
    monkeypatch.setattr(search, "steps_of_last_round", lambda seconds, finals, costs, *, most: 5)
    words[words.index("--minutes") + 1] = "500"  # the machine may be slower now
    resumed = octavo(*words, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["complete"]


def test_a_search_whose_first_trial_takes_too_long_says_what_it_needs(
    octavo: Octavo, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> None:
        raise OutOfTimeError

    monkeypatch.setattr(search, "_tried", late)
    done = octavo(*arguments)
    assert done.code == 3, done.err
    assert json.loads(done.out)["error"]["type"] == "TimeLimitError"
    assert "--minutes" in json.loads(done.out)["error"]["hint"]


@pytest.mark.exhaustive
@pytest.mark.usefixtures("given_steps")
def test_a_search_that_was_stopped_goes_on_to_the_same_result(
    octavo: Octavo, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = octavo(*arguments).json
    again = [tmp_path / "again" if word == tmp_path / "out" else word for word in arguments]
    tried = search._tried
    done: list[Any] = []

    def stop_in_the_fifth(*values: Any) -> Any:
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(values)
        return tried(*values)

    with monkeypatch.context() as patch:
        patch.setattr(search, "_tried", stop_in_the_fifth)
        stopped = octavo(*again)
    assert stopped.code == 128 + signal.SIGTERM
    assert "tune --resume --out" in stopped.err
    lines = (tmp_path / "again" / "trials.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "trial" for line in lines) == 4
    resumed = octavo("tune", "--resume", "--out", tmp_path / "again", "--json")
    assert resumed.code == 0, resumed.err
    for key in ("choice", "against_default", "against_second", "against_base", "cells"):
        assert resumed.json[key] == whole[key]


@pytest.mark.parametrize(("count", "share", "kept"), [(100, 0.25, 25), (100, 0.001, 4), (3, 0.5, 3), (100, 1.0, 100)])
def test_a_trial_has_its_share_of_the_text(count: int, share: float, kept: int) -> None:
    rows: Any = list(range(count))
    options = TrainOptions(batch_size=4, seed=7)
    chosen: Any = share_of_text(rows, share, options)
    assert len(chosen) == kept
    assert chosen == sorted(set(chosen))
    assert chosen == share_of_text(rows, share, options)
    more: Any = share_of_text(rows, min(1.0, 2 * share), options)
    assert set(chosen) <= set(more)


@pytest.mark.usefixtures("given_steps")
def test_trials_have_the_share_of_the_text_that_their_steps_are(
    octavo: Octavo, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        (tmp_path / "train" / f"more{number}.txt").write_text(" ".join(WORDS[number : number + 20]))
    shares = []
    of_prepared = trial.prepared

    def seen(base: Any, *values: Any, **options: Any) -> Any:
        run = of_prepared(base, *values, **options)
        shares.append((len(run.train.rows) / len(base.train.rows), run.total / base.total))
        return run

    monkeypatch.setattr(search, "prepared", seen)
    done = octavo(*arguments, "--batch-size", 1)
    assert done.code == 0, done.err
    assert {steps for _, steps in shares} >= {3 / 6, 5 / 6}
    assert all(steps <= rows < steps + 0.2 for rows, steps in shares)


def test_a_run_does_not_take_the_folder_of_a_search(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trials.jsonl").write_text("{}\n")
    done = octavo("finetune", "--model", tiny_llama, "--data", tmp_path, "--out", tmp_path / "out")
    assert (done.code, "a search of `octavo tune`" in done.err) == (2, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trials.jsonl"]


BASE = {
    "kind": "base",
    "choosing": [1.0, 2.0],
    "verdict": [3.0],
    "costs": {"step": 1.0, "evaluation": 1.0, "verdict": 1.0},
}
CELL = {"lr": 1e-3, "rank": 4}
TRIAL = {"kind": "trial", "cell": CELL, "round": 1, "steps": 3, "seconds": 1.0, "nats": [1.0, float("nan")]}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    Record(path, {"steps": 6}).begin()
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def test_a_record_is_read_as_it_was_written_losses_that_are_not_finite_too(tmp_path: Path) -> None:
    found = read(written(tmp_path / "a", BASE, TRIAL, {"kind": "time", "seconds": -5}), {"steps": 6})
    assert found.base == ((1.0, 2.0), (3.0,))
    assert found.trials[0].cell == Cell(1e-3, 4)
    assert found.trials[0].nats is not None
    assert math.isnan(found.trials[0].nats[1])
    assert found.spent == 0


@pytest.mark.parametrize(
    "line",
    [
        {**TRIAL, "nats": ["x", "y"]},
        {**TRIAL, "nats": [1.0]},
        {**TRIAL, "steps": "x"},
        {"kind": "round", "number": 1, "steps": "x", "cells": [CELL], "last": False},
        {**BASE, "costs": {"a": 1}},
    ],
)
def test_a_damaged_record_is_an_error(tmp_path: Path, line: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="line 3 is not what octavo writes"):
        read(written(tmp_path / "a", BASE, line), {"steps": 6})


def test_a_record_of_another_search_or_of_none_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="other settings: steps"):
        read(written(tmp_path / "a", BASE), {"steps": 7})
    (tmp_path / "b").write_text(json.dumps(BASE) + "\n")
    with pytest.raises(CheckpointError, match="its first line is missing"):
        read(tmp_path / "b", {"steps": 6})
    (tmp_path / "c").write_text('{"kind": "search", "for')
    assert not read(tmp_path / "c", {"steps": 6}).begun


def test_an_existing_search_is_not_overwritten(octavo: Octavo, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trials.jsonl").write_text("{}\n")
    done = octavo("tune", "--data", tmp_path, "--out", tmp_path / "out")
    assert (done.code, "Add --resume" in done.err) == (2, True)
    done = octavo("tune", "--resume", "--out", tmp_path / "none")
    assert (done.code, "no search to go on with" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [("--rank", "2.5", "no positive integer"), ("--lr", "0", "no learning rate"), ("--lr", "x", "must be numbers")],
)
def test_a_bad_grid_is_refused(octavo: Octavo, tmp_path: Path, option: str, value: str, text: str) -> None:
    done = octavo("tune", "--data", tmp_path, "--out", tmp_path / "out", option, value)
    assert (done.code, text in done.err) == (2, True), done.err


def row(documents: list[int]) -> Row:
    """Three tokens of each document."""
    count = 3 * len(documents)
    ids = np.arange(count, dtype=np.int32)
    piece = np.repeat(np.arange(len(documents), dtype=np.int32), 3)
    return Row(ids, ids + 1, ids % 3, piece, ("x:1",) * len(documents), tuple(documents))


def test_no_label_is_in_both_halves_and_none_is_lost() -> None:
    rows = [row([number, number + 1]) for number in range(0, 40, 2)]  # 40 documents
    both = halves(rows)
    counts = [sum(int((one.labels != IGNORE_INDEX).sum()) for one in half) for half in (both.choosing, both.verdict)]
    assert counts == [60, 60]
    documents = [
        {one.documents[piece] for one in half for piece in one.piece[one.labels != IGNORE_INDEX]}
        for half in (both.choosing, both.verdict)
    ]
    assert not documents[0] & documents[1]
    assert documents[0] | documents[1] == set(range(40))


def test_a_few_documents_are_halved_by_rows() -> None:
    rows = [row([0]) for _ in range(5)]
    both = halves(rows)
    assert (both.choosing, both.verdict) == (rows[:3], rows[3:])


def test_whole_runs_of_the_first_round_are_not_repeated(
    octavo: Octavo, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        search, "steps_of_first_rounds", lambda seconds, trials, finals, costs, *, most: most if finals else most - 1
    )
    done = octavo(*arguments)
    assert done.code == 0, done.err
    steps = [[trial["steps"] for trial in cell["trials"]] for cell in done.json["cells"]]
    # Three learning rates at a rank, the default settings, then the best rate at the other rank: each once.
    assert steps == [[6]] * 5
    assert (done.json["complete"], done.json["measured_on"]) == (True, "verdict")
    assert "less than 25%" not in done.err
