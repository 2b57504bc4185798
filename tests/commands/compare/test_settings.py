"""Settings as text: paths by the parts that tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.run_folders import write_run

from octavo.commands.compare.read import read_runs, short_names
from octavo.commands.compare.settings import differing_circumstances, shown_setting
from octavo.reporting import Report
from octavo.runs import events


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1e-3, 2], ["0.001", "2"]),
        ([None, True], ["-", "on"]),
        ([["a.txt"], ["a.txt", "b.txt"]], ["a.txt", "a.txt, b.txt"]),
        (["/home/me/one/train", "/home/me/two/test"], ["../train", "../test"]),
        (["/home/me/one/train", "/home/me/two/train"], ["../one/train", "../two/train"]),
        (["/home/me/x", "/home/me/x"], ["../x", "../x"]),
        (["C:\\Users\\me\\a", "C:\\Users\\me\\b"], ["../a", "../b"]),
        (["org/model", "/models/model"], ["org/model", "../model"]),
    ],
)
def test_settings_as_text(values: list[Any], shown: list[str]) -> None:
    assert shown_setting(values) == shown


def test_names_have_as_many_folders_as_needed() -> None:
    assert short_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert short_names([Path("/r/1/a"), Path("/r/2/a"), Path("/r/2/b")]) == ["1/a", "2/a", "2/b"]


def test_circumstances_that_differ(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert differing_circumstances(read_runs([str(a), str(b)])) == {}
    with Report(console=False, metrics=b / "metrics.jsonl", append=True) as report:
        events.Hardware("cuda:0", "a GPU", "torch.bfloat16").write(report)
    (b / "ledger.json").write_text('{"train": {"rows": 16, "trained": 1700}}')
    assert differing_circumstances(read_runs([str(a), str(b)])) == {
        "training tokens": [1600, 1700],
        "device name": ["a CPU", "a GPU"],
        "compute dtype": ["float32", "bfloat16"],
    }
