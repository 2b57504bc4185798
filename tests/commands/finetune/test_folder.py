"""The run folder: after a kill, a signal or an error at any time the documented commands resume; no files are left."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo.commands.finetune as package
from octavo.commands.finetune import measure
from octavo.commands.scores import ScoreTable
from octavo.config import Config
from octavo.errors import CheckpointError, TrainingError, UsageError
from octavo.metrics import Score
from octavo.reporting import Report, read_events
from octavo.runs import checkpoint
from octavo.runs import folder as folders
from octavo.runs.folder import RunFolder
from octavo.store import files
from octavo.train import loop

Octavo = Callable[..., Any]
Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]

SHORT: dict[str, Any] = {"steps": 4, "checkpoint_every": 2, "eval_every": 1, "eval_rows": 2, "sample_tokens": 1}


def tree(folder: Path) -> dict[str, bytes]:
    """The contents of the files that do not depend on time, and the names of all files."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {
        str(path.relative_to(folder)): b"" if path.name in ("metrics.jsonl", "report.html") else path.read_bytes()
        for path in kept
    }


def recorded(folder: Path) -> list[tuple[str, Any]]:
    """The recorded events, without messages and the memory of each call."""
    events = read_events(folder / "metrics.jsonl")[0]
    return [(event["event"], event.get("step")) for event in events if event["event"] not in ("say", "warn", "memory")]


def warnings(folder: Path) -> str:
    return "\n".join(event["text"] for event in read_events(folder / "metrics.jsonl")[0] if event["event"] == "warn")


class Died(BaseException):
    """Simulates kill -9: only `finally` blocks clean up."""


@contextmanager
def dying(function: str) -> Iterator[None]:
    """Kills a run at its call of a function of octavo.commands.finetune."""

    def die(*_: object, **__: object) -> None:
        raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, function, die)
        with pytest.raises(Died):
            yield


@pytest.fixture(scope="module")
def uninterrupted(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, in a folder with the same name as the others."""
    out = tmp_path_factory.mktemp("whole") / "run"
    tune(out, **SHORT)
    return out


def same(folder: Path, uninterrupted: Path) -> None:
    assert recorded(folder) == recorded(uninterrupted)
    expected, actual = tree(uninterrupted), tree(folder)
    assert actual.keys() == expected.keys()
    for name in ("adapter/adapter_model.safetensors", "adapter/octavo.json", "ledger.json"):
        assert actual[name] == expected[name], name


BEFORE_A_STEP = ("prepare", "choose_precision", "dry_run", "write_settings", "measure_base")


# Whether the same call starts anew or resumes depends only on the files in the folder, as the first and last case show.
SAME_CALL = [
    pytest.param(function, "the same call", marks=[pytest.mark.exhaustive] if function in BEFORE_A_STEP[1:-1] else [])
    for function in BEFORE_A_STEP
]


@pytest.mark.parametrize(
    ("function", "again"), [*((function, "resume alone") for function in BEFORE_A_STEP), *SAME_CALL]
)
def test_a_kill_before_the_first_checkpoint(
    function: str, again: str, octavo: Octavo, settings: Settings, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (file := tmp_path / "settings.yaml").write_text(settings(out, **SHORT).to_yaml())
    for _ in range(2):  # and once more when it goes on
        with dying(function):
            package.finetune(settings(out, **SHORT), console=False)
    command = ["finetune", "--resume", "--out", out] if again == "resume alone" else ["finetune", "--config", file]
    assert octavo(*command).code == 0
    same(out, uninterrupted)


@pytest.mark.parametrize("function", ["measure_tuned", "show_scores", "read_back"])
def test_a_kill_after_the_last_step_records_nothing_twice(
    function: str, tune: Tune, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with dying(function):
        tune(out, **SHORT)
    for _ in range(2):  # a finished run is finished once more
        tune(out, **SHORT, resume=True)
        same(out, uninterrupted)


def test_an_error_before_the_run_starts_restores_the_folder(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    for out in (tmp_path / "run", tmp_path / "mine"):
        with pytest.raises(UsageError):
            tune(out, data=[str(tmp_path / "nowhere")])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_at_once(
    number: signal.Signals, octavo: Octavo, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "settings.yaml").write_text(settings(tmp_path / "run", **SHORT).to_yaml())
    with monkeypatch.context() as patch:
        patch.setattr(package, "dry_run", lambda _: signal.raise_signal(number))
        done = octavo("finetune", "--config", file)
    assert done.code == 128 + number
    assert "octavo: Stopped." in done.err
    assert "Traceback" not in done.err
    assert octavo("finetune", "--config", file).code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_during_the_save_of_the_first(
    number: signal.Signals,
    octavo: Octavo,
    settings: Settings,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It interrupts the save: the exit code is an error, and the earlier checkpoint is complete."""
    out = tmp_path / "run"
    (file := tmp_path / "settings.yaml").write_text(settings(out, **SHORT, keep="last").to_yaml())
    event, read_back = Report.event, checkpoint._read_back

    def interrupted(self: Report, name: str, /, **fields: object) -> None:
        event(self, name, **fields)
        if name == "step" and fields["step"] == 3:
            signal.raise_signal(number)
            monkeypatch.setattr(checkpoint, "_read_back", lambda *_: signal.raise_signal(number))

    with monkeypatch.context() as patch:
        patch.setattr(Report, "event", interrupted)
        done = octavo("finetune", "--config", file)
    monkeypatch.setattr(checkpoint, "_read_back", read_back)
    assert done.code == 128 + number
    assert "Stopped. The newest checkpoint is of step 2. Resume with: octavo finetune --resume --out" in done.err
    assert [path.name for path in (out / "checkpoints").glob("*0*")] == ["step-00000002"]
    assert octavo("finetune", "--resume", "--out", out).code == 0
    assert recorded(out) == recorded(uninterrupted)


def test_the_folder_is_checked_again_under_the_lock(
    tune: Tune, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call waits for the lock while another one trains to its end."""
    out, lock = tmp_path / "run", files.lock

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        shutil.copytree(uninterrupted, folder)
        with lock(folder):
            yield

    monkeypatch.setattr(folders, "lock", late)
    with pytest.raises(UsageError, match="already contains a run"):
        tune(out, **SHORT)
    assert tree(out) == tree(uninterrupted)


def test_files_of_killed_writers_in_the_run_folder_are_removed(tune: Tune, uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, out := tmp_path / "run")
    pid = os.getpid()
    for name in (f".tmp-adapter-{pid}", f".old-adapter-{pid}", f"checkpoints/.tmp-step-00000004-{pid}"):
        (out / name).mkdir()
    for name in (f".config.yaml.{pid}", f".ledger.json.{pid}", f".report.html.{pid}", f"checkpoints/.latest.{pid}"):
        (out / name).touch()
    tune(out, **SHORT, resume=True)
    assert tree(out).keys() == tree(uninterrupted).keys()
    assert not list(out.rglob(f"*{pid}"))


def damage(folder: Path, how: str) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    if how == "gone":
        shutil.rmtree(folder / "adapter")
    elif how == "a bit":
        tensors = load_file(file)
        name, tensor = next(iter(tensors.items()))
        save_file({**tensors, name: tensor.view(torch.int32).bitwise_xor_(1).view(torch.float32)}, file)
    elif how == "cut":
        os.truncate(file, 100)
    elif how == "another step":
        path = folder / "adapter" / "octavo.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "step": 99}))


@contextmanager
def worse_and_worse(steps: int) -> Iterator[None]:
    """Held-out losses of 1, 2, 3 .. at the steps make the first adapter the best."""
    losses = iter(range(1, steps + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "score_rows", lambda *_, **__: Score(nats=float(next(losses)), tokens=1, n_bytes=1))
        patch.setattr(package, "measure_base", lambda *_, **__: None)
        patch.setattr(package, "measure_tuned", lambda _: ScoreTable())
        yield


@pytest.fixture(scope="module")
def best_is_first(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Path]:
    """(The files of a run whose best adapter is that of step 1, the same run stopped after step 3)."""
    folder = tmp_path_factory.mktemp("best")
    with worse_and_worse(4):
        tune(folder / "whole" / "run", **SHORT)
    with worse_and_worse(3):
        assert tune(folder / "stopped" / "run", **SHORT, stop_after=3)["best_step"] == 1
    return tree(folder / "whole" / "run"), folder / "stopped" / "run"


@pytest.mark.parametrize("how", ["gone", "a bit", "cut", "another step"])
def test_a_damaged_best_adapter_is_restored_from_the_checkpoint(
    how: str, tune: Tune, best_is_first: tuple[dict[str, bytes], Path], tmp_path: Path
) -> None:
    """The best one is of an earlier step than the checkpoint."""
    expected, stopped = best_is_first
    shutil.copytree(stopped, tmp_path / "run")
    damage(tmp_path / "run", how)
    with worse_and_worse(4):
        assert tune(tmp_path / "run", **SHORT, resume=True)["best_step"] == 1
    assert "does not contain the best adapter" in warnings(tmp_path / "run")
    actual = tree(tmp_path / "run")
    assert actual["adapter/adapter_model.safetensors"] == expected["adapter/adapter_model.safetensors"]
    assert json.loads(actual["adapter/octavo.json"])["step"] == 1


def after_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    event = Report.event

    def acting(self: Report, name: str, /, **fields: object) -> None:
        event(self, name, **fields)
        if name == "step" and fields["step"] == number:
            act()

    monkeypatch.setattr(Report, "event", acting)


@pytest.mark.parametrize(
    "lost", ["metrics.jsonl", "run.json", "config.yaml", "ledger.json", "adapter", "checkpoints", "."]
)
def test_files_deleted_during_training_are_written_again(
    lost: str, tune: Tune, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def delete() -> None:
        path = out / lost
        path.unlink() if path.is_file() else shutil.rmtree(path)

    after_step(monkeypatch, 3, delete)
    tune(out, **SHORT)
    assert recorded(out) == recorded(uninterrupted)
    for name in (
        "metrics.jsonl",
        "run.json",
        "config.yaml",
        "ledger.json",
        "report.html",
        "adapter/adapter_config.json",
    ):
        assert (out / name).is_file(), name
    assert RunFolder(out).steps()[-1] == 4
    if lost not in ("adapter", "checkpoints"):
        assert "written again" in warnings(out)


def test_a_link_to_another_disk_in_place_of_the_adapter(tune: Tune, uninterrupted: Path, tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    tune(tmp_path / "run", **SHORT, stop_after=1)
    (tmp_path / "run" / "adapter").rename(disk / "adapter")
    (tmp_path / "run" / "adapter").symlink_to(disk / "adapter")
    tune(tmp_path / "run", **SHORT, resume=True)
    assert (tmp_path / "run" / "adapter").is_symlink()
    name = "adapter_model.safetensors"
    assert (disk / "adapter" / name).read_bytes() == (uninterrupted / "adapter" / name).read_bytes()
    assert [path.name for path in disk.iterdir()] == ["adapter"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tune: Tune, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted", "step-00000001")

    monkeypatch.setattr(checkpoint, "_delete_earlier", refuse)
    tune(tmp_path / "run", **SHORT)
    assert "cannot be deleted" in warnings(tmp_path / "run")
    assert recorded(tmp_path / "run") == recorded(uninterrupted)


def test_changed_training_settings_are_reported_with_the_new_schedule(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tune(out, **SHORT, stop_after=2)
    tune(out, **SHORT, resume=True, stop_after=1)
    assert "training settings" not in warnings(out)
    tune(out, **{**SHORT, "steps": 6}, lr=0.01, schedule="linear", resume=True)
    assert "--steps 4 is now 6" in warnings(out)
    assert "--lr 0.03 is now 0.01" in warnings(out)
    assert "--schedule cosine is now linear" in warnings(out)
    rates = [event["learning_rate"] for event in read_events(out / "metrics.jsonl")[0] if event["event"] == "step"]
    assert f"steps 4 to 6 have learning rates from {rates[3]:.3g} to {rates[5]:.3g} (linear)" in warnings(out)


@pytest.mark.parametrize(("first", "then"), [("adamw8bit", "adamw"), ("adamw", "adamw8bit")])
def test_the_state_of_another_optimizer_is_an_error_and_changes_nothing(
    first: str, then: str, tune: Tune, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    values = {**SHORT, "rank": 8, "eval_every": 0}
    tune(out, **values, optimizer=first, stop_after=2)
    before = tree(out)
    with pytest.raises(CheckpointError, match="optimizer's state"):
        tune(out, **values, optimizer=then, resume=True, force=True)
    assert tree(out) == before
    tune(out, **values, optimizer=first, resume=True)


def test_resume_without_a_run_is_an_error_that_names_the_folder(octavo: Octavo, tmp_path: Path) -> None:
    done = octavo("finetune", "--resume", "--out", tmp_path / "nothing")
    assert done.code == 2
    assert "contains no run to resume" in done.err
    assert not (tmp_path / "nothing").exists()


def test_lost_metrics_are_reported(tune: Tune, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tune(out, **SHORT, stop_after=2)
    (out / "metrics.jsonl").unlink()
    tune(out, **SHORT, resume=True)
    assert "lacks 2 of the steps 1 to 2" in warnings(out)


def test_steps_without_a_target_have_no_loss(tune: Tune, tmp_path: Path) -> None:
    """Prompts that fill their rows, so that --truncate removes all answers; and one record that fits."""
    long, short = {"prompt": "the king " * 30, "completion": "yes"}, {"prompt": "the", "completion": " king and queen"}
    (data := tmp_path / "d.jsonl").write_text("\n".join(json.dumps(one) for one in (*[long] * 11, short)))
    answer = tune(
        tmp_path / "run", data=[str(data)], test_data=[], test_fraction=0.0, truncate=True, batch_size=1, steps=12,
        schedule="constant", checkpoint_every=0,
    )  # fmt: skip
    steps = [event for event in read_events(tmp_path / "run" / "metrics.jsonl")[0] if event["event"] == "step"]
    assert {event["loss"] is None for event in steps if event["trained_tokens"] == 0} == {True}
    assert [event["loss"] > 1 for event in steps if event["trained_tokens"]] == [True]
    assert answer["train_loss"] is None or answer["train_loss"] > 1
    assert "had no token to train on" in warnings(tmp_path / "run")
    assert f"{11} steps had no token to train on" in warnings(tmp_path / "run")
    assert "training loss 0.000" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(("at", "advice"), [(1, "There is no checkpoint yet: "), (3, "is of step 2. Resume with")])
def test_the_error_for_a_loss_that_is_not_finite_names_the_newest_checkpoint(
    at: int, advice: str, tune: Tune, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = loop.accumulate_gradients

    def broken(trainer: Any, batch: Any, number: int, *, loss_scale: float) -> tuple[list[torch.Tensor], int]:
        losses, rows = accumulate(trainer, batch, number, loss_scale=loss_scale)
        return ([loss * math.nan for loss in losses] if number == at else losses), rows

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", broken)
        with pytest.raises(TrainingError, match=f"loss is nan at step {at}") as caught:
            tune(tmp_path / "run", **{**SHORT, "eval_every": 4})
    assert advice in caught.value.hint
    tune(tmp_path / "run", **{**SHORT, "eval_every": 4}, resume=True)
    assert recorded(tmp_path / "run")[-1] == recorded(uninterrupted)[-1]


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_file_name_that_is_not_utf8(octavo: Octavo, settings: Settings, plays: Path, tmp_path: Path) -> None:
    (data := tmp_path / "data").mkdir()
    name = os.fsencode(data) + b"/caf\xe9.txt"
    text = next((plays / "train").glob("*.txt")).read_bytes()
    Path(os.fsdecode(name)).write_bytes(text)
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    values = {**SHORT, "steps": 2, "data": [os.fsdecode(name)]}
    (file := tmp_path / "settings.yaml").write_text(settings(out, **values).to_yaml())
    done = octavo("finetune", "--config", file, "--stop-after", 1)
    assert (done.code, done.out) == (0, "")
    assert octavo("finetune", "--resume", "--out", out).code == 0
    assert json.loads((out / "ledger.json").read_bytes())["train"]["files"][0]["source"].endswith(r"caf\xe9.txt")
    assert Counter(kind for kind, _ in recorded(out))["step"] == 2
