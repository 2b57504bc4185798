"""Tasks of lm-evaluation-harness in `octavo evaluate`: found, loaded before any model is, and put to each model."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from octavo.commands.generate import Speaker
from octavo.config import EvaluateOptions
from octavo.errors import OctavoError, UsageError
from octavo.reporting import Report

LISTED = "`lm-eval ls tasks` lists the known ones; --include-path names a folder with your own."


@dataclass(frozen=True)
class Tasks:
    """What `lm_eval` loaded: its dictionary of tasks and groups, and how many documents of each to take."""

    loaded: dict[str, Any]
    limit: int | None


def load_tasks(options: EvaluateOptions, report: Report) -> Tasks | None:
    """The tasks asked for, ready to be put to a model; None if none are.

    Loading reads the data of a task and runs the Python code that its YAML names. UsageError without lm-eval, for
    a task that there is not, and for one that cannot be asked.
    """
    if not options.tasks:
        if options.include_path is not None or options.limit is not None or options.fewshot is not None:
            raise UsageError("--include-path, --limit and --fewshot are about tasks.", hint="Name some with --tasks.")
        return None
    if find_spec("lm_eval") is None:
        raise UsageError("Tasks need lm-evaluation-harness.", hint="pip install 'octavo[eval]'")
    if options.include_path is not None and not options.include_path.is_dir():
        raise UsageError(f"--include-path {options.include_path} is not a folder.", hint="Name the folder of the YAML.")
    import datasets
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell a server that a local file was read
    random.seed(DEFAULT_RANDOM_SEED)  # a task may draw its documents: they are then those that lm-eval draws
    np.random.seed(DEFAULT_OTHER_SEED)
    manager, names = _found(options)
    with redirect_stdout(sys.stderr), _hushed():  # a task's code may print
        try:
            loaded: dict[str, Any] = manager.load(names)
        except Exception as error:  # data that is not there, a template, the task's own code: whatever it runs into
            raise _unusable(", ".join(names), error) from error
        for name, task in loaded["tasks"].items():
            _prepare_(name, task, options.fewshot, report)
    return Tasks(loaded, options.limit)


@contextmanager
def _hushed() -> Iterator[None]:
    """Without lm-eval's remarks on every default that a task's YAML leaves to it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _found(options: EvaluateOptions) -> tuple[Any, list[str]]:
    """(lm-eval's manager, the names to load). Its 14,000 own tasks take seconds to index: only if one is asked for."""
    from lm_eval.tasks import TaskManager

    folder = options.include_path
    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(options.tasks) <= set(own.all_subtasks):
            return own, list(dict.fromkeys(options.tasks))
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    names: list[str] = []
    for asked in options.tasks:
        known = asked in manager.all_tasks or Path(asked).is_file()
        matches = [asked] if known else manager.match_tasks([asked])
        if not matches:
            near = get_close_matches(asked, manager.all_tasks, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            broken = " A file there that is no valid YAML is passed over." if folder is not None else ""
            raise UsageError(f"There is no task {asked!r}.", hint=hint + LISTED + broken)
        names += matches
    return manager, list(dict.fromkeys(names))


def _prepare_(name: str, task: Any, fewshot: int | None, report: Report) -> None:
    """Sets the examples in front, and builds one document's requests, so that what is wrong shows before a model."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"The task {name} runs code that the model writes.",
            hint="Give it to lm-eval in a sandbox, with `octavo serve` as its local-completions model.",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"The task {name} shows pictures or sound; octavo's models read text.")
    own = task.get_config("num_fewshot")
    if own == 0 and fewshot:
        report.warn(f"The task {name} is asked without examples, as its YAML says; --fewshot is left out.")
    elif fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=fewshot or 0)
    try:
        with redirect_stderr(StringIO()):  # lm-eval's own bar
            _seed_(task)
            task.build_all_requests(limit=1)
    except Exception as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> OctavoError:
    return UsageError(
        f"{name} cannot be made ready ({type(error).__name__}: {error}).",
        hint="Paths in a YAML count from the current folder. Data that is not on this machine needs the network.",
    )


def _seed_(task: Any) -> None:
    """Every model gets the same examples in front of a document."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def run_tasks(tasks: Tasks, speaker: Speaker, *, batch: int, report: Report) -> list[dict[str, Any]]:
    """One row for each metric of each task and group, in the order asked for."""
    from lm_eval.evaluator import evaluate

    from octavo.harness.model import OctavoLM

    for task in tasks.loaded["tasks"].values():
        _seed_(task)
    asked = OctavoLM(speaker, batch=batch, report=report)
    with redirect_stdout(sys.stderr):  # stdout is --json's
        found = evaluate(asked, tasks.loaded, limit=tasks.limit, log_samples=False)
    assert found is not None, "there is one process"
    return [row for name, metrics in found["results"].items() for row in _rows(name, metrics, found)]


def _rows(name: str, metrics: dict[str, Any], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of one task or group, which lm-eval keys by "metric,filter"."""
    rows = []
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        rows.append({
            "task": name,
            "metric": metric,
            "filter": filtered,
            "value": _plain(value),
            "stderr": _plain(error) if isinstance(error, float | np.floating) else None,
            "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
            "fewshot": found["n-shot"].get(name),
            "documents": metrics.get("sample_len"),
        })  # fmt: skip
    return rows


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def show_tasks(rows: Sequence[dict[str, Any]], report: Report) -> None:
    """The table of tasks; a filter of answers is named beside the metric where a task has one."""

    def cells(row: dict[str, Any]) -> list[object]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else row["stderr"]
        return [row["name"], row["scheme"], row["task"], metric, row["value"], error]

    report.table(
        "Tasks", ["name", "scheme", "task", "metric", "value", "stderr"], [cells(row) for row in rows], result=True
    )
