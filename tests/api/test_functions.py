"""The functions of the Python API: signatures from the options, checks, and the results of the command line."""

from __future__ import annotations

import inspect
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NotRequired, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from tests.conftest import Octavo
from tests.forks import Forks

import octavo as api
from octavo.api import adapter_results, results
from octavo.api.options import name_keywords_
from octavo.config import Config, GenerateOptions, ModelOptions, fields
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
    QUANTIZE,
    RUNS,
    SERVE,
)

FUNCTIONS: dict[str, tuple[type[Any], ...]] = {
    "finetune": FINETUNE,
    "evaluate": EVALUATE,
    "generate": GENERATE,
    "plan": PLAN,
    "quantize": QUANTIZE,
    "convert": CONVERT,
    "merge": MERGE,
    "export": EXPORT,
    "serve": SERVE,
    "list_runs": RUNS,
    "compare": COMPARE,
    "show_adapter": ADAPTER_SHOW,
    "diff_adapters": ADAPTER_DIFF,
    "combine_adapters": ADAPTER_COMBINE,
    "load": (ModelOptions, GenerateOptions),
}
OWN = {"config": None, "quiet": False}
CALLBACKS: dict[str, dict[str, object]] = {"finetune": {"on_event": None}}


def plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_has_every_option_of_the_command_with_its_default(name: str) -> None:
    sections = FUNCTIONS[name]
    parameters = inspect.signature(getattr(api, name)).parameters
    config = Config.read(sections, {})
    defaults = {key: plain(value) for kind in sections for key, value in config[kind].model_dump().items()}
    own = OWN | CALLBACKS.get(name, {})
    assert {key: each.default for key, each in parameters.items()} == defaults | own
    assert {key: each.annotation for key, each in parameters.items() if key not in own} == {
        key: field.annotation for key, field in fields(sections)
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_has_every_option_with_its_text(name: str) -> None:
    text = getattr(api, name).__doc__
    for key, field in fields(FUNCTIONS[name]):
        beginning = str(field.description).partition("--")[0]
        assert f"    {key}: {beginning}" in text
    assert "--" not in text  # a flag is a keyword here


def test_signatures_and_help_do_not_import_pytorch() -> None:
    code = (
        "import inspect, pydoc, sys, octavo\n"
        "for name in dir(octavo):\n"
        "    if name != 'LanguageModel' and callable(getattr(octavo, name)):\n"
        "        inspect.signature(getattr(octavo, name)), pydoc.render_doc(getattr(octavo, name))\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_option_names_similar_ones() -> None:
    with pytest.raises(api.UnknownOptionError, match=r"octavo\.finetune has no option 'learning_rte'") as caught:
        api.finetune(learning_rte=1e-3)
    assert caught.value.hint == "help(octavo.finetune) lists the options."
    with pytest.raises(TypeError, match="Did you mean test_data"):
        api.finetune(tests_data="x")
    with pytest.raises(api.UsageError, match="Did you mean seq_len"):
        api.plan(seqlen=8)
    with pytest.raises(api.UnknownOptionError, match=r"octavo\.evaluate has no option 'out'"):
        api.evaluate(out="x")  # an option of another command


def test_options_have_names_except_the_first_of_some() -> None:
    with pytest.raises(TypeError, match=r"octavo\.finetune takes options by their names only"):
        api.finetune("smollm2")
    with pytest.raises(TypeError, match=r"octavo\.load takes only model without its name"):
        api.load("smollm2", "adapter")
    with pytest.raises(TypeError, match=r"octavo\.load takes only model without its name, once"):
        api.load("smollm2", model="smollm2")


def test_an_invalid_value_is_named_as_it_was_written() -> None:
    with pytest.raises(api.UsageError, match=r"^seq_len: must be greater than or equal to 2, not 1\.\n") as caught:
        api.finetune(seq_len=1)
    assert "--" not in str(caught.value)
    assert caught.value.hint == "help(octavo.finetune) lists the options."
    with pytest.raises(ValueError, match="scheme: must be 'auto', 'none'"):
        api.load(scheme="int3")
    with pytest.raises(api.UsageError, match="There is no prompt"):
        api.generate()


def test_values_of_other_types_are_errors_that_name_the_parameter(tiny_llama: Path) -> None:
    with pytest.raises(api.UsageError, match=r"^quiet: must be True or False, not 'no'"):
        api.plan(quiet="no")
    with pytest.raises(api.UsageError, match=r"^seq_len: must be a number, not True"):
        api.finetune(seq_len=True)
    with pytest.raises(api.UsageError, match=r"^steps: must be a number, not False"):
        api.finetune(steps=False)
    with pytest.raises(api.UsageError, match=r"^prompt: must be a string, not b'x'"):
        api.generate(b"x", model=tiny_llama)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        ("generate", {"prompt": "\ud800"}, "prompt is not Unicode text"),
        ("generate", {"prompt": 5}, "^prompt: must be a valid string, not 5\\.\n."),
        ("generate", {"prompts": "\0"}, "^prompts: must have no null character"),
        ("generate", {"prompts": "\ud800"}, "^prompts: must be Unicode text"),
        ("generate", {"prompt": "x", "stop": ["\ud800"]}, "^stop: must be Unicode text"),
        ("finetune", {"out": "\0"}, "^out: must have no null character"),
        ("finetune", {"out": "\0", "resume": True}, "^out: must have no null character"),
        ("finetune", {"out": 3, "resume": True}, "^out: "),
        ("finetune", {"config": "\0"}, "cannot be read"),
        ("finetune", {"config": "\ud800"}, "cannot be read"),
        ("finetune", {"config": {"steps": 3}}, "^config: must be a path, not {'steps': 3}"),
        ("finetune", {"steps": "4"}, "^steps: must be a number, not '4'"),
        ("finetune", {"resume": "yes"}, "^resume: must be True or False, not 'yes'"),
        ("finetune", {"data": 5}, "^data: must be a valid list, not 5\\.\n"),
        ("load", {"model": 3}, "^model: must be a valid string, not 3\\.\n"),
    ],
)
def test_a_value_that_no_option_can_have_is_an_error_with_a_hint(
    call: str, options: dict[str, Any], message: str, tiny_llama: Path
) -> None:
    with pytest.raises(api.UsageError, match=message) as caught:
        getattr(api, call)(**{"model": tiny_llama, **options}, quiet=True)
    assert caught.value.hint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_text_is_read_is_a_stopped_error(
    number: signal.Signals, short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = import_module("octavo.commands.finetune.prepare")
    monkeypatch.setattr(prepare, "read_sides", lambda *_, **__: signal.raise_signal(number))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    with pytest.raises(api.StoppedError, match="there is no checkpoint yet") as caught:
        api.finetune(**short_run, quiet=True)
    assert caught.value.exit_code == 128 + number
    assert f"octavo.finetune(out={str(short_run['out'])!r}, resume=True)" in caught.value.hint


def test_an_error_names_keywords_instead_of_flags(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(api.UsageError) as caught:
        api.quantize(model=tiny_llama)
    assert (caught.value.message, caught.value.hint) == ("The output folder is missing.", "Name a new folder with out.")
    with pytest.raises(api.UsageError, match=r"Device 'mps'.*\n.*Use device cpu"):
        api.quantize(model=tiny_llama, out=tmp_path / "out", device="mps")
    assert str(api.UsageError("x")) == "x"
    error = api.UsageError("Set --seq-len.", hint="Resume with: octavo finetune --resume --out x")
    name_keywords_(error)
    assert str(error) == "Set seq_len.\nResume with: octavo finetune --resume --out x"


def test_a_setting_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(api.UsageError, match=r"There is no option 'seqlen'\. Did you mean 'seq_len'\?"):
        Config.read(PLAN, {"seqlen": 8})


def test_settings_come_from_a_file_and_keywords_have_precedence(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {tiny_llama}\nmax_new_tokens: 3\ntemperature: 0\n")
    assert len(api.generate("the king", config=file, quiet=True)["token_ids"]) <= 3
    assert len(api.generate("the king", config=str(file), max_new_tokens=1, quiet=True)["token_ids"]) == 1


def assert_typed(value: Any, kind: Any) -> None:
    """The document has exactly the keys of its TypedDict, and values of their types."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is NotRequired:
        assert_typed(value, arguments[0])
    elif is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        required = {key for key, hint in hints.items() if get_origin(hint) is not NotRequired}
        assert required <= value.keys() <= hints.keys(), (kind, value.keys())
        for key, each in value.items():
            assert_typed(each, hints[key])
    elif origin is list:
        assert isinstance(value, list)
        for each in value:
            assert_typed(each, arguments[0])
    elif origin in (UnionType,):
        if value is not None:
            assert_typed(value, next(each for each in arguments if each is not NoneType))
    else:
        assert isinstance(value, origin or kind), (value, kind)


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """The options as flags."""
    flags = []
    for name, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            flags += [f"--{name.replace('_', '-')}", str(each)]
    return flags


Options = Callable[[Path, Path, Path], dict[str, Any]]
CALLS: dict[str, tuple[str, Options, Any]] = {
    "scores": (
        "evaluate",
        lambda model, plays, _: {"data": [plays / "test"], "seq_len": 64, "compare": ["none", "int8"]},
        results.EvaluateResult,
    ),
    "tuned": (
        "evaluate",
        lambda model, plays, adapter: {"data": [plays / "test"], "seq_len": 64, "adapter": adapter},
        results.EvaluateResult,
    ),
    "an answer": (
        "generate",
        lambda *_: {"prompt": "the king", "temperature": 0.7, "seed": 3, "max_new_tokens": 9},
        results.GenerateResult,
    ),
    "a plan": ("plan", lambda *_: {"gpu_memory": "1GiB", "gpu": "RTX 3060", "seq_len": 64}, results.PlanResult),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_result_is_the_document_of_the_command_line(
    case: str, tiny_llama: Path, plays: Path, adapter_folder: Path, octavo: Octavo
) -> None:
    name, options_of, kind = CALLS[case]
    options = {"model": tiny_llama, **options_of(tiny_llama, plays, adapter_folder)}
    found = getattr(api, name)(**options, quiet=True)
    shown = octavo(name, *arguments_of(options), "--json")
    assert shown.code == 0, shown.err
    assert json.loads(json.dumps(found)) == shown.json
    assert_typed(found, kind)


@pytest.mark.parametrize("case", CALLS)
def test_a_result_is_returned_and_not_printed(
    case: str, tiny_llama: Path, plays: Path, adapter_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages and progress go to stderr; tables and sentences of the result are printed by the command alone."""
    name, options_of, _ = CALLS[case]
    getattr(api, name)(model=tiny_llama, **options_of(tiny_llama, plays, adapter_folder))
    printed = capsys.readouterr()
    assert printed.out == ""
    for word in ("perplexity", "95%", "peak GiB", "\u2502", "\u2503"):  # box drawing of a table
        assert word not in printed.err


def test_runs_are_listed_and_compared_without_output(
    short_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("run", "other"):
        api.finetune(**{**short_run, "out": tmp_path / folder}, quiet=True)
    capsys.readouterr()
    assert len(api.list_runs(tmp_path)["runs"]) == 2
    assert len(api.compare([tmp_path / "run", tmp_path / "other"])["differences"]) == 1
    assert capsys.readouterr() == ("", "")


def test_a_finished_run_prints_its_progress_and_no_result(
    short_run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = api.finetune(**short_run)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Training: 4/4" in printed.err
    assert "scheme" not in printed.err
    assert not any(sentence in printed.err for sentence in run.verdict.sentences)


def test_a_quantized_folder_is_that_of_the_command_line(tiny_llama: Path, tmp_path: Path, octavo: Octavo) -> None:
    found = api.quantize(model=tiny_llama, scheme="nf4", out=tmp_path / "here", quiet=True)
    assert_typed(found, results.QuantizeResult)
    shown = octavo("quantize", "--model", tiny_llama, "--scheme", "nf4", "--out", tmp_path / "there", "--json")
    assert {**found, "out": ""} == {**shown.json, "out": ""}
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_adapters_are_typed_dictionaries(adapter_folder: Path, tiny_llama: Path, tmp_path: Path, run_: Path) -> None:
    for adapter, options in ((adapter_folder, {}), (adapter_folder, {"model": tiny_llama}), (run_, {})):
        assert_typed(api.show_adapter(adapter, quiet=True, **options), adapter_results.ShownAdapter)
    assert_typed(api.diff_adapters([adapter_folder, run_], quiet=True), adapter_results.AdapterDifference)
    weights = {adapter_folder: 0.5, run_: 1}
    done = api.combine_adapters(weights, out=tmp_path / "sum", rank=1, quiet=True)
    assert_typed(done, adapter_results.CombinedAdapter)
    assert_typed(api.show_adapter(tmp_path / "sum", quiet=True), adapter_results.ShownAdapter)


@pytest.fixture
def run_(short_run: dict[str, Any]) -> Path:
    """The folder of a finished run."""
    return api.finetune(**short_run, quiet=True).out


@pytest.fixture
def short_run(tiny_llama: Path, plays: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": tiny_llama, "data": [plays / "train"], "test_data": plays / "test", "out": tmp_path / "run",
        "seq_len": 32, "steps": 4, "lr": 0.03, "rank": 2, "sample_tokens": 2, "probes": False,
    }  # fmt: skip


def test_a_stopped_run_is_resumed_with_its_settings(
    short_run: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = api.finetune(**short_run, stop_after=2, quiet=True)
    assert_typed(stopped.to_dict(), results.FinetuneResult)
    assert (stopped.steps, stopped.adapter) == (2, None)
    whole = api.finetune(out=tmp_path / "run", resume=True, stop_after=None, quiet=True)
    assert_typed(whole.to_dict(), results.FinetuneResult)
    assert whole.steps == 4
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert capfd.readouterr() == ("", "")
    api.finetune(**{**short_run, "out": tmp_path / "other", "steps": 1})
    shown = capfd.readouterr()
    assert "Training" in shown.err  # progress and messages
    assert shown.out == ""


def test_prompts_of_a_file_are_answered_in_order(tiny_llama: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "the king", "id": 1}, {"prompt": "to the sea", "max_new_tokens": 2}]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    options: dict[str, Any] = {"model": tiny_llama, "temperature": 0, "max_new_tokens": 4, "quiet": True}
    answers = api.generate(prompts=tmp_path / "prompts.jsonl", **options)
    assert [{key: answer[key] for key in line} for answer, line in zip(answers, lines, strict=True)] == lines
    assert answers[0]["token_ids"] == api.generate("the king", **options)["token_ids"]
    assert len(answers[1]["token_ids"]) <= 2


def test_a_server_is_only_for_the_main_thread() -> None:
    caught: list[BaseException] = []

    def serve() -> None:
        try:
            api.serve()
        except api.UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_a_server_serves_until_a_signal(tiny_llama: Path, adapter_folder: Path, forks: Forks) -> None:
    program = (
        "import sys, octavo\n"
        "octavo.serve(model=sys.argv[1], adapter=['mine=' + sys.argv[2]], port=0, max_model_len=64)\n"
        "print('served')"
    )
    process = forks.run(program, tiny_llama, adapter_folder)
    for line in process.stderr:
        if match := re.search(r"on (http://\S+):(\d+):", line):
            break
    assert match is not None
    with urllib.request.urlopen(f"{match[1]}:{match[2]}/v1/models") as response:
        assert {model["id"] for model in json.load(response)["data"]} == {tiny_llama.name, "mine"}
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert process.stdout.read() == "served\n"
