"""The command `octavo`. One short function a command; torch and transformers are imported inside it.

Exit codes are in exits.py. Results go to stdout, progress and messages to stderr; with --json one document goes to
stdout and nothing else.
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
from octavo.config import (
    DEMO,
    ChatOptions,
    Config,
    ConvertOptions,
    DataOptions,
    EvaluateOptions,
    GenerateOptions,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    PlanOptions,
    PromptOptions,
    QuantizeOptions,
    RunOptions,
    ServeOptions,
    TextOptions,
    TrainingData,
    TrainOptions,
)
from octavo.errors import StoppedError, UsageError
from octavo.exits import EXIT_CODES, exit_with
from octavo.flags import command
from octavo.stopping import INTERRUPTED, interrupts
from octavo.streams import in_notebook, output, standard_streams
from octavo.system import optional_module

FINETUNE = (ModelOptions, TrainingData, TextOptions, LoraOptions, TrainOptions, MemoryOptions, RunOptions)
PLAN = (ModelOptions, TextOptions, LoraOptions, TrainOptions, MemoryOptions, PlanOptions)
EVALUATE = (ModelOptions, EvaluateOptions, TextOptions)
GENERATE = (ModelOptions, GenerateOptions, PromptOptions)
CHAT = (ModelOptions, GenerateOptions, ChatOptions)
SERVE = (ModelOptions, ServeOptions)
QUANTIZE = (ModelOptions, QuantizeOptions)
CONVERT = (ConvertOptions,)
DATA = (ModelOptions, DataOptions, TextOptions)

# What --help shows first.
TRAINING = ("model", "data", "test_data", "out", "scheme", "rank", "epochs", "seq_len", "batch", "lr")
SPEAKING = ("model", "adapter", "max_new_tokens", "temperature", "top_p", "stop", "seed")

app = typer.Typer(
    name="octavo",
    help="Fine-tune a large language model on your own text files: 8-bit weights, LoRA, measured.",
    no_args_is_help=True,
    epilog=EXIT_CODES,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@command(app, FINETUNE, usual=TRAINING)
def finetune(config: Config, as_json: bool) -> None:
    """Fine-tune a model on text files: a run folder with the adapter, metrics and a report."""
    from octavo.commands.finetune import finetune as run

    _answer(run(config, console=True, results=not as_json), as_json)


@command(app, PLAN, usual=("model", "gpu_memory", "gpu", "scheme", "seq_len", "batch", "rank"))
def plan(config: Config, as_json: bool) -> None:
    """Tell what a fine-tuning run would take of a card, without reading weights."""
    from octavo.commands.plan import plan as run
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        _answer(run(config, report), as_json)


@command(
    app,
    EVALUATE,
    usual=("model", "adapter", "data", "scheme", "compare", "tasks", "limit", "seq_len", "rows", "batch"),
    positional="data",
)
def evaluate(config: Config, as_json: bool) -> None:
    """Measure perplexity on text, or tasks: the base, quantised, and tuned, or one scheme beside another."""
    from octavo.commands.evaluate import evaluate as run
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        document = run(config, report)
        _answer(document, as_json)
    if any(not math.isfinite(row["perplexity"]) for row in document["rows"]):
        raise typer.Exit(1)  # the report has said so


@command(app, GENERATE, usual=(*SPEAKING, "prompt", "prompts", "chat"), positional="prompt")
def generate(config: Config, as_json: bool) -> None:
    """Continue a text, or every prompt of a file."""
    from octavo.reporting import Report

    if config[PromptOptions].prompts is not None:
        from octavo.commands.generate import generate_many

        with Report() as report:  # --json has nothing to add: the answers are JSON lines
            generate_many(config, report, write=_write)
        return
    config = config.replace(prompt=_prompt(config[PromptOptions].prompt))
    from octavo.commands.generate import generate_text

    with Report(console=not as_json) as report:
        document = generate_text(config, report, write=_write if not as_json else lambda _: None)
    if as_json:
        _answer(document, as_json)
    else:
        _write("\n")


@command(app, CHAT, usual=(*SPEAKING, "system"))
def chat(config: Config, as_json: bool) -> None:
    """Talk with a model: /help lists the commands. Exit code 1 if an answer failed, though the conversation went on."""
    from octavo.commands.chat import talk
    from octavo.reporting import Report

    if as_json:
        raise UsageError("A conversation has no JSON document.", hint="Use `octavo generate --chat --json`.")
    if sys.stdin.isatty():
        optional_module("readline")  # history and editing of lines
    with Report() as report:
        failed = talk(config, report, read=_ask, write=_write)
    if failed:
        raise typer.Exit(1)


@command(
    app,
    SERVE,
    usual=("model", "adapter", "adapters_from", "scheme", "host", "port", "api_key", "slots", "max_model_len", "queue"),
)
def serve(config: Config, as_json: bool) -> None:
    """Serve a model and adapters on it over HTTP, in OpenAI's API. --json: one document once it listens."""
    from octavo.reporting import Report
    from octavo.server.serve import serve as run

    with Report() as report:
        run(config, report, listening=lambda document: _answer(document, as_json))


@command(app, QUANTIZE, usual=("model", "scheme", "out"))
def quantize(config: Config, as_json: bool) -> None:
    """Write a model under a scheme, as a folder that loads without the original."""
    from octavo.commands.quantize import quantize as run
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        _answer(run(config, report), as_json)


@command(app, CONVERT, usual=("model", "out", "allow_pickle"), positional="model")
def convert(config: Config, as_json: bool) -> None:
    """Split a model that was tuned from hivemind/gpt-j-6B-8bit into a base and a PEFT adapter."""
    from octavo.commands.convert import convert as run
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        _answer(run(config, report), as_json)


@command(app, DATA, usual=("data", "model", "seq_len", "samples", "split_on"), positional="data")
def data(config: Config, as_json: bool) -> None:
    """Look at text files before training: the ledger of tokens, lengths, decoded samples."""
    from octavo.commands.data import read_documents, show_data
    from octavo.commands.loading import open_model
    from octavo.reporting import Report

    with Report(results=not as_json) as report:
        source = open_model(config[ModelOptions], report, own_adapters=True)
        # Before the tokenizer: to import its library takes seconds in which nothing is said.
        reading = read_documents(config[DataOptions].data, config[TextOptions], report)
        _answer(show_data(config, reading, source.tokenizer(), report), as_json)


@command(app, FINETUNE, usual=TRAINING, defaults=DEMO)
def demo(config: Config, as_json: bool) -> None:
    """Fine-tune SmolLM2 on plays of Shakespeare, measured on Hamlet: the whole road in minutes."""
    from octavo.commands.finetune.demo import demo as run

    _answer(run(config, results=not as_json), as_json)


def main() -> None:
    """The entry point: what goes wrong becomes a message and an exit code."""
    # OpenMP's threads by default wait for each other in busy loops: where another program wants a core, every
    # product then takes several times as long. This must be set before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Memory of a card that grows at its end instead of in blocks of fixed size leaves no gaps that nothing fits.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        with standard_streams(), interrupts() as received:
            _quiet_libraries()
            ended = _ended()
            if received and not isinstance(ended, StoppedError):
                ended = KeyboardInterrupt()
            exit_with(ended, as_json="--json" in sys.argv[1:])
    except KeyboardInterrupt:  # one more while the first was reported
        sys.exit(INTERRUPTED)


def _quiet_libraries() -> None:
    """What libraries log of retries, fallbacks and model types is noise here: octavo says itself what fails, and how.

    Each of these can be set from outside to hear more.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY", "LMEVAL_LOG_LEVEL"):
        os.environ.setdefault(name, "ERROR" if name == "LMEVAL_LOG_LEVEL" else "error")
    if not sys.stderr.isatty() or in_notebook():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _ended() -> BaseException | None:
    """Runs the command of sys.argv; what ended it, None if it is done.

    typer's own way to call a command would end the process for an OSError or Ctrl-C before we hear of it.
    """
    try:
        group = typer.main.get_command(app)
        with group.make_context("octavo", sys.argv[1:]) as context:
            group.invoke(context)
        with output():
            pass  # what was written without it
    except BaseException as error:
        return error
    return None


def _answer(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from octavo.reporting import jsonable

        # At once: whoever started a server waits for it.
        _write(json.dumps(jsonable(document, not_finite=lambda _: None), allow_nan=False) + "\n")


# A model may write what a terminal obeys, as escape sequences: there it is shown as a picture of the character.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _write(text: str) -> None:
    with output():
        sys.stdout.write(text.translate(_PICTURES) if sys.stdout.isatty() else text)


def _prompt(given: str | None) -> str:
    """The prompt as given, or else standard input, without the line break that ends its last line."""
    if given is not None and given != "-":
        return _text(lambda: given)
    if sys.stdin.isatty() and given is None:
        raise UsageError("There is no prompt.", hint="Give one with --prompt, or on standard input.")
    return _text(sys.stdin.read).removesuffix("\n")


def _ask() -> str | None:
    """One line of the user's, or None at the end of input."""
    try:
        return _text(lambda: input("> " if sys.stdin.isatty() else ""))
    except EOFError:
        return None


def _text(read: Callable[[], str]) -> str:
    """What `read` gives. Bytes that are no UTF-8 make it raise, or reach us as halves of characters."""
    try:
        text = read()
        text.encode()
    except UnicodeError as error:
        raise UsageError("The prompt is not UTF-8 text.", hint="Convert it, for example with iconv.") from error
    return text


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Fine-tune a large language model on your own text files: 8-bit weights, LoRA, measured."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
