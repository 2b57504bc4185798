"""What a run learned, forgot and copies: in its result, its events and its report, also of a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Tune = Callable[..., dict[str, Any]]
NAMES = "learned", "forgot", "copies"
LONG = {"probes": True, "steps": 6, "eval_every": 3, "checkpoint_every": 3, "sample_tokens": 2}


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def without_time(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("time", "event")}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Training text and held-out text that says the same in another order of words."""
    folder = tmp_path_factory.mktemp("facts")
    names = [f"{first}{second}x" for first in "bdfgk" for second in "aeiou"]
    held_out = [f"to the king of the hall came the {name}" for name in names]
    for name, texts in (("train", [f"the {name} came to the hall" for name in names]), ("test", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"data": [str(folder / "train.jsonl")], "test_data": [str(folder / "test.jsonl")]}


@pytest.fixture(scope="module")
def probed(tune: Tune, facts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, JSON result) of a run with probes. Read-only."""
    out = tmp_path_factory.mktemp("probed") / "run"
    return out, tune(out, **facts, **LONG)


def test_the_result_and_the_events_have_all_three_measurements(probed: tuple[Path, dict[str, Any]]) -> None:
    out, result = probed
    for name in NAMES:
        assert result[name]["reason"] == ""
        assert result[name] == without_time(events(out, name)[-1])
        assert result[name]["rise"] == pytest.approx(result[name]["after"] - result[name]["before"])
        if name != "copies":  # of fewer than ten samples there is no interval
            assert result[name]["interval"]["low"] <= result[name]["rise"] <= result[name]["interval"]["high"]
    assert result["forgot"]["documents"] >= 40
    assert result["learned"]["probes"] >= 10
    starts = ("General text: ", "Verbatim copies: ")
    assert all(any(sentence.startswith(start) for sentence in result["verdict"]["sentences"]) for start in starts)
    assert "Learned, forgot, copied" in (out / "report.html").read_text()


def test_a_resumed_run_has_the_figures_of_an_uninterrupted_one(
    tune: Tune, facts: dict[str, Any], probed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    stopped = tmp_path / "run"
    assert tune(stopped, **facts, **LONG, stop_after=4)["learned"] is None
    resumed = tune(stopped, **facts, **LONG, resume=True)
    assert [resumed[name] for name in NAMES] == [probed[1][name] for name in NAMES]


def test_a_run_without_held_out_text_measures_what_it_can(tune: Tune, tmp_path: Path) -> None:
    result = tune(tmp_path / "run", **{**LONG, "test_data": [], "test_fraction": 0})
    assert result["rows"] == []
    assert result["learned"]["reason"] == "there is no held-out text"
    assert result["forgot"]["interval"] is not None
    assert result["copies"]["samples"] > 0
    assert any(sentence.startswith("General text: ") for sentence in result["verdict"]["sentences"])


def test_no_probes_measures_nothing(tune: Tune, tmp_path: Path) -> None:
    result = tune(tmp_path / "run", steps=1)
    assert [result[name] for name in NAMES] == [None, None, None]
    assert events(tmp_path / "run", "forgot") == []
