"""The summary of a run folder: its state, its steps, and what is wrong with a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.run_folders import write_run

from octavo.commands.finetune.prepare import total_steps
from octavo.commands.run_summary import planned_steps, summarize
from octavo.config import TrainOptions
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder
from octavo.store.files import lock


def test_a_finished_run_has_the_results_of_its_table(tmp_path: Path) -> None:
    run = summarize(write_run(tmp_path / "run", before=[4.0] * 20, after=[3.5] * 20))
    assert (run.state, run.steps, run.planned_steps, run.problem) == ("finished", 4, 4, "")
    assert run.perplexity_before == pytest.approx(np.exp(4.0))
    assert run.perplexity_after == pytest.approx(np.exp(3.5))
    assert run.difference is not None
    assert run.difference.lower_by == pytest.approx(0.5)
    assert (run.model, run.data, run.device, run.tokens_per_second) == ("some/model", ["texts/train"], "a CPU", 800.0)
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert run.started == json.loads(first)["time"]


def test_a_stopped_run_has_the_perplexities_so_far(tmp_path: Path) -> None:
    run = summarize(write_run(tmp_path / "run", steps=3, before=[4.0] * 20))
    assert (run.state, run.steps, run.planned_steps) == ("stopped", 3, 4)
    assert run.perplexity_before == pytest.approx(np.exp(4.0))
    assert run.perplexity_after == pytest.approx(np.exp(4.0 - 0.2))
    assert run.difference is None


def test_a_run_whose_folder_is_locked_is_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    with lock(folder):
        assert summarize(folder).state == "running"
        assert summarize(folder).state == "running"  # looking does not take the lock away
    assert summarize(folder).state == "stopped"
    with lock(folder):  # nor does looking keep it
        pass


def test_a_failed_run_has_its_error_until_it_is_resumed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    with Report(console=False, metrics=folder / "metrics.jsonl", append=True) as report:
        events.Failure("the disk is full").write(report)
        report.say("a message")
    assert (summarize(folder).state, summarize(folder).problem) == ("failed", "the disk is full")
    with Report(console=False, metrics=folder / "metrics.jsonl", append=True) as report:
        events.Step(4, 3.0).write(report)
    assert (summarize(folder).state, summarize(folder).problem) == ("stopped", "")


def test_a_finished_run_that_trains_longer_is_not_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with Report(console=False, metrics=folder / "metrics.jsonl", append=True) as report:
        events.Step(5, 3.0).write(report)
    assert (summarize(folder).state, summarize(folder).steps) == ("stopped", 5)


@pytest.mark.parametrize(("epochs", "batch", "rows"), [(1.0, 4, 16), (1.5, 3, 16), (0.3, 5, 7), (2.0, 7, 100)])
def test_the_planned_steps_are_those_that_training_computes(
    tmp_path: Path, epochs: float, batch: int, rows: int
) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps({"train": {"rows": rows}}))
    options = TrainOptions(epochs=epochs, batch_size=batch)
    assert planned_steps(RunFolder(tmp_path), options.model_dump()) == total_steps(options, rows)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("run.json", '{"format": 99}', "format version 99"),
        ("run.json", "{", "not valid JSON"),
        ("config.yaml", "a: [", "not valid YAML"),
        ("config.yaml", None, "config.yaml is missing"),
        ("metrics.jsonl", None, "metrics.jsonl is missing"),
    ],
)
def test_a_damaged_run_has_the_reason(tmp_path: Path, file: str, content: str | None, problem: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    assert problem in summarize(folder).problem
    if file != "config.yaml" or content:
        assert summarize(folder).state == "unreadable"


def test_settings_that_libyaml_does_not_read_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", settings={"data": ["caf\udce9.txt", "\N{CROWN}"]})  # a name that is not UTF-8
    assert summarize(folder).data == ["caf\udce9.txt", "\N{CROWN}"]


@given(st.sampled_from(["run.json", "config.yaml", "ledger.json", "metrics.jsonl"]), st.binary(max_size=60))
def test_no_content_of_a_file_is_an_error(tmp_path_factory: pytest.TempPathFactory, file: str, content: bytes) -> None:
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", planned=None, steps=8)
    (folder / file).write_bytes(content)
    assert summarize(folder).path == folder


def test_events_of_other_types_are_no_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        for line in ('{"event": "evaluation", "step": 2, "rows": [{}], "differences": 3}', '{"event": 7, "time": 3}'):
            file.write(f"{line}\n")
        file.write('{"event": "heldout_losses", "step": 0, "row": "x", "nats": "*", "tokens": ""}\n')
    assert summarize(folder).steps == 2
