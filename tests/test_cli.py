"""The command line: content of stdout, exit codes, import time of --help.

Most tests call the command in this process; tests of pipes and imports run `python -m octavo`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.forks import OCTAVO, Forks

import octavo as package

Octavo = Callable[..., Any]

COMMANDS = (
    "finetune",
    "evaluate",
    "generate",
    "chat",
    "quantize",
    "convert",
    "merge",
    "data",
    "demo",
    "plan",
    "serve",
    "runs",
    "compare",
    "tune",
)
DOCUMENTED_OPTIONS = {
    "finetune": "model data test-data out scheme rank alpha lora-targets seq-len batch-size micro-batch-size epochs "
    "steps lr seed checkpoint-every resume config print-config json",
    "evaluate": "model scheme compare adapter tasks include-path limit fewshot json",
    "generate": "model scheme adapter temperature top-k top-p repetition-penalty stop seed json",
    "chat": "model scheme adapter temperature",
    "serve": "model scheme host port adapter api-key no-auth origins hosts slots max-model-len queue max-prompt-tokens "
    "max-new-tokens request-seconds grace-seconds max-body-bytes json",
    "quantize": "model scheme out json",
    "convert": "model allow-pickle out json",
    "merge": "model adapter type force out json",
    "plan": "model gpu-memory seq-len batch-size scheme gpu json",
    "data": "model seq-len split-on skip-bad json",
    "demo": "out steps json",
    "runs": "folders sort depth json",
    "compare": "runs report json",
    "tune": "model data test-data test-fraction minutes lr rank report resume out json",
}
ADAPTERS, VERBS = ("adapters",), ("show", "diff", "combine")
GREEDY = ("--temperature", 0, "--max-new-tokens", 8, "--scheme", "none", "--dtype", "float32")


def run_module(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def run_folder(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    out = tmp_path / "run"
    done = octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--out", out,
        "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--rank", 2, "--lr", 0.01, "--sample-tokens", 4,
    )  # fmt: skip
    assert done.code == 0
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_slow_modules(command: str) -> None:
    """--help takes 0.35 s; importing torch alone would take two seconds."""
    arguments = [sys.executable, "-X", "importtime", "-m", "octavo", command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"octavo {command}" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"octavo", "typer"} <= loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "tokenizers", "fastapi", "lm_eval", "triton"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["finetune", "--help"],
        ["demo", "--print-config"],
        *(["adapters", name, "--help"] for name in ADAPTERS),
    ],
)
def test_help_and_print_config_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom octavo.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_option_exists(octavo: Octavo, command: str) -> None:
    flags = set(re.findall(r"--([a-z-]+)", octavo(command, "--help").out))
    assert set(DOCUMENTED_OPTIONS[command].split()) <= flags


def test_help_shows_usual_options_then_panels_with_defaults_and_choices(
    octavo: Octavo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    help_text = octavo("finetune", "--help").out
    panels = re.findall(r"^╭─ ([\w ]+) ─", help_text, re.MULTILINE)
    assert panels == [
        "Options",
        "Model",
        "Data",
        "Adapter",
        "Training",
        "Memory",
        "Evaluation",
        "Run",
        "Settings and output",
    ]
    first = help_text.split("╭─ Model")[0]
    assert re.findall(r"│ (--[a-z-]+)", first) == [
        *(
            f"--{name}"
            for name in [
                "model",
                "data",
                "test-data",
                "out",
                "scheme",
                "rank",
                "epochs",
                "seq-len",
                "batch-size",
                "lr",
                "help",
            ]
        )
    ]
    for text in (
        "[default: 16]", "[auto|none|int8|dynamic8|nf4|nf4-double] [default: auto]",
        "[cosine|linear|constant] [default: cosine]",
        "(needs octavo[clean])", "[default: on]", "the first GPU that PyTorch finds",
    ):  # fmt: skip
        assert text in help_text
    assert "(needs octavo[eval])" in octavo("evaluate", "--help").out
    assert "0 success, 1 failure, 2 invalid usage, 3 too little time (tune), 130 Ctrl-C" in octavo("--help").out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_with_its_brackets(
    octavo: Octavo, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from octavo.config import DEMO, commands, fields

    monkeypatch.setenv("COLUMNS", "1000")
    help_text = octavo(command, "--help").out
    kinds = commands.FINETUNE if command == "demo" else getattr(commands, command.upper())
    for name, field in fields(kinds):
        assert f"--{name.replace('_', '-')} " in help_text
        assert str(field.description) in help_text
        default = DEMO.get(name, field.default) if command == "demo" else field.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert f"{field.description} [default: {default}]" in help_text


def test_version(octavo: Octavo) -> None:
    assert octavo("--version").out == f"{package.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_round_trip(octavo: Octavo, tmp_path: Path, command: str) -> None:
    first = octavo(command, "--print-config", *(["--seed", 7] if command in ("finetune", "chat") else []))
    assert first.code == 0
    (file := tmp_path / "settings.yaml").write_text(first.out)
    assert octavo(command, "--config", file, "--print-config").out == first.out


def test_options_override_the_config_file_including_zero_and_no(octavo: Octavo, tmp_path: Path) -> None:
    (file := tmp_path / "settings.yaml").write_text("max_grad_norm: 2\ncuda_graphs: true\nseed: 5\ndata: [a]\n")
    done = octavo(
        "finetune",
        "--config",
        file,
        "--max-grad-norm",
        0,
        "--no-cuda-graphs",
        "--data",
        "b",
        "--data",
        "c",
        "--print-config",
    )
    values = yaml.safe_load(done.out)
    assert (values["max_grad_norm"], values["cuda_graphs"], values["seed"]) == (0.0, False, 5)
    assert values["data"] == ["b", "c"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "nonsense"),
        (["finetune", "--rnak", "3"], "--rank"),
        (["finetune", "--rank", "many"], "integer"),
        (["finetune", "--rank", "0"], "rank"),
        (["finetune", "--scheme", "int4"], "int8"),
        (["finetune", "--config", "nothing.yaml"], "nothing.yaml"),
        (["finetune", "--model", "nowhere/at/all", "--data", "x"], "nowhere/at/all"),
        (["generate", "two", "words"], "words"),
        (["chat", "--json"], "generate"),
    ],
)
def test_invalid_usage_exits_with_2_and_a_message(
    octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = octavo(*arguments)
    assert done.code == 2
    assert expected in done.err
    assert done.out == "" or "--json" in arguments
    assert list(tmp_path.rglob("metrics.jsonl")) == []


@pytest.mark.parametrize("command", ["finetune", "evaluate", "data"])
def test_missing_data_exits_with_2(octavo: Octavo, tiny_llama: Path, tmp_path: Path, command: str) -> None:
    out = ["--out", tmp_path / "run"] if command == "finetune" else []
    without_data = octavo(command, "--model", tiny_llama, *out)
    assert (without_data.code, without_data.out) == (2, "")
    assert "--data" in without_data.err
    missing_file = octavo(command, "--model", tiny_llama, "--data", tmp_path / "absent.txt", *out)
    assert missing_file.code == 2
    assert "absent.txt" in missing_file.err


def test_a_failure_exits_with_1_and_a_hint(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    done = octavo("generate", "the", "--model", tiny_llama, "--adapter", tmp_path)
    assert done.code == 1
    assert re.search(r"octavo: .*holds no adapter.*\n.*RUN@STEP", done.err)
    assert "Traceback" not in done.err


def test_json_of_finetune(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path) -> None:
    done = octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--json",
        "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--rank", 2, "--sample-tokens", 4,
    )  # fmt: skip
    assert done.code == 0
    assert {"out", "adapter", "report", "steps", "rows", "best_step"} <= done.json.keys()
    assert done.json["steps"] == 2
    assert [row["name"] for row in done.json["rows"]] == ["quantized base", "tuned"]
    assert Path(done.json["adapter"], "adapter_config.json").is_file()


def test_the_gain_of_a_run_has_one_unit(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path) -> None:
    """Bits per byte, and perplexity: in the table, in the verdict and in the report."""
    done = octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--no-probes",
        "--out", tmp_path / "run", "--steps", 4, "--batch-size", 2, "--seq-len", 32, "--rank", 2, "--sample-tokens", 4,
        "--lr", 0.01,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "nats" not in done.out
    assert done.out.count("(perplexity ") == 1
    assert "% under" not in done.out
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    results = page[page.index("<h2>Held-out text") : page.index("<h2>Samples")]
    assert "bits per byte" in results
    assert "nats" not in results
    assert "perplexity changed" not in results


def test_json_of_evaluate(octavo: Octavo, tiny_llama: Path, plays: Path, run_folder: Path) -> None:
    done = octavo(
        "evaluate",
        plays / "test",
        "--model",
        tiny_llama,
        "--adapter",
        run_folder / "adapter",
        "--seq-len",
        32,
        "--json",
    )
    assert done.code == 0
    rows = done.json["rows"]
    assert [row["name"] for row in rows] == ["base", "quantized base", "tuned"]
    keys = {"name", "scheme", "adapter", "perplexity", "bits_per_byte", "tokens", "size_bytes", "loss", "interval"}
    keys |= {"context", "stride"}
    assert all(row.keys() == keys for row in rows)


def test_compare_schemes(octavo: Octavo, tiny_llama: Path, plays: Path) -> None:
    arguments = ("evaluate", plays / "test", "--model", tiny_llama, "--seq-len", 32, "--compare", "none,nf4")
    done = octavo(*arguments, "--compare", "int8", "--json")
    assert done.code == 0
    assert [row["scheme"] for row in done.json["rows"]] == ["none", "nf4", "int8"]
    assert "MiB" in done.err
    rejected = octavo(*arguments, "--compare", "int3")
    assert (rejected.code, rejected.out) == (2, "")
    assert "'int3'" in rejected.err
    assert "dynamic8" in rejected.err


def test_json_of_generate(octavo: Octavo, tiny_llama: Path) -> None:
    done = octavo("generate", "the king", "--model", tiny_llama, *GREEDY, "--json")
    assert done.code == 0
    assert done.json.keys() == {"text", "token_ids", "finish_reason"}
    assert len(done.json["token_ids"]) == 8
    assert done.json["finish_reason"] == "length"
    assert done.err == ""


def test_json_of_quantize(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    done = octavo("quantize", "--model", tiny_llama, "--scheme", "int8", "--out", tmp_path / "small", "--json")
    assert done.code == 0
    assert done.json["bytes"] < sum(file.stat().st_size for file in tiny_llama.glob("*.safetensors"))
    assert all(layer.keys() == {"name", "shape", "bytes", "error"} for layer in done.json["layers"])


def test_json_of_convert(octavo: Octavo, seed: Any, tmp_path: Path) -> None:
    done = octavo("convert", seed.folder, "--allow-pickle", "--out", tmp_path / "new", "--json")
    assert done.code == 0
    assert done.json["out"] == str(tmp_path / "new")
    assert [row["folder"] for row in done.json["contents"]] == ["base", "adapter", "both"]
    assert all(
        row.keys() == {"folder", "what", "modules", "tensors", "parameters", "MiB"} for row in done.json["contents"]
    )
    assert {"dynamic8 weights", "LoRA matrices", "14", "28"} <= set(re.split(r"\s*[│┃]\s*", done.err))


def test_convert_errors(octavo: Octavo, seed: Any, tiny_gptj: Path, tmp_path: Path) -> None:
    (existing := tmp_path / "kept").mkdir()
    (existing / "notes.txt").write_text("mine")
    for arguments, code, expected in (
        ((seed.folder, "--out", tmp_path / "new"), 1, "--allow-pickle"),
        ((seed.folder, "--allow-pickle"), 2, "--out"),
        ((seed.folder, "--allow-pickle", "--out", existing), 2, "already holds"),
        ((tiny_gptj, "--out", tmp_path / "new"), 1, "octavo quantize"),
        ((tmp_path / "absent", "--out", tmp_path / "new"), 2, "absent"),
        (("--out", tmp_path / "new"), 2, "The model to convert"),
    ):
        done = octavo("convert", *arguments)
        assert (done.code, done.out) == (code, "")
        assert expected in done.err
        assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "notes.txt"]


def test_json_of_data(octavo: Octavo, tiny_llama: Path, plays: Path) -> None:
    done = octavo("data", plays / "train", "--model", tiny_llama, "--seq-len", 32, "--json")
    assert done.code == 0
    counts = ("trained", "masked", "left_out")
    assert done.json["tokens"] == sum(done.json[name] for name in counts) > 0
    assert len(done.json["files"]) == 6


def test_json_has_no_nan(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    """A text of one character has one target, the EOS token, which has no bytes: bits per byte are undefined."""
    (file := tmp_path / "one.txt").write_text("a")
    done = octavo("evaluate", file, "--model", tiny_llama, "--seq-len", 32, "--json")

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = json.loads(done.out, parse_constant=reject)["rows"]
    assert [row["bits_per_byte"] for row in rows] == [None, None]
    assert done.code == 0


def test_without_json_stdout_has_results_only(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path) -> None:
    text = octavo("generate", "the king", "--model", tiny_llama, *GREEDY)
    with_json = octavo("generate", "the king", "--model", tiny_llama, *GREEDY, "--json")
    assert text.out == with_json.json["text"] + "\n"
    data = octavo("data", plays / "train", "--model", tiny_llama, "--seq-len", 32)
    assert {"[[", "masked", "documents in"} <= {part for part in ("[[", "masked", "documents in") if part in data.out}
    assert "Encoding" in data.err
    assert "masked" not in data.err
    for arguments, result in (
        (("evaluate", plays / "test", "--seq-len", 32), "Scores"),
        (("quantize", "--out", tmp_path / "small"), "relative error"),
        (("plan", "--gpu-memory", "8GiB", "--seq-len", 32), "octavo finetune --model"),
    ):
        done = octavo(*arguments, "--model", tiny_llama)
        assert done.code == 0
        assert result in done.out
        assert result not in done.err
        assert "Running on" not in done.out


def errors_of(done: Any) -> Any:
    """(error type, exit code) of a --json document."""
    error = done.json["error"]
    assert error.keys() == {"type", "message", "hint", "exit_code"}
    assert error["exit_code"] == done.code
    assert error["message"].splitlines()[0] in done.err
    return error["type"], done.code


@pytest.mark.parametrize(
    ("arguments", "error_type"),
    [
        (["nonsense", "--json"], ("UsageError", 2)),
        (["finetune", "--rnak", "3", "--json"], ("UsageError", 2)),
        (["finetune", "--json", "--rank", "many"], ("UsageError", 2)),
        (["finetune", "--json", "--rank", "0"], ("UsageError", 2)),
        (["generate", "a", "b", "--json"], ("UsageError", 2)),
        (["evaluate", "--json", "--model"], ("UsageError", 2)),
        (["evaluate", "nowhere.txt", "--json", "--model", "LLAMA"], ("UsageError", 2)),
        (["generate", "a", "--json", "--model", "LLAMA", "--adapter", "."], ("AdapterError", 1)),
    ],
)
def test_errors_are_json(
    octavo: Octavo,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    error_type: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = octavo(*(tiny_llama if argument == "LLAMA" else argument for argument in arguments))
    assert errors_of(done) == error_type


@pytest.mark.parametrize(
    ("exception", "error_type"),
    [(ZeroDivisionError("by \x1b[2Jzero"), ("ZeroDivisionError", 1)), (KeyboardInterrupt(), ("Interrupted", 130))],
)
def test_unexpected_exceptions_are_json(
    octavo: Octavo, monkeypatch: pytest.MonkeyPatch, exception: BaseException, error_type: Any
) -> None:
    from octavo.commands import convert

    def run(*_: Any) -> None:
        raise exception

    monkeypatch.setattr(convert, "convert", run)
    done = octavo("convert", "x", "--out", "y", "--json")
    assert (done.json["error"]["type"], done.code) == error_type
    assert "\x1b" not in done.err
    assert ("Traceback" in done.err) == (error_type[0] == "ZeroDivisionError")


@pytest.mark.parametrize(
    "arguments",
    [["x\x1b]0;owned\x07"], ["data", "--x\x1b[2J"], ["data", "--model", "m\x9b2J"], ["data", "--seq-len", "\x1b"]],
)
def test_control_characters_of_arguments_do_not_reach_the_terminal(octavo: Octavo, arguments: list[str]) -> None:
    done = octavo(*arguments)
    assert done.code == 2
    assert not set(done.err) & {"\x1b", "\x07", "\x9b"}


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_perplexity_that_is_not_finite_is_null_and_exit_code_1(
    octavo: Octavo, tiny_llama: Path, plays: Path, monkeypatch: pytest.MonkeyPatch, broken: float
) -> None:
    import torch

    from octavo import metrics

    monkeypatch.setattr(metrics, "token_losses", lambda _, batch, options: torch.full((batch.trained_tokens,), broken))
    done = octavo("evaluate", plays / "test", "--model", tiny_llama, "--seq-len", 32, "--no-base", "--json")
    assert done.code == 1
    assert [row["perplexity"] for row in done.json["rows"]] == [None]
    assert "is not finite" in done.err


def test_a_prompt_from_an_argument_an_option_or_standard_input(octavo: Octavo, tiny_llama: Path) -> None:
    common = ("--model", tiny_llama, *GREEDY, "--json")
    bare = octavo("generate", "the queen", *common)
    flag = octavo("generate", "--prompt", "the queen", *common)
    piped = octavo("generate", *common, stdin=b"the queen\n")
    dash = octavo("generate", "--prompt", "-", *common, stdin=b"the queen")
    different = octavo("generate", "of york", *common)
    assert bare.json == flag.json == piped.json == dash.json != different.json


def test_data_from_arguments_and_options(octavo: Octavo, tiny_llama: Path, plays: Path) -> None:
    one, two = plays / "train" / "play0.txt", plays / "train" / "play1.txt"
    done = octavo("data", one, "--data", two, "--model", tiny_llama, "--json")
    assert [file["source"] for file in done.json["files"]] == [str(one), str(two)]


@pytest.mark.parametrize(("stdin", "expected"), [(b"", "empty"), (b"\xff\xfe", "UTF-8")])
def test_an_empty_or_invalid_prompt_exits_with_2(octavo: Octavo, tiny_llama: Path, stdin: bytes, expected: str) -> None:
    done = octavo("generate", "--model", tiny_llama, stdin=stdin)
    assert (done.code, done.out) == (2, "")
    assert expected in done.err
    assert "Loading weights" not in done.err


def test_without_a_command_only_the_help_is_printed(octavo: Octavo) -> None:
    done = octavo()
    assert (done.code, done.err) == (2, "")
    assert "finetune" in done.out


def test_a_prompt_argument_that_is_not_utf8_is_rejected(octavo: Octavo, tiny_llama: Path) -> None:
    """Python decodes such an argument to lone surrogates."""
    done = octavo("generate", os.fsdecode(b"\xff"), "--model", tiny_llama)
    assert done.code == 2
    assert "UTF-8" in done.err


def test_chat_prompts_use_the_chat_template(octavo: Octavo, tiny_llama: Path) -> None:
    as_chat = octavo("generate", "the king", "--chat", "--model", tiny_llama, *GREEDY, "--json")
    formatted = "<|im_start|>user\nthe king<|im_end|>\n<|im_start|>assistant\n"
    as_text = octavo("generate", formatted, "--model", tiny_llama, *GREEDY, "--json")
    assert as_chat.json != as_text.json, "special token strings in a prompt are plain text"
    assert as_chat.code == as_text.code == 0


def test_chat_answers_each_line_of_standard_input_until_quit(octavo: Octavo, tiny_llama: Path) -> None:
    once = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\n")
    both = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\n\nof storm\n/quit\nthe sea\n")
    assert once.code == both.code == 0
    assert both.out.startswith(once.out)
    assert both.out.count("\n") > once.out.count("\n")


def test_reset_clears_the_conversation(octavo: Octavo, tiny_llama: Path) -> None:
    alone = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"of storm\n").out
    reset = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\n/reset\nof storm\n").out
    existing = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\nof storm\n").out
    assert reset.endswith(alone)
    assert not existing.endswith(alone)


def test_chat_continues_after_a_message_that_is_too_long(octavo: Octavo, tiny_llama: Path) -> None:
    alone = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"of storm\n")
    done = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"q" * 500 + b"\nof storm\n")
    assert done.code == 0
    assert "longer than the limit" in done.err
    assert done.out == alone.out


def test_a_long_conversation_drops_whole_turns(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    """A template may reject a conversation that starts with an answer."""
    strict = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.index0 % 2 == 0 %}"
        "{{ raise_exception('question and answer must take turns') }}{% endif %}{% endfor %}"
    )
    model = Path(shutil.copytree(tiny_llama, tmp_path / "strict"))
    template = model / "chat_template.jinja"
    template.write_text(strict + template.read_text())
    done = octavo("chat", "--model", model, *GREEDY, stdin=b"where is my lord the duke of york\n" * 8)
    assert done.code == 0
    assert "oldest turn is removed" in done.err


# Standard output is a pipe whose reader has closed it.
CLOSED_PIPE = "import os\nreading, writing = os.pipe()\nos.dup2(writing, 1)\nos.close(reading)\nos.close(writing)\n"


def test_a_closed_pipe_is_not_a_crash(tiny_llama: Path, forks: Forks) -> None:
    """As in `octavo generate ... | head` and `octavo finetune --print-config | head`."""
    for arguments in (
        ["finetune", "--print-config"],
        ["generate", "the", "--model", str(tiny_llama), "--max-new-tokens", "50"],
    ):
        process = forks.run(CLOSED_PIPE + OCTAVO, *arguments)
        _, err = process.communicate()
        assert "Traceback" not in err
        assert "Exception ignored" not in err
        assert process.returncode == 1


def test_control_characters_are_made_visible_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo import cli

    expected = "one\x1b[2J\ttwo\r\x07\x9b1m\n"
    cli._write(expected)
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._write(expected)
    assert capsys.readouterr().out == "one\u241b[2J\ttwo\u240d\u2407\ufffd1m\n"
