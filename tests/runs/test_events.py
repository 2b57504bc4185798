"""The events of a run: written to metrics.jsonl and read back as they were, and removed when a run resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.events import Difference, Event, FileDifference, Interval, ScoreRow
from octavo.runs.probe_results import Example

INTERVAL = Interval(4.25, 4.5, 20, "documents")
DIFFERENCE = Difference("base", "int8", "tuned", "int8", 0.5, INTERVAL)
ROWS = (
    ScoreRow(
        "base", "none", None, 80.5, 1.5, 52123, size_bytes=7, loss=4.38, interval=INTERVAL, context=512, stride=128
    ),
    ScoreRow("tuned", "int8", "runs/x/adapter", math.inf, 1.25, 52123, also_in_training=0.5),
)
WRITTEN: list[Event] = [
    events.Hardware("cuda:0", "NVIDIA H200", "torch.bfloat16"),
    events.Versions("0.1", "2.13.0", "5.0"),
    events.Overlap("as given", 2, 70, ("a.txt:1", "b.txt:2"), 1, ("c.txt:1",), 13, 400, 100, 0.25),
    events.Matmul(("0.q_proj",), {"1.down": (3, 5)}, {"1.down": (0.1, None, 0.02)}),
    events.MatmulSpeed(1.5),
    events.Sample(0, "the king", "the king \N{CROWN}", "base"),
    events.Step(1, 2.5, 1e-4, 0.5, 512, 500, 800.5),
    events.Step(2, None, 2e-4, math.inf, 512, 0, None),
    events.HeldOut(2, 2.25, 9.5, 0.5, 0.25, INTERVAL, INTERVAL, 1),
    events.QuantizationCost(DIFFERENCE),
    events.Say("said"),
    events.Warn("warned"),
    events.Evaluation(2, ROWS, (DIFFERENCE, Difference("a", after="b")), (FileDifference("a.txt", 9, 0.5, INTERVAL),)),
    events.HeldOutLosses(2, "tuned", "documents", "AACAPw==", "AwAAAA==", 1, 1, 9, "a1", "b2"),
    events.EarlyStop(2, "the held-out loss rises"),
    events.Failure("the disk is full"),
    events.Memory(2, 2**40),
    events.Forgot(2, 44, 1652, 1.25, 1.5, 0.25, INTERVAL),
    events.Learned(
        2, 50, 40, 3, 0.25, 0.75, 0.5, INTERVAL, examples=(Example("the king of", "Spain", "men", "Spain"),)
    ),
    events.Copies(2, reason="the training text is not given"),
]


# The kinds in the files of all versions: a kind that is renamed is a new one, and its lines of earlier runs are lost.
RECORDED = {
    "copies", "early_stop", "evaluation", "failure", "forgot", "hardware", "heldout", "heldout_losses", "learned",
    "matmul", "matmul_speed", "memory", "overlap", "quantization_cost", "sample", "say", "step", "versions", "warn",
}  # fmt: skip


def record(path: Path, *written: Event) -> list[dict[str, Any]]:
    with Report(console=False, metrics=path) as report:
        for event in written:
            event.write(report)
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(path: Path) -> list[tuple[str, Any]]:
    return [(event.kind, getattr(event, "step", None)) for event in events.read(path)]


def test_every_kind_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    lines = record(tmp_path / "m", *WRITTEN)
    assert events.read(tmp_path / "m") == WRITTEN
    assert {line["event"] for line in lines} == events.KINDS.keys() == RECORDED
    assert lines[6] == {"event": "step", "time": lines[6]["time"], "step": 1, "loss": 2.5, "learning_rate": 1e-4} | {
        "grad_norm": 0.5, "tokens": 512, "trained_tokens": 500, "tokens_per_second": 800.5,
    }  # fmt: skip
    assert lines[7]["loss"] is None


def test_messages_of_a_report_are_events(tmp_path: Path) -> None:
    with Report(console=False, metrics=tmp_path / "m") as report:
        report.say("said")
        report.warn("warned")
    assert events.read(tmp_path / "m") == [events.Say("said"), events.Warn("warned")]


def test_a_row_has_only_the_columns_of_its_table(tmp_path: Path) -> None:
    base, tuned = (row.to_dict() for row in ROWS)
    assert base == {
        "name": "base", "scheme": "none", "adapter": None, "perplexity": 80.5, "bits_per_byte": 1.5, "tokens": 52123,
        "size_bytes": 7, "loss": 4.38,
        "interval": {"low": 4.25, "high": 4.5, "units": 20, "over": "documents", "level": 0.95},
        "context": 512, "stride": 128,
    }  # fmt: skip
    assert tuned.keys() == {*base, "also_in_training"} - {"size_bytes"}
    assert [ScoreRow.read(row) for row in (base, tuned)] == list(ROWS)
    with pytest.raises(ValueError, match="has no name"):
        ScoreRow.read({"perplexity": 1.0})


def test_a_missing_file_has_no_events(tmp_path: Path) -> None:
    assert events.read(tmp_path / "m") == []


READ: list[tuple[Mapping[str, Any], Event | None]] = [
    ({"event": "step", "step": 3, "loss": 2, "new": {"a": [1]}}, events.Step(3, 2.0)),
    ({"event": "step", "step": 3, "loss": "nan", "tokens": "many"}, events.Step(3, math.nan)),
    ({"event": "step", "step": 3, "loss": True, "tokens": 1.5, "grad_norm": "high"}, events.Step(3)),
    ({"event": "step", "loss": 2.5}, None),
    ({"event": "step", "step": True}, None),
    ({"event": "step", "step": "3"}, None),
    ({"event": "a later kind", "step": 3}, None),
    ({"event": ["step"], "step": 3}, None),
    ({"step": 3}, None),
    ({"event": "warn", "text": 3}, events.Warn()),
    ({"event": "evaluation", "rows": [{"name": "base", "ppl": 1}]}, events.Evaluation(None, (ScoreRow("base"),))),
    ({"event": "evaluation", "rows": [{"name": "base"}, {}]}, events.Evaluation()),
    ({"event": "matmul", "exact": ["a"], "outliers": {"b": "all"}}, events.Matmul(("a",))),
    ({"event": "matmul_speed", "times": None}, None),
]


@pytest.mark.parametrize(("line", "expected"), READ)
def test_what_a_reader_does_not_have_is_ignored(line: Mapping[str, Any], expected: Event | None) -> None:
    assert repr(events.of_record(line)) == repr(expected)  # repr: NaN is not equal to NaN


def test_the_last_event_of_a_kind() -> None:
    assert events.last(WRITTEN, events.Step) == WRITTEN[7]
    assert events.only(WRITTEN, events.Step) == WRITTEN[6:8]
    assert events.last(WRITTEN[:3], events.Step) is None


def test_resuming_removes_events_that_are_recorded_again(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with Report(console=False, metrics=path) as report:
        events.Hardware().write(report)
        report.event("a later kind", step=3, new=1)
        report.event("a later kind", step=4)
        events.Sample(0, which="base").write(report)
        for step in (1, 2, 3):
            events.Step(step, math.nan).write(report)
        events.HeldOut(3).write(report)
        events.Sample(3, which="training").write(report)
        events.Sample(3, which="tuned").write(report)
        events.Evaluation(3).write(report)
        events.Memory(3).write(report)
        events.Step(4).write(report)
    before = path.read_text().splitlines()
    with Report(console=False, metrics=path, append=True) as report:
        events.drop_events_after(report, 3)
    kept = [("hardware", None), ("sample", 0), ("step", 1), ("step", 2), ("step", 3), ("heldout", 3), ("sample", 3)]
    assert kinds(path) == kept
    assert path.read_text().splitlines() == [before[number] for number in (0, 1, 3, 4, 5, 6, 7, 8)]
    with Report(console=False, metrics=path, append=True) as report:
        report.say("said")
        events.drop_events_after(report, -1)
    assert kinds(path) == [("say", None)]


def test_after_resuming_each_step_is_recorded_once(tmp_path: Path) -> None:
    path = tmp_path / "m"
    record(path, *(event for step in range(1, 8) for event in (events.Step(step), events.HeldOut(step))))
    with Report(console=False, metrics=path, append=True) as report:
        events.drop_events_after(report, 4)
        for step in range(5, 10):
            events.Step(step).write(report)
    recorded = events.read(path)
    assert [event.step for event in events.only(recorded, events.Step)] == list(range(1, 10))
    assert [event.step for event in events.only(recorded, events.HeldOut)] == [1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_resuming_removes_the_messages_of_a_call_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with Report(console=False, metrics=path) as report:
        report.say("first")
        events.Step(1).write(report)
        report.warn("of step 1")
    with Report(console=False, metrics=path, append=True) as report:
        report.say("killed before its first step")
        events.Step(2).write(report)
    with Report(console=False, metrics=path, append=True) as report:
        report.say("now")
        events.drop_events_after(report, 1)
    assert events.read(path) == [
        events.Say("first"), events.Step(1), events.Warn("of step 1"), events.Say("now"),
    ]  # fmt: skip
    with Report(console=False, metrics=path, append=True) as report:
        report.warn("now")
        events.drop_events_after(report, -1)
    assert events.read(path) == [events.Warn("now")]


def test_missing_steps_are_a_warning(tmp_path: Path) -> None:
    with Report(console=False, metrics=tmp_path / "m") as report:
        events.Step(2).write(report)
        events.drop_events_after(report, 4)
    (warning,) = events.only(events.read(tmp_path / "m"), events.Warn)
    assert "lacks 3 of the steps 1 to 4" in warning.text


def test_a_report_without_a_file_has_nothing_to_resume() -> None:
    with Report(console=False) as report:
        events.drop_events_after(report, 4)
