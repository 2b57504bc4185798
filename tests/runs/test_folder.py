"""The folder of a run: what makes it one, its format version, and what is left after an error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from octavo.errors import CheckpointError, UsageError
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder, held


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def begun(folder: RunFolder, *, resume: bool = False, startable: bool = True) -> None:
    """A call that writes the settings and the ledger, and ends."""
    with held(folder, settings="steps: 1\n", resume=resume, startable=startable):
        folder.write(settings="steps: 2\n", ledger={"train": {"tokens": 3}})


def add(folder: RunFolder, part: str) -> None:
    """Adds a part that makes the folder a run."""
    if part == "metrics.jsonl":
        with Report(console=False, metrics=folder.metrics) as report:
            events.Step(1).write(report)
    elif part == "adapter":
        folder.adapter.mkdir(parents=True)
    else:
        (folder.checkpoints / "step-00000007").mkdir(parents=True)


def test_a_new_run_has_its_version_settings_and_ledger(folder: RunFolder) -> None:
    begun(folder)
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "config.yaml", "ledger.json", ".lock"}
    assert json.loads(folder.about.read_bytes())["format"] == 1
    assert folder.settings.read_text() == "steps: 2\n"
    assert json.loads(folder.ledger.read_bytes()) == {"train": {"tokens": 3}}
    assert folder.contents() == []


@pytest.mark.parametrize("part", ["checkpoints", "adapter", "metrics.jsonl"])
def test_a_run_is_resumed_and_not_started_again(part: str, folder: RunFolder) -> None:
    add(folder, part)
    assert folder.contents() == [part]
    with pytest.raises(UsageError, match=rf"already contains a run \({part}\)"):
        begun(folder)
    begun(folder, resume=True, startable=False)


def test_metrics_without_a_step_are_no_run(folder: RunFolder) -> None:
    with Report(console=False, metrics=folder.metrics) as report:
        events.Versions().write(report)
        report.event("step", step="one")
    assert folder.contents() == []
    begun(folder)


def test_there_must_be_a_run_to_resume_or_data_to_start_one(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match="contains no run to resume"):
        begun(folder, resume=True, startable=False)
    assert not folder.path.exists()
    begun(folder, resume=True)


def test_the_steps_are_those_of_the_checkpoints(folder: RunFolder) -> None:
    assert folder.steps() == []
    for name in ("step-00000020", "step-00000007", ".old-step-00000030-1", ".tmp-step-00000040-1", "step-x", "latest"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.steps() == [7, 20]


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_an_error_and_changes_nothing(version: object, folder: RunFolder) -> None:
    begun(folder)
    add(folder, "adapter")
    folder.about.write_text(json.dumps({"format": version, "octavo": "9.9"}))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    told = "no format version" if version is None else f"the format version {version!r}"
    with pytest.raises(CheckpointError, match=f"run has {told}; this octavo reads version 1"):
        begun(folder, resume=True)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_lost_files_are_written_again(folder: RunFolder) -> None:
    begun(folder)
    before = folder.about.read_bytes()
    assert folder.restore(settings="steps: 3\n", ledger={}) == []
    folder.about.unlink()
    folder.settings.unlink()
    assert folder.restore(settings="steps: 3\n", ledger={}) == ["run.json", "config.yaml"]
    assert folder.about.read_bytes() == before
    assert folder.settings.read_text() == "steps: 3\n"
    assert json.loads(folder.ledger.read_bytes()) == {"train": {"tokens": 3}}


def fail(folder: RunFolder, then: str = "") -> None:
    """A call that fails after a step of its work."""
    with held(folder, settings="steps: 1\n", resume=False, startable=True):
        assert folder.settings.read_text() == "steps: 1\n"
        if then == "ledger":
            folder.write(settings="steps: 1\n", ledger={})
        elif then == "checkpoints":
            add(folder, then)
        raise ValueError("wrong")


@pytest.mark.parametrize("existed", [False, True])
def test_an_error_before_the_ledger_leaves_nothing(existed: bool, folder: RunFolder) -> None:
    if existed:
        folder.path.mkdir()
        (folder.path / "notes").touch()
    with pytest.raises(ValueError, match="wrong"):
        fail(folder)
    assert [path.name for path in folder.path.rglob("*")] == ["notes"] * existed
    assert folder.path.exists() == existed


@pytest.mark.parametrize("then", ["ledger", "checkpoints", "settings of a killed call"])
def test_an_error_of_a_run_that_has_begun_keeps_its_files(then: str, folder: RunFolder) -> None:
    if then == "settings of a killed call":
        folder.path.mkdir()
        folder.begin("killed: true\n")
    with pytest.raises(ValueError, match="wrong"):
        fail(folder, then)
    assert folder.settings.read_text() == "steps: 1\n"
    assert folder.about.exists()


def test_leftovers_of_killed_writers_are_removed(folder: RunFolder) -> None:
    own = os.getpid()
    for name in (f".tmp-adapter-{own}", f"checkpoints/.tmp-step-00000004-{own}"):
        (folder.path / name).mkdir(parents=True)
    (folder.path / f".config.yaml.{own}").touch()
    begun(folder)
    assert not list(folder.path.rglob(f"*{own}"))


def test_a_second_process_is_kept_out(folder: RunFolder) -> None:
    with (
        held(folder, settings="", resume=False, startable=True),
        pytest.raises(CheckpointError, match="another process"),
    ):
        begun(folder)
