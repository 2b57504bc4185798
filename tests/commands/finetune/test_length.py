"""The length of a run by the size of its data, and how often it is evaluated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.commands.finetune.length import (
    EVALUATIONS,
    MAX_PASSES,
    MIN_STEPS,
    evaluation_interval,
    sensible_length,
)
from octavo.commands.scores import score_rows
from octavo.config import Config

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "size"),
    [(1, 4, 8, 1), (3, 4, 8, 1), (11, 4, 6, 1), (30, 4, 3, 1), (40, 4, 4, 2), (64, 4, 4, 4), (100, 4, 3, 4),
     (256, 4, 1, 4), (9999, 4, 1, 4), (40, 1, 2, 1), (40, 32, 4, 2)],
)  # fmt: skip
def test_small_data_get_more_passes_and_smaller_batches(rows: int, batch: int, epochs: int, size: int) -> None:
    length = sensible_length(rows, batch, fixed_batch=False)
    assert (length.epochs, length.batch_size) == (epochs, size)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_run_has_enough_steps_unless_its_passes_are_at_the_limit(fixed: bool) -> None:
    for rows in range(1, 600):
        length = sensible_length(rows, 4, fixed_batch=fixed)
        assert 1 <= length.epochs <= MAX_PASSES
        assert length.steps(rows) >= MIN_STEPS or length.epochs == MAX_PASSES
        assert length.steps(rows) == length.epochs * math.ceil(rows / length.batch_size)
        assert length.batch_size == 4 or not fixed


def test_the_chosen_length_is_said_saved_and_kept_when_the_run_is_resumed(tune: Tune, tmp_path: Path) -> None:
    length = {"steps": None, "batch_size": 4, "seq_len": 64, "eval_rows": 1}
    tune(tmp_path / "run", **length, stop_after=1)
    rows = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]["rows"]
    epochs = sensible_length(rows, 4, fixed_batch=True).epochs
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == epochs > 1
    result = tune(tmp_path / "run", **length, epochs=epochs, resume=True)
    assert result["steps"] == epochs * math.ceil(rows / 4)
    said = [event["text"] for event in events(tmp_path / "run", "say")]
    assert sum(text.startswith(f"Chosen: --epochs {epochs} (") for text in said) == 1, "once, not again on resuming"


@pytest.mark.parametrize(
    ("total", "held_out", "expected"), [(6, 1, 6), (8, 1, 4), (64, 10, 13), (64, 200, 64), (64, 64, 32), (3, 1, 3)]
)
def test_evaluations_take_at_most_a_quarter_of_the_time_of_training(
    settings: Settings, total: int, held_out: int, expected: int
) -> None:
    """In units of training on a row, half of which a forward pass takes; one evaluation there always is."""
    every = evaluation_interval(settings(Path("run"), eval_every=0), total, train_rows=99, held_out_rows=held_out)
    count = math.ceil(total / every)
    assert every == expected
    assert count == 1 or count * held_out * 0.5 <= 0.25 * total * 4
    assert count <= EVALUATIONS


def test_the_kept_adapter_is_evaluated_once(tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second call, which has no score of it, measures the same numbers."""
    labels: list[str] = []

    def labelled(*arguments: Any, label: str, **options: Any) -> Any:
        labels.append(label)
        return score_rows(*arguments, label=label, **options)

    monkeypatch.setattr("octavo.commands.finetune.measure.score_rows", labelled)
    for keep in ("best", "last"):
        labels.clear()
        first = tune(tmp_path / keep, keep=keep, steps=4, eval_every=2)
        assert labels == ["Evaluating the quantized base", *(f"Held-out loss after step {step}" for step in (2, 4))]
        labels.clear()
        again = tune(tmp_path / keep, keep=keep, steps=4, eval_every=2, resume=True)
        assert labels == ["Evaluating the tuned model"]
        assert again["rows"] == first["rows"]
        assert again["differences"] == first["differences"]


def test_the_score_of_a_step_is_not_that_of_another_adapter(tune: Tune, tmp_path: Path) -> None:
    """The first of two evaluations is the best: the table has its loss, not that of the last step."""
    (held_out := tmp_path / "held_out.txt").write_text("0123456789 ZYXWVU " * 9)
    result = tune(tmp_path / "run", test_data=[str(held_out)], eval_every=1, steps=4)
    losses = {event["step"]: event["loss"] for event in events(tmp_path / "run", "heldout")}
    assert result["best_step"] != 4, "otherwise the test is not meaningful"
    assert result["rows"][-1]["loss"] == losses[result["best_step"]]
