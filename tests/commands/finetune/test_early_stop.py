"""--early-stop: when it ends a run, what it keeps, and how such a run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.commands.finetune.early_stop import PATIENCE, Watch, watched
from octavo.commands.finetune.unit_losses import next_of_curve, start_of_curve
from octavo.errors import UsageError
from octavo.intervals import DOCUMENTS, Units
from octavo.runs.events import HeldOut
from octavo.runs.loss_unit import LossUnit

Tune = Callable[..., dict[str, Any]]
N, TOKENS = 40, 100
# Training on the plays raises the loss on this text soon.
OTHER = "0123456789 ZYXWVU " * 9
RISING = {"steps": 16, "eval_every": 2, "seq_len": 12, "early_stop": True}


def stops(losses: list[float], noise: float) -> tuple[int | None, str]:
    """(the evaluation after which a run with these mean losses stops, why); the first one is before training."""
    draw = np.random.default_rng(0)
    level = draw.uniform(2, 6, N)
    tokens = np.full(N, TOKENS, dtype=np.int64)

    def units(loss: float) -> Units:
        return Units(DOCUMENTS, TOKENS * (level + loss + draw.normal(0, noise, N)), tokens, N, N)

    first = units(losses[0])
    curve, watch = start_of_curve(first), Watch.begin(first)
    for number, loss in enumerate(losses[1:], 1):
        now = units(loss)
        event, curve = next_of_curve(HeldOut(number, loss, math.exp(loss)), curve, now)
        watch, reason = watched(watch, event, now, LossUnit(0.5, "bits per byte"))
        if reason:
            return number, reason
    return None, ""


def test_a_run_whose_loss_falls_goes_on_also_if_each_fall_is_too_small_to_show() -> None:
    assert stops([-0.5 * number for number in range(12)], noise=0.1) == (None, "")
    slow = [-0.02 * number for number in range(30)]  # the interval of one fall is +- 0.03, of two falls as wide
    assert stops(slow, noise=0.05)[0] is None


def test_a_run_whose_loss_is_flat_stops_after_two_evaluations_in_a_row() -> None:
    number, reason = stops([0.0, -1.0, *[-1.0] * 9], noise=0.01)
    assert number == 1 + PATIENCE
    assert "no fall since step 1, at 2 evaluations in a row" in reason


def test_a_run_whose_loss_clearly_rises_stops_at_once() -> None:
    number, reason = stops([0.0, -1.0, -2.0, -1.5, -1.0], noise=0.05)
    assert number == 3
    assert reason.endswith("bits per byte higher than at step 2")
    assert 0.24 < float(reason.split("loss is ")[1].split()[0]) < 0.26  # half of 0.5 nats per token


def test_the_state_survives_a_checkpoint() -> None:
    watch = Watch(torch.arange(3.0, dtype=torch.float64), step=4, waits=1, evaluations=5)
    again = Watch.read(watch.tensors())
    assert again is not None
    assert replace(again, reference=watch.reference) == watch
    assert torch.equal(again.reference, watch.reference)
    assert Watch.read({}) is None


def said(folder: Path, kind: str = "say") -> list[str]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["text"] for line in lines if line["event"] == kind]


@pytest.fixture
def held_out(tmp_path: Path) -> list[str]:
    (path := tmp_path / "held_out.txt").write_text(OTHER)
    return [str(path)]


def test_a_stopped_run_keeps_the_best_adapter_and_goes_on_only_when_asked(
    tune: Tune, held_out: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = tune(run, **RISING, test_data=held_out)
    steps = result["steps"]
    assert steps < 16
    assert result["adapter"] is not None
    assert result["best_step"] <= steps
    assert json.loads((run / "adapter" / "octavo.json").read_text())["step"] == result["best_step"]
    assert (run / "checkpoints" / f"step-{steps:08d}").is_dir()
    assert any(text.startswith(f"Stopped early after step {steps} of 16: ") for text in said(run))
    assert f"Stopped early after step {steps}: {result['stopped_early']}." in result["verdict"]["sentences"]
    again = tune(run, **RISING, test_data=held_out, resume=True)
    assert (again["steps"], again["rows"], again["stopped_early"]) == (steps, result["rows"], result["stopped_early"])
    assert any(f"complete: --early-stop ended it after step {steps}" in text for text in said(run))
    on = tune(run, **{**RISING, "early_stop": False}, test_data=held_out, resume=True)
    assert (on["steps"], on["stopped_early"]) == (16, None)


def test_a_run_that_was_interrupted_stops_at_the_same_step(tune: Tune, held_out: list[str], tmp_path: Path) -> None:
    whole = tune(tmp_path / "whole", **RISING, test_data=held_out)
    for number in range(1, 3):
        tune(tmp_path / "parts", **RISING, test_data=held_out, stop_after=1, resume=number > 1)
    parts = tune(tmp_path / "parts", **RISING, test_data=held_out, resume=True)
    for key in ("steps", "stopped_early", "best_step"):
        assert parts[key] == whole[key]
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"keep": "last"}, "--keep last"),
        ({"test_data": [], "test_fraction": 0}, "needs held-out text."),
        ({"seq_len": 128}, "10 documents or rows"),
    ],
)
def test_a_run_that_cannot_stop_early_is_refused(
    tune: Tune, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        tune(tmp_path / "run", early_stop=True, **changes)
