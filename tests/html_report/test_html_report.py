"""report.html: complete, self-contained, safe for any text of the run, with correct charts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from octavo import html_report
from octavo.errors import DataError, UsageError
from octavo.html_report import chart
from octavo.html_report.paths import last_name, without_folders
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.packed_numbers import pack_counts, pack_floats

MALICIOUS = "</pre><script>alert('1')</script>\"'><img src=x onerror=alert(2)>&lt;\x00"
VOID = {"meta", "circle", "path"}


class Reader(HTMLParser):
    """Checks that tags close in order; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def ledger(*sources: str) -> dict[str, Any]:
    counts = {"documents": 1, "tokens": 1214, "trained": 1200, "masked": 4, "left_out": 10, "padding": 20}
    return {**counts, "rows": 3, "files": [{"source": source, **counts} for source in sources]}


def run_folder(folder: Path, *, text: str = "plain", steps: int = 30) -> Path:
    """A complete run folder, with `text` in every place where the user's text can occur."""
    folder.mkdir(exist_ok=True)
    with Report(console=False, metrics=folder / "metrics.jsonl") as report:
        events.Hardware("cpu", text, "torch.float32").write(report)
        events.Versions(torch=f"2.13.0 {text}").write(report)
        events.Overlap(share=0.0312, ngram=13, removed_documents=1, near_copies=2, removed=(text,)).write(report)
        report.warn(text)
        events.Sample(0, f"PROMPT {text}", f"first {text}", "base").write(report)
        for step in range(1, steps + 1):
            loss = float("nan") if step == 2 else 4 - step / steps
            events.Step(step, loss, 1e-3 / step, 1.0, tokens=512, tokens_per_second=800.5).write(report)
        events.Sample(9, f"PROMPT {text}", f"midway {text}", "training").write(report)
        events.HeldOut(10, 3.9, 49.4).write(report)
        events.Sample(30, f"PROMPT {text}", f"PROMPT {text} last", "tuned").write(report)
        bounds = events.Interval(4.25, 4.5, 20, "documents")
        before = events.ScoreRow(f"base {text}", "int8", None, 80.0, 1.5, 52123, loss=4.382, interval=bounds)
        after = events.ScoreRow(f"tuned {text}", "int8", text, 60.0, 1.5, 52123)
        gain = events.Difference(
            before.name, "int8", after.name, "int8", 0.288, events.Interval(0.25, 0.31, 20, "documents")
        )
        events.Evaluation(30, (before, after), (gain, events.Difference("a", "int8", "b", "int8", 0.5))).write(report)
    (folder / "ledger.json").write_text(json.dumps({"train": ledger(text, "b.txt"), "test": ledger("c.txt")}))
    (folder / "config.yaml").write_text(f"model: {text}\n")
    return folder


def parse_report(folder: Path) -> Reader:
    return Reader(html_report.write(folder).read_text("utf-8"))


def test_a_complete_run_has_every_section(tmp_path: Path) -> None:
    written = html_report.write(run_folder(tmp_path / "run"))
    assert written == tmp_path / "run" / "report.html"
    html = written.read_text("utf-8")
    assert titles_of(html) == [
        "Training", "Held-out text", "Samples", "Go on", "Warnings", "Token ledger", "Settings", "Hardware",
        "Versions",
    ]  # fmt: skip
    assert html.count("<svg") == 4
    assert not (tmp_path / "run" / "report.html.aside").exists()


def without_commands(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("octavo "))


def titles_of(html: str) -> list[str]:
    """The headings of the sections, those of folded ones too."""
    return re.findall(r'(?:<h2>|<details class="folded">\n<summary>)(.*?)</', html)


def test_summary(tmp_path: Path) -> None:
    found = events.read(run_folder(tmp_path / "run") / "metrics.jsonl")
    text = html_report.summary(found)
    assert text.startswith("30 steps, training loss 3.0")
    assert text.endswith("bits per byte, perplexity 80.00 -> 60.00 (base plain -> tuned plain)")


def test_the_head_has_model_device_date_and_the_figures(tmp_path: Path) -> None:
    page = parse_report(run_folder(tmp_path / "run"))
    head = page.text[: page.text.index("Loss in nats")]
    assert "plain \N{MIDDLE DOT} int8 base \N{MIDDLE DOT} plain, float32 \N{MIDDLE DOT} 20" in head
    assert "Held-out perplexity80.00 \N{RIGHTWARDS ARROW} 60.00base plain" in head
    assert "Trained15,360 tokens30 steps" in head
    assert f"Time of the steps{30 * 512 / 800.5:.0f} s800 tokens/s" in head.replace("801", "800")


@pytest.mark.parametrize(
    ("difference", "low", "high", "css_class"),
    [(0.288, 0.25, 0.31, "better"), (-0.288, -0.31, -0.25, "worse"), (0.01, -0.02, 0.04, "unclear")],
)
def test_the_gain_is_marked_by_its_interval(
    tmp_path: Path, difference: float, low: float, high: float, css_class: str
) -> None:
    folder = run_folder(tmp_path / "run")
    with Report(console=False, metrics=folder / "metrics.jsonl", append=True) as report:
        rows = (
            events.ScoreRow("base", "int8", None, 80.0, 1.5, 5000, loss=4.382),
            events.ScoreRow("tuned", "int8", None, 60.0, 1.4, 5000, loss=4.094),
        )
        bounds = events.Interval(low, high, 20, "documents")
        gain = events.Difference("base", "int8", "tuned", "int8", difference, bounds)
        events.Evaluation(30, rows, (gain,)).write(report)
    assert ("class", f"figure {css_class}") in parse_report(folder).attributes


def test_no_absolute_path_is_on_the_page(tmp_path: Path) -> None:
    """Of the settings, the ledger, warnings and files; the texts of samples are as they were generated."""
    folder, private = run_folder(tmp_path / "run"), "/home/anna/private"
    (folder / "config.yaml").write_text(f"model: {private}/model\ndata:\n- {private}/texts\n")
    (folder / "ledger.json").write_text(json.dumps({"train": ledger(f"{private}/texts/a.txt", "b.txt")}))
    with Report(console=False, metrics=folder / "metrics.jsonl", append=True) as report:
        report.warn(f"{private}/texts/b.bin is not read.")
        rows = (events.ScoreRow("base", perplexity=80.0), events.ScoreRow("tuned", adapter=private, perplexity=60.0))
        files = tuple(events.FileDifference(f"{private}/{name}.txt", 100, 0.1) for name in "cd")
        events.Evaluation(30, rows, (), files).write(report)
    html = html_report.write(folder).read_text("utf-8")
    assert "anna" not in html
    assert str(tmp_path) not in html
    assert {"../model", "../texts", "../a.txt", "../b.bin", "../c.txt"} <= {*re.findall(r"\.\./[\w.]+", html)}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/texts/a.txt", "../a.txt"),
        ("data:\n- '/srv/x/y'", "data:\n- '../y'"),
        (r"in C:\Users\me\a.txt, line 3", "in ../a.txt, line 3"),
        ("~/texts/a.txt", "../a.txt"),
        ("runs/mine/adapter", "runs/mine/adapter"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("km/h and 1/2/3 or a /flag", "km/h and 1/2/3 or a /flag"),
    ],
)
def test_absolute_paths_are_shortened_to_their_last_name(text: str, shown: str) -> None:
    assert without_folders(text) == shown


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/anna lee/my texts/a b.txt", "../a b.txt"),
        (r"C:\\Users\\Anna Lee\\a.txt".replace("\\\\", "\\"), "../a.txt"),
        ("/home/jo'hn/x.txt", "../x.txt"),
        ("../anna/secret/x.txt", "../x.txt"),
        ("file:///home/anna/x.txt", "../x.txt"),
        ("texts/my book/a b.txt", "texts/my book/a b.txt"),
        ("hf:owner/name/train.jsonl", "hf:owner/name/train.jsonl"),
    ],
)
def test_a_path_that_is_known_as_one_is_shortened_whatever_its_name(path: str, shown: str) -> None:
    assert last_name(path) == shown


def test_the_commands_of_an_unfinished_run_resume_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder(Path("runs-mine"))
    finished = parse_report(Path("runs-mine")).text
    assert "octavo generate --model plain --adapter runs-mine --prompt" in finished
    assert "--resume" not in finished
    lines = Path("runs-mine/metrics.jsonl").read_bytes().splitlines(keepends=True)
    Path("runs-mine/metrics.jsonl").write_bytes(b"".join(line for line in lines if b'"evaluation"' not in line))
    unfinished = parse_report(Path("runs-mine")).text
    assert "octavo finetune --resume --out runs-mine" in unfinished
    assert "octavo generate" not in unfinished


def test_the_curve_begins_before_training_and_its_lowest_point_is_marked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    bounds = events.Interval(0.1, 0.3, 20, "documents")
    with Report(console=False, metrics=folder / "metrics.jsonl") as report:
        nats, tokens = pack_floats([30.0, 50.0]), pack_counts([10, 10])
        events.HeldOutLosses(0, "quantized base", "documents", nats, tokens).write(report)
        for step, loss in ((1, 3.5), (2, 3.2), (3, 3.4)):
            events.Step(step, 3.0).write(report)
            events.HeldOut(step, loss, fall=bounds).write(report)
    html = html_report.write(folder).read_text("utf-8")
    marks = re.findall(r'<circle cx="([^"]+)" cy="([^"]+)"', html)
    assert len(marks) == 4
    assert float(marks[0][0]) == 58.0  # step 0 is the left end
    [(x, y)] = re.findall(r'<circle class="ring" cx="([^"]+)" cy="([^"]+)"', html)
    assert (x, y) == marks[2]
    [bars] = re.findall('<path class="bars"[^>]* d="([^"]+)"', html)
    assert bars.count("V") == 3
    assert "lowest held out: step 2" in html


def test_the_differences_by_file_are_shown_the_smaller_files_folded(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    files = tuple(events.FileDifference(f"{n}.txt", 100 + n, 0.1 * n) for n in range(15))
    with Report(console=False, metrics=folder / "metrics.jsonl", append=True) as report:
        rows = (events.ScoreRow("base", perplexity=80.0), events.ScoreRow("tuned", perplexity=60.0))
        events.Evaluation(30, rows, (), files).write(report)
    html = html_report.write(folder).read_text("utf-8")
    by_file = html[html.index("By file") :]
    assert (
        by_file.index("14.txt") < by_file.index(">3.txt") < by_file.index("3 smaller files") < by_file.index(">2.txt")
    )


def test_the_interval_of_the_loss_and_of_its_difference_are_shown(tmp_path: Path) -> None:
    text = parse_report(run_folder(tmp_path / "run")).text
    assert "1.455 to 1.540" in text  # 4.25 to 4.5 nats per token, times 1.5 / 4.382
    minus = "\N{MINUS SIGN}"
    size = "0.0986 bits per byte (95 % interval 0.0856 to 0.106, over 20 do"
    assert f"loss of base plain {minus} loss of tuned plain: {size}" in text
    assert "nats" not in text[text.index("Held-out text") : text.index("Samples")]


def test_the_overlap_is_shown(tmp_path: Path) -> None:
    text = parse_report(run_folder(tmp_path / "run")).text
    assert "3.1 % of the held-out text is also in the training text, in runs of 13 tokens" in text
    assert "removed from training: 1 document; near copies: 2 documents." in text


def test_text_is_escaped(tmp_path: Path) -> None:
    harmless, malicious = (
        parse_report(run_folder(tmp_path / "a")),
        parse_report(run_folder(tmp_path / "b", text=MALICIOUS)),
    )
    assert malicious.tags == harmless.tags
    assert {name for name, _ in malicious.attributes} == {name for name, _ in harmless.attributes}
    shown = MALICIOUS.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    # A shell's quotes change it in the commands.
    assert without_commands(malicious.text).count(shown) == without_commands(harmless.text).count("plain") > 10


def test_repeated_bos_tokens_are_a_column_of_the_ledger_if_there_are_any(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    assert "repeated bos" not in parse_report(folder).text
    repeated = {**ledger("a.txt"), "repeated_bos": 7}
    (folder / "ledger.json").write_text(json.dumps({"train": repeated, "test": {**ledger("c"), "repeated_bos": 0}}))
    assert parse_report(folder).text.count("repeated bos") == 1


def test_held_out_tokens_are_scored_not_trained(tmp_path: Path) -> None:
    text = parse_report(run_folder(tmp_path / "run")).text
    ledgers = text[text.index("Token ledger") :]
    assert ledgers.index("trained") < ledgers.index("test file") < ledgers.index("scored")
    assert "trained" not in ledgers[ledgers.index("test file") : ledgers.index("scored")]


def test_the_folder_name_is_escaped(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "<script>&")
    page = parse_report(folder)
    assert "script" not in page.tags
    assert "<script>&" in page.text


def test_the_page_loads_no_resources(tmp_path: Path) -> None:
    page = parse_report(run_folder(tmp_path / "run"))
    names = {name for name, _ in page.attributes}
    assert names.isdisjoint({"src", "href", "srcset", "xlink:href", "action"})
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"url\(|@import|https?:", html_report.write(tmp_path / "run").read_text("utf-8"))


@pytest.mark.parametrize(
    ("missing", "title"),
    [("ledger.json", "Token ledger"), ("config.yaml", "Settings"), ("metrics.jsonl", "Training")],
)
def test_a_missing_file_omits_its_section_only(tmp_path: Path, missing: str, title: str) -> None:
    folder = run_folder(tmp_path / "run")
    all_titles = titles_of(html_report.write(folder).read_text("utf-8"))
    (folder / missing).unlink()
    titles = titles_of(html_report.write(folder).read_text("utf-8"))
    from_metrics = {"Verdict", "Training", "Held-out text", "Samples", "Warnings", "Hardware", "Versions"}
    omitted = from_metrics if missing == "metrics.jsonl" else {title}
    omitted |= {"Go on"} if missing == "config.yaml" else set()
    assert titles == [name for name in all_titles if name not in omitted]


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    assert "not evaluated yet" in parse_report(tmp_path).text


def test_a_run_killed_during_a_write_has_a_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:13]) + lines[13][:30])
    html = html_report.write(folder).read_text("utf-8")
    assert "8 steps" in html
    assert "not evaluated yet" in html
    assert "Held-out text" not in html


def test_values_that_are_not_finite_are_not_drawn(tmp_path: Path) -> None:
    values = ["3.5", "NaN", "1e999", '"inf"', "null", "true", "3.0"]
    lines = [f'{{"event": "step", "step": {step}, "loss": {loss}}}\n' for step, loss in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = parse_report(tmp_path)
    [dots] = [value for name, value in page.attributes if name == "d" and "h0M" in value]
    assert dots.count("M") == 2
    assert "6 steps" in page.text


def test_each_sample_shows_its_prompt_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    html = html_report.write(folder).read_text("utf-8")
    assert html.count("PROMPT plain") == 1
    assert html.index("first plain") < html.index(" last</pre>") < html.index("midway plain")


def test_a_ledger_of_many_files_ends_with_its_total(tmp_path: Path) -> None:
    sources = [f"{number}.txt" for number in range(100)]
    (tmp_path / "ledger.json").write_text(json.dumps(ledger(*sources)))
    html = html_report.write(tmp_path).read_text("utf-8")
    assert html.count(".txt") == 60
    assert "and 40 smaller files" in html
    assert html.count('<tr class="total"><td>all</td>') == 1


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_an_invalid_ledger_is_an_error_with_the_file_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(DataError, match=r"ledger\.json"):
        html_report.write(tmp_path)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none"):
        html_report.write(tmp_path / "none")


def test_the_page_of_a_long_run_is_small(tmp_path: Path) -> None:
    with Report(console=False, metrics=tmp_path / "metrics.jsonl") as report:
        for step in range(1, 6001):
            events.Step(step, 3.0, 1e-4).write(report)
    assert html_report.write(tmp_path).stat().st_size < 100_000


numbers = st.floats(-1e12, 1e12, allow_nan=False)


@given(points=st.lists(st.tuples(st.integers(0, 10**7), numbers), min_size=1, max_size=40))
def test_every_point_is_inside_the_frame(points: list[tuple[int, float]]) -> None:
    series = [chart.Series("s", [(float(x), y) for x, y in points], "train", chart.marks)]
    svg = chart.draw("t", series, width=300, height=200)
    circles = re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg)
    assert len(circles) == len(points)
    for x, y in circles:
        assert 58 <= float(x) <= 286
        assert 10 <= float(y) <= 160


def test_larger_values_are_higher_and_later_steps_further_right() -> None:
    series = [chart.Series("s", [(1.0, 2.0), (2.0, 3.0)], "train", chart.marks)]
    (x1, y1), (x2, y2) = re.findall(r'cx="([^"]+)" cy="([^"]+)"', chart.draw("t", series, width=300, height=200))
    assert float(x1) < float(x2)
    assert float(y1) > float(y2)


@given(low=numbers, high=numbers, most=st.integers(1, 12))
@example(low=1e12, high=1e12 + 2**-12, most=4)
@example(low=0.0, high=0.0, most=4)
def test_ticks_are_few_even_and_cover_the_data(low: float, high: float, most: int) -> None:
    low, high = min(low, high), max(low, high)
    page = chart.ticks(low, high, most)
    step = page[1] - page[0]
    slack = step * 1e-6 + abs(high) * 1e-9 + abs(low) * 1e-9
    assert page[0] <= low + slack
    assert page[-1] >= high - slack
    assert 2 <= len(page) <= most + 3
    assert f"{step:.6e}"[0] in "1259"


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 0.002, ["0", "0.0005", "0.001", "0.0015", "0.002"]),
        (2.87, 4.3, ["2.5", "3.0", "3.5", "4.0", "4.5"]),
        (0.0, 4e-5, ["0", "1e-05", "2e-05", "3e-05", "4e-05"]),
        (800.0, 2600.0, ["500", "1,000", "1,500", "2,000", "2,500", "3,000"]),
    ],
)
def test_tick_labels_have_enough_digits(low: float, high: float, labels: list[str]) -> None:
    page = chart.ticks(low, high, 4)
    assert [chart._tick(tick, page) for tick in page] == labels


@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=200))
@example(values=[5.0] * 300)
def test_smoothing_is_within_the_values_and_starts_at_the_first(values: list[float]) -> None:
    smoothed = [y for _, y in chart.smooth([(float(x), y) for x, y in enumerate(values)])]
    assert len(smoothed) == len(values)
    assert smoothed[0] == pytest.approx(values[0])
    assert min(values) - 1e-6 <= min(smoothed) <= max(smoothed) <= max(values) + 1e-6
