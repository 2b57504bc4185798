"""`octavo.Run`: a run folder in Python has the values of `--json` and of the metrics file."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import octavo as api
from octavo.runs import events

if TYPE_CHECKING:
    from tests.conftest import Octavo


@pytest.fixture(scope="module")
def options(tiny_llama: Path, plays: Path) -> dict[str, Any]:
    return {
        "model": tiny_llama, "data": [plays / "train"], "test_data": plays / "test", "seq_len": 32, "steps": 4,
        "lr": 0.03, "rank": 2, "sample_tokens": 2, "probes": False, "eval_every": 2, "quiet": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> list[events.Event]:
    return []


@pytest.fixture(scope="module")
def run(options: dict[str, Any], seen: list[events.Event], tmp_path_factory: pytest.TempPathFactory) -> api.Run:
    return api.finetune(**options, out=tmp_path_factory.mktemp("runs") / "mine", on_event=seen.append)


def test_a_run_is_its_folder_opened_again(run: api.Run) -> None:
    again = api.Run(run.out)
    assert again.to_dict() == run.to_dict()
    assert again.events == run.events
    assert (again.steps, again.adapter, again.best_step) == (4, run.out / "adapter", run.best_step)
    assert repr(run).startswith(f"Run({str(run.out)!r}: 4 steps, training loss")


def test_events_arrive_as_they_are_in_the_file(run: api.Run, seen: list[events.Event]) -> None:
    assert seen == run.events
    assert [event.step for event in seen if isinstance(event, events.Step)] == [1, 2, 3, 4]


def test_metrics_are_the_steps_with_their_evaluations(run: api.Run) -> None:
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    held_out = {line["step"]: line["loss"] for line in lines if line["event"] == "heldout"}
    assert {row["step"]: row["loss"] for row in run.metrics if row["step"]} == losses
    assert {row["step"]: row["held_out_loss"] for row in run.metrics if row["held_out_loss"]} == held_out
    assert set(held_out) >= {2, 4}
    assert run.best_step == min((step for step in held_out if step), key=lambda step: held_out[step])


def test_its_document_is_that_of_the_command(
    run: api.Run, octavo: Octavo, options: dict[str, Any], tmp_path: Path
) -> None:
    done = octavo("finetune", "--resume", "--out", run.out, "--json")
    again = api.Run(run.out).to_dict()
    memory = {"peak_memory_bytes": 0}
    assert {**done.json, **memory} == {**json.loads(json.dumps(again)), **memory}


def test_it_loads_the_model_with_its_adapter(run: api.Run, tiny_llama: Path) -> None:
    expected = api.load(tiny_llama, adapter=run.adapter, max_new_tokens=5, temperature=0, quiet=True)
    loaded = run.load(max_new_tokens=5, temperature=0, quiet=True)
    assert loaded.decoder.embed.matrix.scheme.name == expected.decoder.embed.matrix.scheme.name == "int8"
    assert (run.settings["scheme"], run.settings["seq_len"]) == ("auto", 32)
    plain = run.load(scheme="none", adapter=None, max_new_tokens=5, temperature=0, quiet=True)
    assert plain.decoder.embed.matrix.scheme.name == "none"
    assert loaded.generate("the king") == expected.generate("the king")


def test_a_notebook_shows_the_report(run: api.Run) -> None:
    html = run._repr_html_()
    page = html.partition('srcdoc="')[2].partition('"')[0]
    assert unescape(page) == run.report.read_text()
    assert "<script" not in html


def test_a_failing_callback_does_not_end_the_run(options: dict[str, Any], tmp_path: Path) -> None:
    calls: list[events.Event] = []

    def failing(event: events.Event) -> None:
        calls.append(event)
        if isinstance(event, events.Step):
            raise ValueError("no such plot")

    run = api.finetune(**options, out=tmp_path / "run", on_event=failing)
    assert run.steps == 4
    assert [event.step for event in calls if isinstance(event, events.Step)] == [1]
    warnings = [event.text for event in run.events if isinstance(event, events.Warn)]
    assert sum("on_event raised ValueError: no such plot" in text for text in warnings) == 1


def test_wrong_uses_are_errors_that_say_what_to_do(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(api.UsageError, match="contains no run"):
        api.Run(tmp_path)
    for value in (None, 5, b"x"):
        with pytest.raises(api.UsageError, match="out: must be a path"):
            api.Run(value)  # type: ignore[arg-type]
    with pytest.raises(api.UsageError, match="on_event: must be a function, not 3"):
        api.finetune(**options, out=tmp_path / "run", on_event=3)
    with pytest.raises(api.UnknownOptionError, match="Did you mean on_event"):
        api.finetune(**options, out=tmp_path / "run", on_events=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["model: 2020-13-45", "[" * 100_000, "- a list", "\x00"])
def test_damaged_settings_are_no_settings(run: api.Run, tmp_path: Path, content: str) -> None:
    copy = Path(shutil.copytree(run.out, tmp_path / "copy"))
    (copy / "config.yaml").write_text(content)
    assert api.Run(copy).settings == {}
