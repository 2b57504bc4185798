"""Messages go to stderr; every event is one valid JSON line, which survives a kill."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from octavo import reporting as module
from octavo.errors import UsageError
from octavo.reporting import Report, duration, printable, read_events


def lines(path: Path) -> list[dict[str, object]]:
    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=reject) for line in path.read_text("utf-8").splitlines()]


def test_messages_go_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report, report.progress(2, "training") as progress:
        report.say("spoken")
        report.warn("warned")
        report.table("shown", ["a"], [[1]])
        progress.advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("spoken", "warning: warned", "shown", "training: 2/2"):
        assert text in captured.err


def test_a_report_without_console_records_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(console=False, metrics=tmp_path / "m.jsonl") as report:
        report.say("a")
        report.warn("b")
        report.table("t", ["a"], [[1]])
        with report.progress(1, "p") as progress:
            progress.advance()
    assert capsys.readouterr().err == ""
    assert [(line["event"], line["text"]) for line in lines(tmp_path / "m.jsonl")] == [
        ("say", "a"),
        ("warn", "b"),
    ]


def test_markup_and_emoji_codes_are_printed_literally(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "[bold]x[/bold] [/] :smile:"
    with Report() as report:
        report.say(text)
        report.warn(text)
        report.table(text, [text], [[text]])
        with report.progress(1, text) as progress:
            progress.advance(note=text)
    assert capsys.readouterr().err.count(text) == 7


def test_long_messages_and_cells_are_not_truncated(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report:
        report.say("word " * 60 + "end")
        report.table("t", ["path"], [["/" + "x" * 300]])
    err = capsys.readouterr().err
    assert "word " * 60 + "end\n" in err
    assert err.count("x") == 300


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report:
        report.say("a\x1b[2Jb\rc")
    assert "\x1b" not in capsys.readouterr().err


def test_each_event_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.jsonl"
    with Report(console=False, metrics=path) as report:
        report.event("step", step=1, loss=2.5, name="ä")
        assert lines(path)[0].items() >= {"event": "step", "step": 1, "loss": 2.5, "name": "ä"}.items()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\x85\u2028\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=json_values)
def test_any_value_is_recorded_as_one_line_of_valid_json(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.jsonl"
    with Report(console=False, metrics=path) as report:
        report.event("x", value=value)
        report.event("y")
    assert path.read_bytes().count(b"\n") == 2
    events, unreadable = read_events(path)
    assert [event["event"] for event in events] == ["x", "y"]
    assert unreadable == 0
    assert len(lines(path)) == 2


def test_numbers_that_json_lacks_become_strings_that_float_reads(tmp_path: Path) -> None:
    with Report(console=False, metrics=tmp_path / "m.jsonl") as report:
        report.event("step", loss=math.nan, up=math.inf, down=[-math.inf])
    [line] = lines(tmp_path / "m.jsonl")
    assert (line["loss"], line["up"], line["down"]) == ("nan", "inf", ["-inf"])
    assert math.isnan(float(str(line["loss"])))


def test_append(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for append, expected in [(False, 1), (True, 2), (False, 1)]:
        with Report(console=False, metrics=path, append=append) as report:
            report.event("x")
        assert len(lines(path)) == expected


@given(cut=st.integers(0, 200))
def test_a_partial_line_is_removed_on_append(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("r") / "m.jsonl"
    with Report(console=False, metrics=path) as report:
        report.event("step", step=1, text="ä")
        report.event("step", step=2, text="ö")
    content = path.read_bytes()
    os.truncate(path, min(cut, len(content)))
    complete_steps = [json.loads(line)["step"] for line in content[:cut].splitlines() if line.endswith(b"}")]
    with Report(console=False, metrics=path, append=True) as report:
        report.event("step", step=3)
    assert [line["step"] for line in lines(path)] == [*complete_steps, 3]


def test_removing_events_replaces_the_file_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    with Report(console=False, metrics=path) as report:
        report.event("step", step=1)
        report.event("step", step=2)
    before = path.read_bytes()

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", power_cut)
    with Report(console=False, metrics=path, append=True) as report, pytest.raises(KeyboardInterrupt):
        report.keep_events(lambda event: event["step"] == 1)
    assert path.read_bytes() == before


def test_an_invalid_line_is_removed_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st\n{"event": "step", "step": 2}\n{"step": 3}\n')
    with Report(console=False, metrics=path, append=True) as report:
        assert [event["step"] for event in report.keep_events(lambda event: event["step"] < 3)] == [1, 2]
    assert [line["event"] for line in lines(path)] == ["step", "step", "warn"]


def test_a_file_that_cannot_be_written_is_a_usage_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"m\.jsonl"):
        Report(metrics=tmp_path / "file" / "m.jsonl")


def test_a_killed_process_leaves_all_its_events(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from octavo.reporting import Report\n"
        "report = Report(console=False, metrics=pathlib.Path(sys.argv[1]))\n"
        "for step in range(5): report.event('step', step=step)\n"
        "os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "m.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert [line["step"] for line in lines(path)] == list(range(5))


def test_progress_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    with Report() as report, report.progress(60, "training", done=20) as progress:
        for step in range(20, 60):
            now += 1.0
            progress.advance(loss=3.5 - step / 100, tokens_per_second=841.7)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 5
    assert printed[0] == "training: 22/60  loss 3.290  841.7 tokens/s  38 s left"
    assert printed[1] == "training: 32/60  loss 3.190  841.7 tokens/s  28 s left"
    assert printed[-1] == "training: 60/60  loss 2.910  841.7 tokens/s  0 s left"


def test_no_remaining_time_is_estimated_from_the_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    with Report() as report, report.progress(7221, "encoding") as progress:
        now += 2.0
        progress.advance(23)
        now += 10.0
        progress.advance(7000)
    printed = capsys.readouterr().err.splitlines()
    assert printed == ["encoding: 23/7,221", "encoding: 7,023/7,221  0 s left"]


def test_progress_bar_and_messages_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = StringIO()
    report = Report()
    report._console = Console(file=screen, force_terminal=True, width=100, markup=False)
    with report.progress(4, "[training]") as progress:
        progress.advance(loss=2.0)
        report.say("halfway")
        progress.advance(3, loss=1.5)
    screen_text = screen.getvalue()
    assert "halfway" in screen_text
    last = screen_text[screen_text.rindex("[training]") :]
    assert "4/4  loss 1.500" in last
    assert "━" in last


def test_numeric_columns_are_right_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    with Report() as report:
        report.table("t", ["name", "tokens"], [["a", 5], ["b", 1234567]])
    assert "│ a    │         5 │" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3599.9, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("environ", "has_bar"), [({}, True), ({"TERM": "dumb"}, False), ({"JPY_PARENT_PID": "1"}, False)], ids=str
)
def test_a_bar_is_drawn_only_on_a_terminal_that_can_redraw(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], has_bar: bool
) -> None:
    """A notebook keeps every state of a bar as output, so it gets progress lines instead."""
    for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stream = StringIO()
    report = Report()
    report._console = Console(file=stream, force_terminal=True)
    with report.progress(200, "work") as progress:
        for _ in range(200):
            progress.advance(loss=1.0)
    assert ("\x1b[" in stream.getvalue()) == has_bar
    if not has_bar:
        assert stream.getvalue() == "work: 200/200  loss 1.000  0 s left\n"


def test_bytes_are_shown_with_a_rate_and_may_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(module, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(module, "FIRST_LINE_SECONDS", module.LINE_SECONDS)
    stream = StringIO()
    report = Report()
    report._console = Console(file=stream)
    with report.progress(8_000_000, "fetching", done=4_000_000, unit="bytes") as progress:
        progress.reach(6_000_000)
        progress.reach(0)
        progress.reach(8_000_000)
    assert stream.getvalue().endswith("8.0/8.0 MB  1.3 MB/s  0 s left\n"), stream.getvalue()


def test_results_go_to_stdout_unless_a_json_document_does(capsys: pytest.CaptureFixture[str]) -> None:
    for results in (True, False):
        with Report(results=results) as report:
            report.say("said")
            report.result("found " + "x" * 300)
            report.table("asked for", ["column"], [["y" * 300]], result=True)
            report.table("on the way", ["column"], [[1]])
        out, err = capsys.readouterr()
        assert ("said" in err, "on the way" in err) == (True, True)
        assert ("x" * 300 in out, "asked for" in out, "y" * 300 in out) == (results, results, results)
        assert ("x" * 300 in err, "asked for" in err) == (not results, not results)


@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\u202e", "\u2066", "\udcff"])
def test_printable_replaces_control_characters(character: str) -> None:
    assert printable(f"a{character}b\tc\nd") == "a\N{REPLACEMENT CHARACTER}b\tc\nd"
    printable(character).encode()
