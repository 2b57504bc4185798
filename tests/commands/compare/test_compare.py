"""`octavo compare`: settings, results, samples and what is said of runs that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Octavo
from tests.html_report.test_html_report import MALICIOUS, Reader
from tests.run_folders import PROMPT, bits, write_run

import octavo as api
from octavo.commands.compare.read import read_runs
from octavo.reporting import Report
from octavo.runs import events

LOSSES = list(3 + 0.4 * np.random.default_rng(0).standard_normal(20))


def compared(*folders: Path) -> Any:
    return api.compare(list(folders), quiet=True)


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", settings={"lr": 1e-3, "out": "a"})
    b = write_run(tmp_path / "b", settings={"lr": 2e-3, "out": "b", "rank": 4})
    assert compared(a, b)["settings"] == {"lr": [1e-3, 2e-3], "rank": [16, 4]}
    assert compared(b, a)["settings"] == {"lr": [2e-3, 1e-3], "rank": [4, 16]}


def test_a_setting_that_a_run_lacks_has_its_default(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    text = (b / "config.yaml").read_text()
    (b / "config.yaml").write_text(text.replace("rslora: false\n", "").replace("rank: 16\n", ""))
    assert compared(a, b)["settings"] == {}


def test_the_results_are_those_of_each_run(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", before=[4.0] * 20, after=[3.5] * 20)
    b = write_run(tmp_path / "b", steps=2)
    first, second = compared(a, b)["runs"]
    assert (first["letter"], first["state"], second["letter"], second["state"]) == ("A", "finished", "B", "stopped")
    assert [row["perplexity"] for row in first["rows"]] == pytest.approx([np.exp(4.0), np.exp(3.5)])
    assert second["rows"] == []
    assert first["training_seconds"] == pytest.approx(4 * 512 / 800)
    assert [step for step, _ in first["held_out"]] == [0, 2, 4]
    assert [loss for _, loss in first["held_out"]] == pytest.approx([4.0, 3.8, 3.6], rel=1e-5)
    assert first["peak_memory_bytes"] == 2**30


def test_a_scaled_curve_has_other_held_out_losses_and_no_training_losses(tmp_path: Path) -> None:
    run = read_runs([str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b"))])[0]
    assert run.curve().training == run.training
    assert run.curve(0.5).training == []
    assert run.curve(0.5).held_out == [(step, loss / 2) for step, loss in run.held_out]


def test_samples_of_the_same_prompt_are_side_by_side(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", sample="one"), write_run(tmp_path / "b", sample="two")
    with Report(console=False, metrics=b / "metrics.jsonl", append=True) as report:
        events.Sample(4, "another prompt", "x", "tuned").write(report)
    assert compared(a, b)["samples"] == [{"prompt": PROMPT, "texts": ["one", "two"]}]
    stopped = write_run(tmp_path / "c", steps=2)  # it has a sample of the base alone
    assert compared(a, stopped)["samples"] == []


def test_the_terminal_shows_all_of_it(octavo: Octavo, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", settings={"lr": 1e-3}, after=LOSSES, sample="one")
    b = write_run(tmp_path / "b", settings={"lr": 2e-3}, after=[loss - 0.2 for loss in LOSSES], sample="two")
    out = octavo("compare", a, b).out
    assert f"A  {a}\nB  {b}\n" in out
    assert "0.001" in out
    # 0.2 nats per token, times the tokens, over 10,000 bytes and log 2
    assert f"The loss of B (b) is {bits([0.2] * len(LOSSES), 10_000):.4f} bits per byte lower than that of A (a)" in out
    assert "Its perplexity is 18.1 % lower" in out
    assert "A: one\nB: two" in out
    assert "rank" not in out


def test_runs_that_are_equal_have_no_settings_that_differ(octavo: Octavo, tmp_path: Path) -> None:
    out = octavo("compare", write_run(tmp_path / "a"), write_run(tmp_path / "b")).out
    assert "Settings that differ: none" in out
    assert "There is no difference between the losses of B (b) and A (a)" in out
    assert "Its perplexity" not in out


def test_with_json_stdout_has_one_document(octavo: Octavo, tmp_path: Path) -> None:
    done = octavo("compare", write_run(tmp_path / "a"), write_run(tmp_path / "b"), "--json")
    assert json.loads(done.out)["differences"][0]["comparable"] == "loss"


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_or_too_many_runs(octavo: Octavo, tmp_path: Path, count: int) -> None:
    folders = [write_run(tmp_path / f"{number}") for number in range(count)]
    done = octavo("compare", *folders)
    assert done.code == 2
    assert f"needs 2 to 8 runs, not {count}" in done.err


def test_folders_that_are_no_runs(octavo: Octavo, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    for other, message in ((tmp_path / "none", "no folder"), (tmp_path / "empty", "no run"), (run, "given twice")):
        done = octavo("compare", run, other)
        assert done.code == 2
        assert message in done.err
    broken = write_run(tmp_path / "broken")
    (broken / "run.json").write_text('{"format": 99}')
    assert "format version 99" in octavo("compare", run, broken).err


def test_a_damaged_metrics_file_is_no_traceback(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (b / "metrics.jsonl").write_bytes(b"\xff\x00\n{}\n")
    (b / "ledger.json").write_text("[")
    (b / "config.yaml").unlink()
    document = compared(a, b)
    assert document["runs"][1]["state"] == "stopped"
    assert document["differences"][0]["comparable"] == "nothing"


@pytest.mark.parametrize("value", ["nan", -1, 1e308, 0])
def test_any_number_in_an_event_can_be_compared(tmp_path: Path, value: object) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    lines = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.update({key: value for key, old in line.items() if isinstance(old, float)})
    for row in lines[-2]["rows"]:
        row.update({key: value for key, old in row.items() if isinstance(old, float)})
    (b / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    document = api.compare([a, b], report=tmp_path / "page.html", quiet=True)
    assert document["runs"][1]["state"] == "finished"


def test_the_page_is_complete_and_self_contained(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", sample=MALICIOUS, settings={"data": [MALICIOUS.replace("\x00", "")]})
    b = write_run(tmp_path / "b", sample="two")
    page = tmp_path / "page.html"
    assert api.compare([a, b], report=page, quiet=True)["report"] == str(page)
    html = page.read_text("utf-8")
    reader = Reader(html)
    assert not reader.tags & {"script", "img", "link", "iframe"}
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "href")]
    titles = ["Differences", "Results", "Settings that differ", "Loss curves", "Samples"]
    assert [reader.text.index(title) for title in titles] == sorted(reader.text.index(title) for title in titles)
    assert "two" in reader.text
    assert html.count('class="thin"') == 2  # a training curve for each run
    assert html.count('class="mark"') == 6  # three held-out losses of each run
    assert str(tmp_path) not in html  # no absolute path


def test_a_page_of_eight_runs_has_eight_colors(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"r{number}", settings={"seed": number}) for number in range(8)]
    api.compare(folders, report=tmp_path / "page.html", quiet=True)
    html = (tmp_path / "page.html").read_text("utf-8")
    for number in range(8):
        assert html.count(f"--run-{number}: #") == 2  # on a light and on a dark page
        assert f'stroke="var(--run-{number})"' in html


def test_the_curves_are_in_bits_per_byte_under_two_tokenizers(octavo: Octavo, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", before=[4.0] * 20)
    b = write_run(tmp_path / "b", before=[2.0] * 40, labels="other", n_bytes=10_050)
    octavo("compare", a, b, "--report", tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "Loss in bits per byte" in html
    assert 'class="thin"' not in html  # the bytes of the training text are unknown
    assert bits([4.0] * 20, 10_000) == pytest.approx(1.154, abs=1e-3)
    out = octavo("compare", a, b).out
    assert "Held-out loss in bits per byte" in out
    assert "the same held-out text has other tokens" in out
