"""Tasks of lm-evaluation-harness in `octavo evaluate`: loaded before any model, and run on each model."""

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

from octavo.config import EvaluateOptions
from octavo.errors import OctavoError, UsageError
from octavo.infer.loaded_model import LoadedModel
from octavo.reporting import Report

LISTED = "`lm-eval ls tasks` lists the tasks of lm-eval; --include-path names a folder with your own."


@dataclass(frozen=True)
class Tasks:
    """The dictionary of tasks and groups that lm-eval loaded, and the limit of documents for each."""

    loaded: dict[str, Any]
    limit: int | None


def load_tasks(options: EvaluateOptions, report: Report) -> Tasks | None:
    """Loads the tasks of --tasks; None without --tasks.

    Loading reads the data of a task and executes the Python code that its YAML names. UsageError without lm-eval, for
    an unknown task, and for one that cannot be loaded or run.
    """
    if not options.tasks:
        if options.include_path is not None or options.limit is not None or options.fewshot is not None:
            raise UsageError("--include-path, --limit and --fewshot need --tasks.", hint="Name tasks with --tasks.")
        return None
    if find_spec("lm_eval") is None:
        raise UsageError("Tasks need lm-evaluation-harness.", hint="pip install 'octavo[eval]'")
    if options.include_path is not None and not options.include_path.is_dir():
        raise UsageError(
            f"--include-path {options.include_path} is not a folder.", hint="Name the folder of the YAML files."
        )
    import datasets
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise it reports reads of local files to a server
    random.seed(DEFAULT_RANDOM_SEED)  # a task may sample its documents: with these seeds as lm-eval does
    np.random.seed(DEFAULT_OTHER_SEED)
    manager, names = _task_names(options)
    with redirect_stdout(sys.stderr), _quiet_lm_eval():  # the code of a task may print
        try:
            loaded: dict[str, Any] = manager.load(names)
        except Exception as error:  # missing data, templates, the code of a task: any exception
            raise _unusable(", ".join(names), error) from error
        for name, task in loaded["tasks"].items():
            _prepare_(name, task, options.fewshot, report)
    return Tasks(loaded, options.limit)


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Suppresses lm-eval's messages about default values in the YAML of a task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _task_names(options: EvaluateOptions) -> tuple[Any, list[str]]:
    """(lm-eval's TaskManager, the task names). Indexes lm-eval's 14,000 tasks, which takes seconds, only if needed."""
    from lm_eval.tasks import TaskManager

    folder = options.include_path
    if folder is not None:
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if set(options.tasks) <= set(local.all_subtasks):
            return local, list(dict.fromkeys(options.tasks))
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    names: list[str] = []
    for name in options.tasks:
        exists = name in manager.all_tasks or Path(name).is_file()
        matches = [name] if exists else manager.match_tasks([name])
        if not matches:
            near = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            broken = " lm-eval ignores files there that are not valid YAML." if folder is not None else ""
            raise UsageError(f"There is no task {name!r}.", hint=hint + LISTED + broken)
        names += matches
    return manager, list(dict.fromkeys(names))


def _prepare_(name: str, task: Any, fewshot: int | None, report: Report) -> None:
    """Sets num_fewshot and builds the requests of one document, so that errors appear before a model is loaded."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(
            f"The task {name} executes code that the model generates.",
            hint="Run it with lm-eval in a sandbox, with `octavo serve` as its local-completions model.",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"The task {name} has images or audio; octavo supports text models only.")
    configured = task.get_config("num_fewshot")
    if configured == 0 and fewshot:
        report.warn(f"The task {name} sets num_fewshot to 0 in its YAML; --fewshot is ignored.")
    elif fewshot is not None or configured is None:
        task.set_config(key="num_fewshot", value=fewshot or 0)
    try:
        with redirect_stderr(StringIO()):  # hides lm-eval's progress bar
            _seed_(task)
            task.build_all_requests(limit=1)
    except Exception as error:
        raise _unusable(name, error) from error


def _unusable(name: str, error: Exception) -> OctavoError:
    return UsageError(
        f"{name} cannot be prepared ({type(error).__name__}: {error}).",
        hint="Paths in a YAML are relative to the current folder. Data that is not on this machine needs the network.",
    )


def _seed_(task: Any) -> None:
    """Seeds the few-shot sampling, so that every model gets the same examples."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def run_tasks(tasks: Tasks, loaded: LoadedModel, *, batch: int, report: Report) -> list[dict[str, Any]]:
    """One row for each metric of each task and group, in the order of --tasks."""
    from lm_eval.evaluator import evaluate

    from octavo.harness.model import OctavoLM

    for task in tasks.loaded["tasks"].values():
        _seed_(task)
    model = OctavoLM(loaded, batch=batch, report=report)
    with redirect_stdout(sys.stderr):  # stdout is reserved for --json
        results = evaluate(model, tasks.loaded, limit=tasks.limit, log_samples=False)
    assert results is not None, "lm-eval returns None only in processes other than the first"
    return [row for name, metrics in results["results"].items() for row in _rows(name, metrics, results)]


def _rows(name: str, metrics: dict[str, Any], results: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of one task or group; lm-eval's keys are "metric,filter"."""
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
            "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
            "fewshot": results["n-shot"].get(name),
            "documents": metrics.get("sample_len"),
        })  # fmt: skip
    return rows


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def show_tasks(rows: Sequence[dict[str, Any]], report: Report) -> None:
    """Prints the table of tasks; the metric is followed by the filter of the answers, if a task has one."""

    def cells(row: dict[str, Any]) -> list[object]:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else row["stderr"]
        return [row["name"], row["scheme"], row["task"], metric, row["value"], error]

    report.table(
        "Tasks", ["name", "scheme", "task", "metric", "value", "stderr"], [cells(row) for row in rows], result=True
    )
