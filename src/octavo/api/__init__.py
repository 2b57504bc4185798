"""The Python API: what `import octavo` offers. Each function is a command, with its options as keyword arguments.

Options, defaults and checks are those of the command line (config/options.py); the results are the documents of
`--json`. They are returned and not printed: only progress and messages go to stderr. Errors are raised as on the
command line: the classes of octavo.errors, and OSError of the system.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, overload

from octavo.api.adapter_results import AdapterDifference, CombinedAdapter, ShownAdapter
from octavo.api.export_results import ExportResult, MergeResult
from octavo.api.loading import load as load
from octavo.api.options import with_options
from octavo.api.results import (
    CompareResult,
    ConvertResult,
    EvaluateResult,
    GenerateResult,
    PlanResult,
    PushResult,
    QuantizeResult,
    RunsResult,
    TuneResult,
)
from octavo.api.run import Run as Run
from octavo.api.run import watched
from octavo.config import Config, PromptOptions, RunOptions
from octavo.config.commands import (
    ADAPTER_COMBINE,
    ADAPTER_DIFF,
    ADAPTER_SHOW,
    COMPARE,
    CONVERT,
    EVALUATE,
    EXPORT,
    FINETUNE,
    GENERATE,
    MERGE,
    PLAN,
    PUSH,
    QUANTIZE,
    RUNS,
    SERVE,
    TUNE,
)
from octavo.errors import StoppedError, UsageError
from octavo.reporting import Report
from octavo.runs.events import Event
from octavo.runs.folder import RunFolder
from octavo.stopping import StopRequest


def _report(quiet: bool) -> Report:
    """The report of a call, whose results are returned."""
    return Report(console=not quiet, results=None)


@with_options(FINETUNE, callbacks={"on_event": "A function that gets each event (octavo.runs.events) at once."})
def finetune(config: Config, quiet: bool, on_event: Callable[[Event], object] | None = None) -> Run:
    """Fine-tunes a model on text files. Writes a run folder with the adapter, metrics and a report."""
    from octavo.commands.finetune import finetune as run

    try:
        run(config, console=not quiet, results=None, observer=on_event and partial(watched, on_event))
        return Run(config[RunOptions].out)
    except StopRequest as error:
        message, hint = _stopped(config[RunOptions].out)
        raise StoppedError(message, number=error.number, hint=hint) from error
    except StoppedError as error:
        error.hint = _stopped(config[RunOptions].out)[1]
        raise


def _stopped(out: Path) -> tuple[str, str]:
    """(message, hint) of a run that a signal stopped outside its training steps, at once."""
    steps, call = RunFolder(out).steps(), f"octavo.finetune(out={str(out)!r}, resume=True)"
    if not steps:
        return "Stopped by a signal; there is no checkpoint yet.", f"{call} starts from the beginning."
    return f"Stopped by a signal; the newest checkpoint is of step {steps[-1]:,}.", f"{call} continues after it."


@with_options(TUNE)
def tune(config: Config, quiet: bool) -> TuneResult:
    """Chooses the learning rate and the LoRA rank by short runs within `minutes`, and says how sure that is."""
    from octavo.commands.tune import tune as run

    with _report(quiet) as report:
        return cast(TuneResult, run(config, report))


@with_options(EVALUATE)
def evaluate(config: Config, quiet: bool) -> EvaluateResult:
    """Measures perplexity or lm-eval tasks of the base, quantized base and tuned model, or compares schemes."""
    from octavo.commands.evaluate import evaluate as run

    with _report(quiet) as report:
        return cast(EvaluateResult, run(config, report))


class _Generate(Protocol):
    @overload
    def __call__(self, prompt: str, **options: Any) -> GenerateResult: ...
    @overload
    def __call__(self, *, prompts: str | os.PathLike[str], **options: Any) -> list[dict[str, Any]]: ...
    @overload
    def __call__(self, **options: Any) -> GenerateResult: ...


def _generate(config: Config, quiet: bool) -> GenerateResult | list[dict[str, Any]]:
    """Continues a text. With `prompts` the result is a list: the lines of the file with their answers.

    Each call loads the model: `octavo.load` loads it once for several.
    """
    from octavo.commands.generate import generate_many, generate_text

    with _report(quiet) as report:
        if config[PromptOptions].prompts is not None:
            lines: list[str] = []
            generate_many(config, report, write=lines.append)
            return [json.loads(line) for line in lines]
        if config[PromptOptions].prompt is None:
            raise UsageError("There is no prompt.", hint="Give prompt or prompts.")
        return cast(GenerateResult, generate_text(config, report, write=lambda _: None))


generate = cast(_Generate, with_options(GENERATE, positional="prompt", name="generate")(_generate))


@with_options(PLAN)
def plan(config: Config, quiet: bool) -> PlanResult:
    """Estimates the GPU memory of a fine-tuning run, without reading weights."""
    from octavo.commands.plan import plan as run

    with _report(quiet) as report:
        return cast(PlanResult, run(config, report))


@with_options(QUANTIZE)
def quantize(config: Config, quiet: bool) -> QuantizeResult:
    """Quantizes a model and writes it to a folder that loads without the original."""
    from octavo.commands.quantize import quantize as run

    with _report(quiet) as report:
        return cast(QuantizeResult, run(config, report))


@with_options(CONVERT)
def convert(config: Config, quiet: bool) -> ConvertResult:
    """Splits a model with frozen weights and trained adapters in one file into a base and an adapter of PEFT."""
    from octavo.commands.convert import convert as run

    with _report(quiet) as report:
        return cast(ConvertResult, run(config, report))


@with_options(MERGE)
def merge(config: Config, quiet: bool) -> MergeResult:
    """Merges an adapter into its base and writes a model folder, for octavo, transformers, vLLM and MLX."""
    from octavo.commands.merge import merge as run

    with _report(quiet) as report:
        return cast(MergeResult, run(config, report))


@with_options(EXPORT)
def export(config: Config, quiet: bool) -> ExportResult:
    """Writes a model or an adapter as a GGUF file, for llama.cpp, Ollama and LM Studio."""
    from octavo.commands.export import export as run

    with _report(quiet) as report:
        return cast(ExportResult, run(config, report))


# Not `runs`, as the command: `octavo.runs` is the package of run folders, and its import would replace the function.
@with_options(RUNS, positional="folders")
def list_runs(config: Config, quiet: bool) -> RunsResult:
    """Lists the runs in folders: settings, state, steps, held-out perplexity before and after training, speed."""
    from octavo.commands.run_list import list_runs as run

    with _report(quiet) as report:
        return cast(RunsResult, run(config, report))


@with_options(COMPARE, positional="runs")
def compare(config: Config, quiet: bool) -> CompareResult:
    """Compares runs: settings that differ, results, differences of the held-out loss with intervals, samples."""
    from octavo.commands.compare import compare as run

    with _report(quiet) as report:
        return cast(CompareResult, run(config, report))


@with_options(ADAPTER_SHOW, positional="adapter")
def show_adapter(config: Config, quiet: bool) -> ShownAdapter:
    """Shows an adapter: its base, targets, rank, the norm of the change by layer, and the run that it is of."""
    from octavo.commands.adapters.show import show as run

    with _report(quiet) as report:
        return cast(ShownAdapter, run(config, report))


@with_options(ADAPTER_DIFF, positional="adapters")
def diff_adapters(config: Config, quiet: bool) -> AdapterDifference:
    """Compares two adapters: base, settings, and by layer the cosine and the difference of what they change."""
    from octavo.commands.adapters.diff import diff as run

    with _report(quiet) as report:
        return cast(AdapterDifference, run(config, report))


@with_options(ADAPTER_COMBINE, positional="adapters")
def combine_adapters(config: Config, quiet: bool) -> CombinedAdapter:
    """Writes the weighted sum of `adapters`, as {"runs/a": 0.7, "runs/b": 0.3}, as one adapter in PEFT's format."""
    from octavo.commands.adapters.combine import combine as run

    with _report(quiet) as report:
        return cast(CombinedAdapter, run(config, report))


@with_options(PUSH, positional="run")
def push(config: Config, quiet: bool) -> PushResult:
    """Uploads the adapter of a run to the Hugging Face hub, with a model card, in one commit."""
    from octavo.commands.push import push as run

    with _report(quiet) as report:
        return cast(PushResult, run(config, report))


@with_options(SERVE)
def serve(config: Config, quiet: bool) -> None:
    """Serves a model and its adapters over HTTP with OpenAI's API, until SIGTERM, SIGHUP or Ctrl-C.

    Call it in the main thread, which alone receives signals. A message on stderr has the URL.
    """
    from octavo.server.serve import serve as run

    if threading.current_thread() is not threading.main_thread():
        raise UsageError("octavo.serve needs the main thread, for the signals that end it.")
    with _report(quiet) as report:
        run(config, report, listening=lambda _: None)
