"""The ends of metrics.jsonl: of a small file all events, of a large one its beginning and its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.events import Event
from octavo.runs.metrics_ends import HEAD_BYTES, TAIL_BYTES, read_ends


def written(path: Path, *, steps: int, said: int = 0) -> Path:
    """A file with `steps` steps, and then a message of `said` characters."""
    with Report(console=False, metrics=path) as report:
        events.Hardware("cpu", "a CPU", "torch.float32").write(report)
        for step in range(1, steps + 1):
            events.Step(step, 2.5, 1e-4, 0.5, 512, 500, 800.5).write(report)
        if said:
            report.say("x" * said)
    return path


def has_step(found: Sequence[Event]) -> bool:
    return bool(events.only(found, events.Step))


def test_of_a_small_file_all_events_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "m", steps=20)
    ends = read_ends(path, enough=has_step)
    assert ends.whole
    assert ends.events == events.read(path)
    times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
    assert ends.first_time == times[0]


def test_of_a_large_file_both_ends_are_read_without_partial_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "m", steps=1500)
    assert path.stat().st_size > 2 * (HEAD_BYTES + TAIL_BYTES)
    ends, every = read_ends(path, enough=has_step), events.read(path)
    assert not ends.whole
    head = next(number for number, (a, b) in enumerate(zip(ends.events, every, strict=False)) if a != b)
    assert head > 10
    tail = list(ends.events[head:])
    assert len(tail) > 10
    assert tail == every[-len(tail) :]


def test_the_end_grows_until_it_has_enough(tmp_path: Path) -> None:
    path = written(tmp_path / "m", steps=1500, said=2 * TAIL_BYTES)
    ends = read_ends(path, enough=has_step)
    assert not ends.whole
    assert [event.step for event in events.only(ends.events, events.Step)][-1] == 1500


def test_without_enough_the_whole_file_is_read_once(tmp_path: Path) -> None:
    path = written(tmp_path / "m", steps=1500)
    ends = read_ends(path, enough=lambda found: False)
    assert ends.whole
    assert ends.events == events.read(path)


def test_lines_that_are_no_events_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path / "m", steps=2)
    path.write_bytes(b"\xff\n[1]\n" + path.read_bytes() + b'{"event": "step", "st')
    assert [event.kind for event in read_ends(path, enough=has_step).events] == ["hardware", "step", "step"]
