"""What `--adapter` can name: a folder, a run, a checkpoint of a run; and the errors for all else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from octavo.errors import AdapterError
from octavo.layers.lora import LoraSpec
from octavo.reporting import Report
from octavo.runs import checkpoint, checkpoint_folder
from octavo.runs.adapter import adapter_folder, read_adapter
from octavo.runs.checkpoint import Contents
from octavo.runs.events import Step
from octavo.runs.folder import RunFolder
from octavo.store import peft
from octavo.store.peft import Adapter
from octavo.system import quoted


def fill_with(step: int) -> Callable[[Path], None]:
    pair = torch.full((1, 3), float(step)), torch.full((4, 1), float(step)), 2.0
    adapter = Adapter(LoraSpec(1, 2.0), {"model.layers.0.q_proj": pair}, {}, {"step": step})
    return partial(
        peft.fill, adapter=adapter, modules=["model.layers.0.q_proj"], biases=False, base="base", readme="#\n"
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of the steps 40 and 120, and no adapter yet."""
    folder = RunFolder(tmp_path / "x")
    folder.path.mkdir()
    folder.begin("steps: 200\n")
    for step in (40, 120):
        checkpoint.save(folder.checkpoints, step, Contents({}, {}, {"adapter": fill_with(step)}))
    return folder


def finish(run: RunFolder, step: int) -> None:
    run.adapter.mkdir()
    fill_with(step)(run.adapter)


def found(path: Path, *said: str) -> int:
    """The step of the adapter that a path names. `said` are all messages."""
    messages: list[str] = []
    folder = adapter_folder(path, say=messages.append, warn=messages.append)
    assert len(messages) == len(said)
    for message, expected in zip(messages, said, strict=True):
        assert expected in message
    step: int = peft.read(folder).origin["step"]
    return step


def refused(path: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        adapter_folder(path, say=pytest.fail, warn=lambda _: None)
    return str(caught.value)


def test_a_folder_is_an_adapter_itself(run: RunFolder, tmp_path: Path) -> None:
    finish(run, 80)
    assert found(run.adapter) == 80
    assert found(run.checkpoints / "step-00000040" / "adapter") == 40
    assert found(run.checkpoints / "step-00000040") == 40
    nothing = tmp_path / "nothing"
    assert adapter_folder(nothing, say=pytest.fail, warn=pytest.fail) == nothing


def test_a_run_is_its_adapter(run: RunFolder) -> None:
    finish(run, 80)
    assert found(run.path) == 80


def test_a_run_without_an_adapter_is_its_newest_checkpoint_and_says_so(run: RunFolder) -> None:
    assert found(run.path, "has no adapter yet: that of its newest checkpoint, step 120, is used") == 120
    (run.checkpoints / "step-00000120" / "state.json").unlink()
    assert found(run.path, "step-00000120: the checkpoint is damaged", "newest checkpoint, step 40") == 40


def test_a_step_of_a_run_is_its_checkpoint(run: RunFolder) -> None:
    finish(run, 80)
    for step in (40, 120):
        assert found(run.path.with_name(f"x@{step}")) == step
        assert found(run.path.with_name(f"x@0{step}")) == step


def test_a_step_without_a_checkpoint_is_an_error_that_lists_the_steps(run: RunFolder) -> None:
    told = refused(run.path.with_name("x@80"))
    assert f"{run.path} has no checkpoint of step 80." in told
    assert "The run has checkpoints of the steps 40, 120." in told
    for step in (40, 120):
        (run.checkpoints / f"step-{step:08d}").rename(run.path / str(step))
    assert "The run has no checkpoint." in refused(run.path.with_name("x@80"))
    assert "has no adapter and no checkpoint yet" in refused(run.path)


def test_the_error_for_a_run_without_an_adapter_says_how_far_it_came_and_what_resuming_does(tmp_path: Path) -> None:
    """A run that failed before its first step fails again, unless its cause is removed."""
    run = RunFolder(tmp_path / "a run")
    run.path.mkdir()
    run.begin("steps: 9")
    told = refused(run.path)
    assert f"The run {run.path} has no adapter and no checkpoint yet: it has done no step." in told
    assert f"finetune --resume {quoted(['--out', run.path])}` starts it from the beginning" in told
    assert "If an error ended it, remove its cause first: the same settings fail again." in told
    with Report(console=False, metrics=run.metrics) as report:
        for number in (1, 2):
            Step(number).write(report)
    assert "has no adapter and no checkpoint yet: its last recorded step is 2." in refused(run.path)


def test_a_damaged_checkpoint_is_named_and_not_read(run: RunFolder) -> None:
    file = run.checkpoints / "step-00000040" / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = refused(run.path.with_name("x@40"))
    assert "step-00000040 is damaged: adapter/adapter_model.safetensors has changed since it was saved" in told
    assert "40, 120" in told


@pytest.mark.parametrize("name", ["y@40", "y/@40"])
def test_a_run_that_is_missing_is_an_error(name: str, run: RunFolder) -> None:
    assert f"There is no run {run.path.with_name('y')}" in refused(run.path.parent / name)


def test_a_slash_before_the_at_sign_changes_nothing(run: RunFolder) -> None:
    assert found(run.path / "@40") == 40
    assert "has no checkpoint of step 80" in refused(run.path / "@80")


@pytest.mark.parametrize("name", ["..@40", ".@40", "y@-1", "y@"])
def test_what_is_no_step_of_a_run_is_a_folder(name: str, run: RunFolder) -> None:
    (run.path / "deeper").mkdir()
    path = run.path / "deeper" / name
    assert adapter_folder(path, say=pytest.fail, warn=pytest.fail) == path


@pytest.mark.parametrize("name", ["x@", "x@4_0", "x@-1", "x@40 ", "x@٤٠", "x/@-1", "x/@"])
def test_what_follows_the_at_sign_of_a_run_is_a_step_or_an_error(name: str, run: RunFolder) -> None:
    told = refused(run.path.parent / name)
    assert f"names no checkpoint: {name.partition('@')[2]!r} after @ is no step." in told
    assert f"Give a step, as {run.path}@120. The run has checkpoints of the steps 40, 120." in told


def test_a_checkpoint_that_is_deleted_before_it_is_read_is_replaced_by_the_newer_one(run: RunFolder) -> None:
    """A run with --keep-checkpoints 1 saves the next step at that moment."""
    calls: list[Path] = []

    def find(path: Path) -> Path:
        folder = adapter_folder(path, say=lambda _: None, warn=pytest.fail)
        if not calls:
            checkpoint.save(run.checkpoints, 160, Contents({}, {}, {"adapter": fill_with(160)}), keep=1)
        calls.append(folder)
        return folder

    folder, adapter = read_adapter(run.path, find=find)
    assert (adapter.origin["step"], folder) == (160, run.checkpoints / "step-00000160" / "adapter")
    assert len(calls) == 2
    with pytest.raises(AdapterError):  # an error that is not of a deletion is not retried
        read_adapter(run.path.with_name("y"), find=lambda path: path)


def test_a_checkpoint_that_is_deleted_while_it_is_verified_is_not_damaged(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = checkpoint_folder.verify

    def verify_late(path: Path) -> list[str]:
        if path.name == "step-00000120":
            checkpoint.save(run.checkpoints, 160, Contents({}, {}, {"adapter": fill_with(160)}), keep=1)
        return verify(path)

    monkeypatch.setattr(checkpoint_folder, "verify", verify_late)
    assert found(run.path, "newest checkpoint, step 160") == 160


def test_a_folder_with_a_name_like_a_step_is_that_folder(run: RunFolder) -> None:
    other = run.path.with_name("x@40")
    other.mkdir()
    fill_with(7)(other)
    assert found(other) == 7


@pytest.mark.parametrize("file", ["run.json", "checkpoints/step-00000120/manifest.json"])
def test_another_format_version_is_an_error_that_names_both(file: str, run: RunFolder) -> None:
    content = json.loads((run.path / file).read_bytes())
    (run.path / file).write_text(json.dumps({**content, "format": 99}))
    for path in (run.path, run.path.with_name("x@120")):
        assert re.search(r"has the format version 99; this octavo reads version [12]\.", refused(path))
