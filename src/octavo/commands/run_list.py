"""`octavo runs`: finds run folders and lists them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.commands.run_summary import RunSummary, summarize
from octavo.config import Config, RunsOptions
from octavo.errors import UsageError
from octavo.reporting import Report, shown
from octavo.runs.loss_unit import NATS

# Folders that contain no runs of the user, but thousands of folders.
NOT_SEARCHED = frozenset({"node_modules", "__pycache__", "site-packages", "venv"})
MIN_PROGRESS = 100  # runs, from which on reading them takes a second
ONE_LINE_WIDTH = 140  # columns of a terminal from which on a run has one line, else two
MAX_FOLDERS = 20_000  # that are searched: more are a mistake, like the root of a file system

# Of --sort: what is compared. Runs without it come last.
_KEYS: dict[str, Callable[[RunSummary], Any]] = {
    "date": lambda run: run.started,
    "name": lambda run: str(run.path),
    "perplexity": lambda run: run.perplexity_after,
    "gain": lambda run: run.difference.lower_by if run.difference else None,
    "steps": lambda run: run.steps,
    "speed": lambda run: run.tokens_per_second,
}
_LARGEST_FIRST = frozenset({"date", "gain", "steps", "speed"})


def list_runs(config: Config, report: Report) -> dict[str, Any]:
    """Prints the table of run folders; returns the JSON result. UsageError for a folder that does not exist."""
    options = config[RunsOptions]
    given = options.folders or ["."]
    paths = list(dict.fromkeys(path for folder in given for path in _found(Path(folder), options.depth, report)))
    summaries = ordered(_read(paths, report), options.sort)
    if summaries:
        _show(summaries, report)
    else:
        report.say(
            f"There are no runs in {', '.join(given)} and {options.depth} levels below; --depth sets the levels."
        )
    return {"runs": [to_dict(summary) for summary in summaries]}


def _read(paths: Sequence[Path], report: Report) -> list[RunSummary]:
    if len(paths) < MIN_PROGRESS:
        return [summarize(path) for path in paths]
    summaries = []
    with report.progress(len(paths), "Reading run folders") as bar:
        for path in paths:
            summaries.append(summarize(path))
            bar.advance()
    return summaries


def ordered(summaries: Iterable[RunSummary], sort: str) -> list[RunSummary]:
    """The runs in the order of `sort`; those without a value of it last. Equal ones in the order of their names."""
    key = _KEYS[sort]
    by_name = sorted(summaries, key=lambda run: str(run.path))
    having = [run for run in by_name if (value := key(run)) is not None and not _is_nan(value)]
    missing = [run for run in by_name if not any(run is one for one in having)]
    return [*sorted(having, key=key, reverse=sort in _LARGEST_FIRST), *missing]


def to_dict(run: RunSummary) -> dict[str, Any]:
    """The JSON object of a run."""
    return {
        "path": str(run.path),
        "state": run.state,
        "problem": run.problem or None,
        "model": run.model or None,
        "data": run.data,
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "perplexity_before": run.perplexity_before,
        "perplexity_after": run.perplexity_after,
        "difference": asdict(run.difference) if run.difference else None,
        "tokens_per_second": run.tokens_per_second,
        "started": run.started,
        "device": run.device or None,
    }


def _found(folder: Path, depth: int, report: Report) -> list[Path]:
    """The run folders in `folder`, itself included, down to `depth` levels below."""
    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.", hint="Give folders that contain runs; default: this one.")
    paths = []
    for count, (path, is_run) in enumerate(_walk(folder, depth)):
        if count == MAX_FOLDERS:
            report.warn(f"{folder}: only {MAX_FOLDERS:,} folders are searched. Name a smaller folder, or less --depth.")
            break
        if is_run:
            paths.append(path)
    return paths


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is a run) for each folder down to `depth` levels, the nearest first.

    Not searched: the insides of runs, hidden folders, links, and folders that cannot be read.
    """
    level = [folder]
    for remaining in range(depth, -1, -1):
        below: list[Path] = []
        for path in level:
            try:
                with os.scandir(path) as entries:
                    kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
            except OSError:
                continue
            is_run = _is_run(kinds)
            yield path, is_run
            if not is_run and remaining:
                names = [name for name, is_folder in kinds.items() if is_folder and not name.startswith(".")]
                below += [path / name for name in sorted(names) if name not in NOT_SEARCHED]
        level = below


def _is_run(names: Iterable[str]) -> bool:
    """Whether a folder with these names is a run, also a damaged one: run.json, or two other files of a run."""
    return "run.json" in names or len({"metrics.jsonl", "config.yaml", "ledger.json", "checkpoints"} & set(names)) > 1


def _show(summaries: list[RunSummary], report: Report) -> None:
    columns = ["run", "state", "steps", "model", "data", "perplexity", "gain", "tokens/s", "started (UTC)"]
    cells = [
        [
            str(run.path),
            run.state,
            f"{run.steps:,} / {'?' if run.planned_steps is None else format(run.planned_steps, ',')}",
            _base_name(run.model),
            _data(run.data),
            _change(run),
            _gain(run),
            "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            (run.started or "")[:16].replace("T", " "),
        ]
        for run in summaries
    ]
    if report.width < ONE_LINE_WIDTH:
        columns = _in_pairs(columns)
        cells = [_in_pairs(line) for line in cells]
    report.table(f"{len(summaries):,} run{'s' * (len(summaries) != 1)}", columns, cells, result=True)
    for run in summaries:
        if run.problem:
            report.result(f"{run.path}: {run.problem}")
    if any(run.perplexity_after is not None for run in summaries):
        report.explain(
            "gain: in bits per byte of the held-out text, with the 95% interval. Perplexities on other held-out text "
            "or of another tokenizer cannot be compared: `octavo compare` checks this."
        )


def _in_pairs(line: list[str]) -> list[str]:
    """The first cell, then pairs of cells on two lines of one cell."""
    return [line[0], *(f"{upper}\n{lower}" for upper, lower in zip(line[1::2], line[2::2], strict=True))]


def _change(run: RunSummary) -> str:
    if run.perplexity_after is None:
        return "" if run.perplexity_before is None else f"{shown(run.perplexity_before)} ->"
    before = "?" if run.perplexity_before is None else shown(run.perplexity_before)
    return f"{before} -> {shown(run.perplexity_after)}"


def _gain(run: RunSummary) -> str:
    if run.difference is None or run.difference.lower_by is None:
        return ""
    interval = ""
    if run.difference.interval:
        low, high = run.unit.bounds(run.difference.interval)
        interval = f" ({shown(low)} to {shown(high)})"
    name = f" {run.unit.name}" if run.unit is NATS else ""
    return shown(run.unit.of(run.difference.lower_by)) + name + interval


def _base_name(path: str) -> str:
    """The last part of a path; of a hub id too."""
    return path.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _data(paths: list[str]) -> str:
    """The name of the first file or folder, and how many more there are."""
    if not paths:
        return ""
    return _base_name(paths[0]) + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else "")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
