"""--track: each tracker gets every point of a run once, also of a run that was ended by an error and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tests.tracking import fakes
from tests.tracking.read_back import READERS

import octavo.commands.finetune as package
from octavo.config import Config
from octavo.errors import UsageError
from octavo.reporting import read_events
from octavo.runs import events
from octavo.tracking import TRACKERS
from octavo.tracking.points import Points

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]

SHORT: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "eval_every": 3, "eval_rows": 2, "keep": "last"}


def recorded(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> number of all points of the metrics file."""
    points = Points().of(events.read(folder / "metrics.jsonl"))
    return {(name, point.step): value for point in points for name, value in point.numbers.items()}


def fail_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next run end with an error after the events of `step`."""
    evaluate = package._evaluate_if_due

    def failing(run: Any, done: Any) -> bool:
        if done.number == step:
            raise OSError("the power is off")
        return evaluate(run, done)

    monkeypatch.setattr(package, "_evaluate_if_due", failing)


def interrupted(tune: Tune, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that ends with an error after step 5, whose newest checkpoint is that of step 4, and its continuation."""
    with monkeypatch.context() as patch:
        fail_after(5, patch)
        with pytest.raises(OSError, match="the power is off"):
            tune(out, **SHORT, **changes)
    tune(out, **SHORT, **changes, resume=True)


def comparable(values: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    """Without the verdict, which is no event, and the speed of step 5: it ran twice, and was sent the first time."""
    again = ("train/tokens_per_second", 5)
    return {key: value for key, value in values.items() if not key[0].startswith("verdict/") and key != again}


def messages(folder: Path, kind: str) -> str:
    return "\n".join(event["text"] for event in read_events(folder / "metrics.jsonl")[0] if event["event"] == kind)


@pytest.mark.parametrize("name", sorted(fakes.MODULES))
def test_a_resumed_run_continues_the_same_run_without_duplicates(
    name: str, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fakes.install(name, monkeypatch)
    interrupted(tune, tmp_path / "mine", monkeypatch, track=[name])
    (run,) = store.runs.values()
    keys = [(tag, step) for tag, step, _ in run.numbers]
    assert len(keys) == len(set(keys))
    got = {(tag, step): value for tag, step, value in run.numbers}
    assert comparable(got) == comparable(recorded(tmp_path / "mine"))
    assert ("verdict/gain_bits_per_byte", 6) in got
    assert run.settings["rank"] in (2, "2")
    assert run.settings["data"] == "train"  # the name alone
    assert {step for tag, step, _ in run.texts if tag == "sample/1"} == {0, 6}
    assert any(tag == "verdict" and "perplexity" in text for tag, _, text in run.texts)
    assert run.ended == [False, True]


def test_a_tracker_that_fails_does_not_end_training_and_gets_the_rest_at_resume(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, out = fakes.install("mlflow", monkeypatch), tmp_path / "mine"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    store.fails_after, store.error = 3, "no route to https://me:other-secret@host, hunter22"
    done = tune(out, **SHORT, track=["mlflow"])
    assert done["steps"] == 6
    warned = messages(out, "warn")
    assert warned.count("gets no data") <= 1
    assert "mlflow did not get" in warned
    assert "no route to" in warned
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"hunter22" not in everything
    assert b"other-secret" not in everything
    (run,) = store.runs.values()
    assert 0 < len(run.numbers) < len(recorded(out))
    store.fails_after = None
    tune(out, **SHORT, track=["mlflow"], resume=True)
    got = {(tag, step): value for tag, step, value in run.numbers}
    assert comparable(got) == comparable(recorded(out))
    assert len(store.runs) == 1


def test_a_tracker_added_at_resume_gets_the_earlier_points(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fakes.install("trackio", monkeypatch)
    tune(tmp_path / "mine", **SHORT, stop_after=3)
    assert not (tmp_path / "mine/trackers.json").exists()
    tune(tmp_path / "mine", **SHORT, resume=True, track=["trackio"])
    (run,) = store.runs.values()
    got = {(tag, step): value for tag, step, value in run.numbers}
    assert comparable(got) == comparable(recorded(tmp_path / "mine"))


def test_a_missing_library_is_an_error_before_anything_is_loaded(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.tracking.find_spec", lambda name: None)
    config = settings(tmp_path / "mine", track="wandb", data=["does-not-exist"])
    with pytest.raises(UsageError, match=r"wandb.*not installed") as caught:
        package.finetune(config, console=False)
    assert "pip install 'octavo[wandb]'" in caught.value.hint
    assert not (tmp_path / "mine").exists()


def test_a_tracker_that_cannot_start_is_an_error_before_training(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install("wandb", monkeypatch).start_error = "api_key not configured (no-tty)"
    with pytest.raises(UsageError, match=r"--track wandb could not start.*api_key not configured") as caught:
        tune(tmp_path / "mine", **SHORT, track=["wandb"])
    assert "wandb login" in caught.value.hint
    assert not events.only(events.read(tmp_path / "mine/metrics.jsonl"), events.Step)


def test_without_track_nothing_is_started_or_written(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.tracking.TRACKERS", {})
    tune(tmp_path / "mine", **{**SHORT, "steps": 1, "eval_every": 1})
    assert not (tmp_path / "mine/trackers.json").exists()


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of the libraries about each other
@pytest.mark.parametrize("name", [name for name, kind in TRACKERS.items() if find_spec(kind.module)])
def test_with_the_real_library(name: str, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are installed. What the library reads back is what the run recorded."""
    monkeypatch.chdir(tmp_path)
    for variable, value in {
        "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    out = tmp_path / "mine"
    interrupted(tune, out, monkeypatch, track=[name])
    state = json.loads((out / "trackers.json").read_text())[name]
    numbers, texts = READERS[name](out, state["id"])
    keys = [(tag, step) for tag, step, _ in numbers]
    assert len(keys) == len(set(keys))
    got = comparable({(tag, step): value for tag, step, value in numbers})
    expected = comparable(recorded(out))
    assert got.keys() == expected.keys()
    tolerance = 1e-7 if name == "tensorboard" else 0.0  # it stores float32
    assert got == pytest.approx(expected, rel=tolerance, abs=0)
    assert any("perplexity" in text for text in texts)
    assert any("the king" in text for text in texts)
