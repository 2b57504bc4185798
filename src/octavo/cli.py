"""The command `octavo`. Each subcommand is a short function that imports torch and transformers lazily.

Results go to stdout, progress and messages to stderr. With --json stdout gets one JSON document only. Exit codes are
in exits.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from octavo._version import __version__
from octavo.config import DEMO, Config, DataOptions, ModelOptions, PromptOptions, TextOptions, commands
from octavo.errors import StoppedError, UsageError
from octavo.exits import EXIT_CODES, exit_with
from octavo.flags import command
from octavo.stopping import INTERRUPTED, interrupts
from octavo.streams import in_notebook, output, standard_streams
from octavo.system import optional_module

# Options that --help shows first.
TRAINING = ("model", "data", "test_data", "out", "scheme", "rank", "epochs", "seq_len", "batch_size", "lr")
DRY_RUN = "Check the options, read the data, print its ledger and the memory plan, and stop; write nothing."
GENERATION = ("model", "adapter", "max_new_tokens", "temperature", "top_p", "stop", "seed")

app = typer.Typer(
    name="octavo",
    help="Fine-tune a large language model on your own text files with 8-bit weights and LoRA.",
    no_args_is_help=True,
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@command(app, commands.FINETUNE, usual=TRAINING, switches={"dry_run": DRY_RUN})
def finetune(config: Config, as_json: bool, *, dry_run: bool) -> None:
    """Fine-tune a model on text files. Writes a run folder with the adapter, metrics and a report."""
    if dry_run:
        _preview(config, as_json)
        return
    from octavo.commands.finetune import finetune as run

    _print_json(run(config, console=True, results=not as_json), as_json)


def _preview(config: Config, as_json: bool) -> None:
    from octavo.commands.finetune.preview import preview

    _report(preview, config, as_json)


@command(
    app, commands.TUNE, usual=("model", "data", "test_data", "test_fraction", "minutes", "out", "lr", "rank", "report")
)
def tune(config: Config, as_json: bool) -> None:
    """Choose the learning rate and the LoRA rank by short runs within --minutes, and say how sure that is."""
    from octavo.commands.tune import tune as run

    _report(run, config, as_json)


@command(app, commands.PLAN, usual=("model", "gpu_memory", "gpu", "scheme", "seq_len", "batch_size", "rank"))
def plan(config: Config, as_json: bool) -> None:
    """Estimate the GPU memory of a fine-tuning run, without reading weights."""
    from octavo.commands.plan import plan as run

    _report(run, config, as_json)


@command(
    app,
    commands.EVALUATE,
    usual=("model", "adapter", "data", "scheme", "compare", "tasks", "limit", "seq_len", "rows", "batch_size"),
    positional="data",
)
def evaluate(config: Config, as_json: bool) -> None:
    """Measure perplexity or lm-eval tasks of the base, quantized base and tuned model, or compare schemes."""
    from octavo.commands.evaluate import evaluate as run
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        document = run(config, report)
        _print_json(document, as_json)
    if any(not math.isfinite(row["perplexity"]) for row in document["rows"]):
        raise typer.Exit(1)  # the report has already printed a warning


@command(app, commands.GENERATE, usual=(*GENERATION, "prompt", "prompts", "chat"), positional="prompt")
def generate(config: Config, as_json: bool) -> None:
    """Continue a text, or every prompt of a file."""
    from octavo.reporting import Report

    if config[PromptOptions].prompts is not None:
        from octavo.commands.generate import generate_many

        with Report() as report:  # --json changes nothing: the outputs are JSON lines
            generate_many(config, report, write=_write)
        return
    config = config.replace(prompt=_read_prompt(config[PromptOptions].prompt))
    from octavo.commands.generate import generate_text

    with Report(console=not as_json) as report:
        document = generate_text(config, report, write=_write if not as_json else lambda _: None)
    if as_json:
        _print_json(document, as_json)


@command(app, commands.CHAT, usual=(*GENERATION, "system"))
def chat(config: Config, as_json: bool) -> None:
    """Chat with a model; /help lists the commands. Exit code 1 if any answer failed."""
    from octavo.commands.chat import talk
    from octavo.reporting import Report

    if as_json:
        raise UsageError("`octavo chat` does not support --json.", hint="Use `octavo generate --chat --json`.")
    if sys.stdin.isatty():
        optional_module("readline")  # adds line editing and history to input()
    with Report() as report:
        failed = talk(config, report, read=_read_line, write=_write)
    if failed:
        raise typer.Exit(1)


@command(
    app,
    commands.SERVE,
    usual=("model", "adapter", "adapters_from", "scheme", "host", "port", "api_key", "slots", "max_model_len", "queue"),
)
def serve(config: Config, as_json: bool) -> None:
    """Serve a model and its adapters over HTTP with OpenAI's API. --json prints one document when it listens."""
    from octavo.reporting import Report
    from octavo.server.serve import serve as run

    with Report() as report:
        run(config, report, listening=lambda document: _print_json(document, as_json))


@command(app, commands.QUANTIZE, usual=("model", "scheme", "out"))
def quantize(config: Config, as_json: bool) -> None:
    """Quantize a model and write it to a folder that loads without the original."""
    from octavo.commands.quantize import quantize as run

    _report(run, config, as_json)


@command(app, commands.CONVERT, usual=("model", "out", "allow_pickle"), positional="model")
def convert(config: Config, as_json: bool) -> None:
    """Split a model fine-tuned from hivemind/gpt-j-6B-8bit into a base model and a PEFT adapter."""
    from octavo.commands.convert import convert as run

    _report(run, config, as_json)


@command(app, commands.MERGE, usual=("model", "adapter", "out", "type"))
def merge(config: Config, as_json: bool) -> None:
    """Merge an adapter into its base and write a model folder, for octavo, transformers, vLLM and MLX."""
    from octavo.commands.merge import merge as run

    _report(run, config, as_json)


@command(app, commands.EXPORT, usual=("model", "adapter", "out", "to", "type"))
def export(config: Config, as_json: bool) -> None:
    """Write a model or an adapter as a GGUF file, for llama.cpp, Ollama and LM Studio."""
    from octavo.commands.export import export as run

    _report(run, config, as_json)


@command(app, commands.RUNS, usual=("folders", "sort", "depth"), positional="folders")
def runs(config: Config, as_json: bool) -> None:
    """List the runs in a folder: model, data, steps, state, held-out perplexity before and after, speed, date."""
    from octavo.commands.run_list import list_runs

    _report(list_runs, config, as_json)


@command(app, commands.COMPARE, usual=("runs", "report"), positional="runs")
def compare(config: Config, as_json: bool) -> None:
    """Compare runs: settings that differ, results, differences with intervals, loss curves, samples."""
    from octavo.commands.compare import compare as run

    _report(run, config, as_json)


@command(
    app, commands.PUSH, usual=("run", "repository", "private", "revision", "dry_run"), positional=("run", "repository")
)
def push(config: Config, as_json: bool) -> None:
    """Upload the adapter of a run to the Hugging Face hub, with a model card. `hf auth login` stores the token."""
    from octavo.commands.push import push as run

    _report(run, config, as_json)


adapters_app = typer.Typer(
    name="adapters", help="Show an adapter, compare two, or combine several.", epilog=EXIT_CODES, no_args_is_help=True
)
app.add_typer(adapters_app)


@command(adapters_app, commands.ADAPTER_SHOW, usual=("adapter", "model"), positional="adapter")
def show(config: Config, as_json: bool) -> None:
    """Show an adapter: its base, targets, rank, the norm of the change by layer, and the run that it is of."""
    from octavo.commands.adapters.show import show as run

    _report(run, config, as_json)


@command(adapters_app, commands.ADAPTER_DIFF, usual=("adapters",), positional="adapters")
def diff(config: Config, as_json: bool) -> None:
    """Compare two adapters: base, settings, and by layer the cosine and the difference of what they change."""
    from octavo.commands.adapters.diff import diff as run

    _report(run, config, as_json)


@command(adapters_app, commands.ADAPTER_COMBINE, usual=("adapters", "out", "rank", "model"), positional="adapters")
def combine(config: Config, as_json: bool) -> None:
    """Write the weighted sum of adapters, as runs/a=0.7 runs/b=0.3, as one adapter: exact, or of a rank by SVD."""
    from octavo.commands.adapters.combine import combine as run

    _report(run, config, as_json)


models_app = typer.Typer(name="models", epilog=EXIT_CODES)
app.add_typer(models_app)


@models_app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the supported architectures, or check one model."""
    from octavo.commands.models import list_models
    from octavo.reporting import Report

    if context.invoked_subcommand is None:
        with Report(results=not as_json) as report:
            _print_json(list_models(report), as_json)


@command(models_app, commands.CHECK, usual=("model", "revision"), positional="model")
def check(config: Config, as_json: bool) -> None:
    """Check whether a model is supported, from its config.json alone: sizes, LoRA targets, memory of the weights."""
    from octavo.commands.models import check_model

    _report(check_model, config, as_json)


@command(app, commands.DATA, usual=("data", "model", "seq_len", "samples", "split_on"), positional="data")
def data(config: Config, as_json: bool) -> None:
    """Inspect text files before training: token ledger, document lengths, decoded samples."""
    from octavo.commands.data import check_device, read_documents, show_data
    from octavo.commands.loading import open_model, with_fitting_rows
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        check_device(config[ModelOptions], report)
        source = open_model(config[ModelOptions], report, own_adapters=True)
        config = with_fitting_rows(config, source, report)  # as a run: the ledger has the same rows
        # Files are read before the tokenizer is loaded, because importing its library takes seconds without output.
        reading = read_documents(config[DataOptions].data, config[TextOptions], report)
        _print_json(show_data(config, reading, source.tokenizer(), report), as_json)


@command(app, commands.FINETUNE, usual=TRAINING, defaults=DEMO)
def demo(config: Config, as_json: bool) -> None:
    """Fine-tune SmolLM2 on Shakespeare's plays and evaluate it on Hamlet, in minutes."""
    from octavo.commands.finetune.demo import demo as run

    _print_json(run(config, results=not as_json), as_json)


def main() -> None:
    """The entry point. Errors become a message and an exit code."""
    # OpenMP threads spin while they wait for each other. If another program uses a core, spinning makes every matmul
    # several times as slow. The variable must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Expandable segments avoid fragmentation of GPU memory: a segment grows instead of having a fixed size.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        with standard_streams(), interrupts() as received:
            _quiet_libraries()
            error = _run_command()
            if received and not isinstance(error, StoppedError):
                error = KeyboardInterrupt()
            exit_with(error, as_json="--json" in sys.argv[1:])
    except KeyboardInterrupt:  # a second Ctrl-C while the first is reported
        sys.exit(INTERRUPTED)


def _quiet_libraries() -> None:
    """Silences library logs about retries, fallbacks and model types: octavo reports failures itself.

    The user can override each of the variables.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY", "LMEVAL_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR" if name == "LMEVAL_LOG_LEVEL" else "error")
    if not sys.stderr.isatty() or in_notebook():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _run_command() -> BaseException | None:
    """Runs the command in sys.argv. Returns the exception that ended it, or None.

    Typer's own entry point would exit the process on OSError or Ctrl-C before the exception reaches octavo.
    """
    try:
        group = typer.main.get_command(app)
        with group.make_context("octavo", sys.argv[1:]) as context:
            group.invoke(context)
        with output():
            pass  # flushes text written without `output`
    except BaseException as error:
        return error
    return None


def _report(run: Callable[[Config, Any], dict[str, Any]], config: Config, as_json: bool) -> None:
    """Runs a command that prints its results, and prints its document in their place with --json."""
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        _print_json(run(config, report), as_json)


def _print_json(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from octavo.reporting import jsonable

        # Flushed immediately: the program that started `octavo serve` waits for the document.
        _write(json.dumps(jsonable(document, not_finite=lambda _: None), allow_nan=False) + "\n")


# A model may generate control characters, such as escape sequences. On a terminal they are replaced by visible symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_VISIBLE |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _write(text: str) -> None:
    with output():
        sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)


def _read_prompt(option: str | None) -> str:
    """The prompt from the option or, if it is missing or "-", from standard input without the trailing newline."""
    if option is not None and option != "-":
        return _checked_text(lambda: option)
    if sys.stdin.isatty() and option is None:
        raise UsageError("There is no prompt.", hint="Give one with --prompt, or on standard input.")
    return _checked_text(sys.stdin.read).removesuffix("\n")


def _read_line() -> str | None:
    """One line from the user, or None at end of input."""
    try:
        return _checked_text(lambda: input("> " if sys.stdin.isatty() else ""))
    except EOFError:
        return None


def _checked_text(read: Callable[[], str]) -> str:
    """The text that `read` returns. UsageError if it is not UTF-8: then reading raises, or it has lone surrogates."""
    try:
        text = read()
        text.encode()
    except UnicodeError as error:
        raise UsageError("The prompt is not UTF-8 text.", hint="Convert it, for example with iconv.") from error
    return text


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Fine-tune a large language model on your own text files with 8-bit weights and LoRA."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
