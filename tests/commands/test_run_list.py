"""`octavo runs`: which folders are found, their order, the table and the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import Octavo
from tests.run_folders import write_run

import octavo as api
from octavo.bounded_json import parse


def names(octavo: Octavo, *arguments: object) -> list[str]:
    found = json.loads(octavo("runs", *arguments, "--json").out)["runs"]
    return [Path(run["path"]).name for run in found]


def test_runs_are_found_down_to_a_depth_but_not_in_hidden_folders_and_links(octavo: Octavo, tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "x" / "y" / "b")
    write_run(tmp_path / "x" / "y" / "z" / "deep")
    write_run(tmp_path / ".hidden" / "c")
    write_run(tmp_path / "a" / "inside")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "other" / "adapter").mkdir(parents=True)
    assert names(octavo, tmp_path, "--sort", "name") == ["a", "b"]
    assert names(octavo, tmp_path, "--sort", "name", "--depth", 4) == ["a", "b", "deep"]
    assert names(octavo, tmp_path, "--depth", 1) == ["a"]
    assert names(octavo, tmp_path / "a", tmp_path / "link", tmp_path / "a", "--sort", "name") == ["a", "b", "deep"]


def test_the_current_folder_is_the_default(octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert json.loads(octavo("runs", "--json").out)["runs"][0]["path"] == str(Path("runs/a"))


def test_the_order_and_runs_without_the_value_last(octavo: Octavo, tmp_path: Path) -> None:
    write_run(tmp_path / "a", after=[3.0] * 20, before=[4.0] * 20)
    write_run(tmp_path / "b", after=[2.0] * 20, before=[2.5] * 20)
    write_run(tmp_path / "c", steps=1, planned=9)
    for letter, day in (("a", 2), ("b", 1), ("c", 3)):
        path = tmp_path / letter / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["time"] = f"2026-11-0{day}T00:00:00+00:00"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert names(octavo, tmp_path) == ["c", "a", "b"]
    assert names(octavo, tmp_path, "--sort", "perplexity") == ["b", "a", "c"]
    assert names(octavo, tmp_path, "--sort", "gain") == ["a", "b", "c"]
    assert names(octavo, tmp_path, "--sort", "steps") == ["a", "b", "c"]
    assert names(octavo, tmp_path, "--sort", "name") == ["a", "b", "c"]


def test_the_table_has_every_run_and_the_reasons(octavo: Octavo, tmp_path: Path) -> None:
    write_run(tmp_path / "good", before=[4.0] * 20, after=[3.5] * 20)
    broken = write_run(tmp_path / "broken")
    (broken / "run.json").write_text('{"format": 99}')
    done = octavo("runs", tmp_path)
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if "/good " in line)
    for cell in ("finished", "4 / 4", "model", "train", "54.60 -> 33.12", "0.144 (0.115 to 0.173)", "800"):
        assert cell in line
    assert "some/model" not in line
    assert f"{broken}: {broken} has the format version 99" in done.out


def test_on_a_narrow_terminal_a_run_has_two_lines(
    octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "good", before=[4.0] * 20, after=[3.5] * 20)
    monkeypatch.setenv("COLUMNS", "100")
    first, second = octavo("runs").out.splitlines()[5:7]
    assert "54.60 -> 33.12" in first
    assert "0.144 (0.115 to 0.173)" in second
    assert max(map(len, (first, second))) <= 100


def test_no_runs_and_no_folder(octavo: Octavo, tmp_path: Path) -> None:
    done = octavo("runs", tmp_path)
    assert (done.code, done.out) == (0, "")
    assert "There are no runs" in done.err
    done = octavo("runs", tmp_path / "none")
    assert done.code == 2
    assert "There is no folder" in done.err


def test_a_long_run_is_listed_without_reading_its_middle(
    octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", steps=1500, planned=1600)
    lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    read = 0

    def counted(line: bytes, *, strict: bool) -> object:
        nonlocal read
        read += 1
        return parse(line, strict=strict)

    monkeypatch.setattr("octavo.runs.metrics_ends.parse", counted)
    assert api.list_runs(str(tmp_path), quiet=True)["runs"][0]["steps"] == 1500
    assert 0 < read < lines / 2
