"""The command line: what stands on stdout, exit codes, and that --help is quick.

In this process where that says the same; through `python -m octavo` where pipes or imports are at stake.
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

COMMANDS = ("finetune", "evaluate", "generate", "chat", "quantize", "convert", "data", "demo", "plan", "serve")
PROMISED = {
    "finetune": "model data test-data out scheme rank alpha lora-targets seq-len batch accumulate epochs steps lr seed "
    "checkpoint-every resume config print-config json",
    "evaluate": "model scheme compare adapter tasks include-path limit fewshot json",
    "generate": "model scheme adapter temperature top-k top-p repetition-penalty stop seed json",
    "chat": "model scheme adapter temperature",
    "serve": "model scheme host port adapter api-key no-auth origins hosts slots max-model-len queue max-prompt-tokens "
    "max-new-tokens request-seconds grace-seconds max-body-bytes json",
    "quantize": "model scheme out json",
    "convert": "model allow-pickle out json",
    "plan": "model gpu-memory seq-len batch scheme gpu json",
    "data": "model seq-len split-on skip-bad json",
    "demo": "out steps json",
}
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
        "--steps", 2, "--batch", 2, "--seq-len", 32, "--rank", 2, "--lr", 0.01, "--sample-tokens", 4,
    )  # fmt: skip
    assert done.code == 0
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_that_takes_long(command: str) -> None:
    """0.35 s in all, of which torch alone would take two."""
    arguments = [sys.executable, "-X", "importtime", "-m", "octavo", command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"octavo {command}" in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"octavo", "typer"} <= loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "tokenizers", "fastapi", "lm_eval", "triton"}


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["demo", "--print-config"]])
def test_help_and_configuration_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom octavo.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_promised_flag_is_there(octavo: Octavo, command: str) -> None:
    flags = set(re.findall(r"--([a-z-]+)", octavo(command, "--help").out))
    assert set(PROMISED[command].split()) <= flags


def test_help_shows_ten_usual_options_then_panels_with_defaults_and_choices(
    octavo: Octavo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = octavo("finetune", "--help").out
    panels = re.findall(r"^╭─ ([\w ]+) ─", shown, re.MULTILINE)
    assert panels == ["Options", "Model", "Data", "Adapter", "Training", "Memory", "Run", "Settings and output"]
    first = shown.split("╭─ Model")[0]
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
                "batch",
                "lr",
                "help",
            ]
        )
    ]
    for text in (
        "[default: 16]", "[auto|none|int8|dynamic8|nf4] [default: auto]", "[cosine|linear|constant] [default: cosine]",
        "(needs octavo[clean])", "[default: on]", "the first GPU that PyTorch finds",
    ):  # fmt: skip
        assert text in shown
    assert "(needs octavo[eval])" in octavo("evaluate", "--help").out
    assert "0 done, 1 failed, 2 wrong request, 130 Ctrl-C" in octavo("--help").out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_and_no_bracket_is_lost(
    octavo: Octavo, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from octavo import cli
    from octavo.config import DEMO, fields

    monkeypatch.setenv("COLUMNS", "1000")
    shown = octavo(command, "--help").out
    kinds = cli.FINETUNE if command == "demo" else getattr(cli, command.upper())
    for name, field in fields(kinds):
        assert f"--{name.replace('_', '-')} " in shown
        assert str(field.description) in shown
        default = DEMO.get(name, field.default) if command == "demo" else field.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            assert f"{field.description} [default: {default}]" in shown


def test_the_version_is_printed(octavo: Octavo) -> None:
    assert octavo("--version").out == f"{package.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_configuration_is_accepted_and_prints_the_same(octavo: Octavo, tmp_path: Path, command: str) -> None:
    first = octavo(command, "--print-config", *(["--seed", 7] if command in ("finetune", "chat") else []))
    assert first.code == 0
    (file := tmp_path / "settings.yaml").write_text(first.out)
    assert octavo(command, "--config", file, "--print-config").out == first.out


def test_a_flag_wins_over_the_file_a_zero_and_a_no_included(octavo: Octavo, tmp_path: Path) -> None:
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
    ("arguments", "said"),
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
def test_a_wrong_request_exits_with_2_and_says_what_is_wrong(
    octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = octavo(*arguments)
    assert done.code == 2
    assert said in done.err
    assert done.out == "" or "--json" in arguments
    assert list(tmp_path.rglob("metrics.jsonl")) == []


@pytest.mark.parametrize("command", ["finetune", "evaluate", "data"])
def test_missing_data_is_a_wrong_request(octavo: Octavo, tiny_llama: Path, tmp_path: Path, command: str) -> None:
    out = ["--out", tmp_path / "run"] if command == "finetune" else []
    unnamed = octavo(command, "--model", tiny_llama, *out)
    assert (unnamed.code, unnamed.out) == (2, "")
    assert "--data" in unnamed.err
    absent = octavo(command, "--model", tiny_llama, "--data", tmp_path / "absent.txt", *out)
    assert absent.code == 2
    assert "absent.txt" in absent.err


def test_what_fails_exits_with_1_and_says_what_to_do(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    done = octavo("generate", "the", "--model", tiny_llama, "--adapter", tmp_path)
    assert done.code == 1
    assert re.search(r"octavo: .*holds no adapter.*\n.*adapter/", done.err)
    assert "Traceback" not in done.err


def test_json_of_finetune(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path) -> None:
    done = octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--json",
        "--out", tmp_path / "run", "--steps", 2, "--batch", 2, "--seq-len", 32, "--rank", 2, "--sample-tokens", 4,
    )  # fmt: skip
    assert done.code == 0
    assert {"out", "adapter", "report", "steps", "rows", "best_step"} <= done.json.keys()
    assert done.json["steps"] == 2
    assert [row["name"] for row in done.json["rows"]] == ["quantised", "tuned"]
    assert Path(done.json["adapter"], "adapter_config.json").is_file()


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
    assert [row["name"] for row in rows] == ["base", "quantised", "tuned"]
    keys = {"name", "scheme", "adapter", "perplexity", "bits_per_byte", "tokens", "size_bytes"}
    assert all(row.keys() == keys for row in rows)


def test_schemes_side_by_side(octavo: Octavo, tiny_llama: Path, plays: Path) -> None:
    arguments = ("evaluate", plays / "test", "--model", tiny_llama, "--seq-len", 32, "--compare", "none,nf4")
    done = octavo(*arguments, "--compare", "int8", "--json")
    assert done.code == 0
    assert [row["scheme"] for row in done.json["rows"]] == ["none", "nf4", "int8"]
    assert "MiB" in done.err
    refused = octavo(*arguments, "--compare", "int3")
    assert (refused.code, refused.out) == (2, "")
    assert "'int3'" in refused.err
    assert "dynamic8" in refused.err


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
    assert {"dynamic8 codes", "low-rank pairs", "14", "28"} <= set(re.split(r"\s*[│┃]\s*", done.err))


def test_convert_says_why_it_does_nothing(octavo: Octavo, seed: Any, tiny_gptj: Path, tmp_path: Path) -> None:
    (kept := tmp_path / "kept").mkdir()
    (kept / "notes.txt").write_text("mine")
    for arguments, code, said in (
        ((seed.folder, "--out", tmp_path / "new"), 1, "--allow-pickle"),
        ((seed.folder, "--allow-pickle"), 2, "--out"),
        ((seed.folder, "--allow-pickle", "--out", kept), 2, "already holds"),
        ((tiny_gptj, "--out", tmp_path / "new"), 1, "octavo quantize"),
        ((tmp_path / "absent", "--out", tmp_path / "new"), 2, "absent"),
        (("--out", tmp_path / "new"), 2, "What to convert"),
    ):
        done = octavo("convert", *arguments)
        assert (done.code, done.out) == (code, "")
        assert said in done.err
        assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "notes.txt"]


def test_json_of_data(octavo: Octavo, tiny_llama: Path, plays: Path) -> None:
    done = octavo("data", plays / "train", "--model", tiny_llama, "--seq-len", 32, "--json")
    assert done.code == 0
    counts = ("learned", "read_only", "left_out")
    assert done.json["tokens"] == sum(done.json[name] for name in counts) > 0
    assert len(done.json["files"]) == 6


def test_json_has_no_nan(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    """One character gives one target, the end token, which stands for no byte: bits per byte are undefined."""
    (file := tmp_path / "one.txt").write_text("a")
    done = octavo("evaluate", file, "--model", tiny_llama, "--seq-len", 32, "--json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = json.loads(done.out, parse_constant=refuse)["rows"]
    assert [row["bits_per_byte"] for row in rows] == [None, None]
    assert done.code == 0


def test_without_json_results_are_on_stdout_and_nothing_else(
    octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path
) -> None:
    text = octavo("generate", "the king", "--model", tiny_llama, *GREEDY)
    told = octavo("generate", "the king", "--model", tiny_llama, *GREEDY, "--json")
    assert text.out == told.json["text"] + "\n"
    data = octavo("data", plays / "train", "--model", tiny_llama, "--seq-len", 32)
    assert {"[[", "read only", "documents in"} <= {
        part for part in ("[[", "read only", "documents in") if part in data.out
    }
    assert "Encoding" in data.err
    assert "read only" not in data.err
    for arguments, result in (
        (("evaluate", plays / "test", "--seq-len", 32), "Perplexity"),
        (("quantize", "--out", tmp_path / "small"), "relative error"),
        (("plan", "--gpu-memory", "8GiB", "--seq-len", 32), "octavo finetune --model"),
    ):
        done = octavo(*arguments, "--model", tiny_llama)
        assert done.code == 0
        assert result in done.out
        assert result not in done.err
        assert "Computing on" not in done.out


def errors_of(done: Any) -> Any:
    """The error of a --json document, without the message."""
    error = done.json["error"]
    assert error.keys() == {"type", "message", "hint", "exit_code"}
    assert error["exit_code"] == done.code
    assert error["message"].splitlines()[0] in done.err
    return error["type"], done.code


@pytest.mark.parametrize(
    ("arguments", "kind"),
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
def test_errors_are_json_too(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], kind: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    done = octavo(*(tiny_llama if argument == "LLAMA" else argument for argument in arguments))
    assert errors_of(done) == kind


@pytest.mark.parametrize(
    ("raised", "kind"),
    [(ZeroDivisionError("by \x1b[2Jzero"), ("ZeroDivisionError", 1)), (KeyboardInterrupt(), ("Interrupted", 130))],
)
def test_what_nobody_expected_is_json_too(
    octavo: Octavo, monkeypatch: pytest.MonkeyPatch, raised: BaseException, kind: Any
) -> None:
    from octavo.commands import convert

    def run(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(convert, "convert", run)
    done = octavo("convert", "x", "--out", "y", "--json")
    assert (done.json["error"]["type"], done.code) == kind
    assert "\x1b" not in done.err
    assert ("Traceback" in done.err) == (kind[0] == "ZeroDivisionError")


@pytest.mark.parametrize(
    "arguments",
    [["x\x1b]0;owned\x07"], ["data", "--x\x1b[2J"], ["data", "--model", "m\x9b2J"], ["data", "--seq-len", "\x1b"]],
)
def test_nothing_of_an_argument_reaches_the_terminal_as_a_command(octavo: Octavo, arguments: list[str]) -> None:
    done = octavo(*arguments)
    assert done.code == 2
    assert not set(done.err) & {"\x1b", "\x07", "\x9b"}


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_a_perplexity_that_is_no_number_is_null_and_exit_code_1(
    octavo: Octavo, tiny_llama: Path, plays: Path, monkeypatch: pytest.MonkeyPatch, broken: float
) -> None:
    from octavo import metrics

    monkeypatch.setattr(metrics, "batch_loss", lambda *_: broken)
    done = octavo("evaluate", plays / "test", "--model", tiny_llama, "--seq-len", 32, "--no-base", "--json")
    assert done.code == 1
    assert [row["perplexity"] for row in done.json["rows"]] == [None]
    assert "not a finite number" in done.err


def test_a_prompt_may_stand_bare_behind_a_flag_or_on_standard_input(octavo: Octavo, tiny_llama: Path) -> None:
    common = ("--model", tiny_llama, *GREEDY, "--json")
    bare = octavo("generate", "the queen", *common)
    flag = octavo("generate", "--prompt", "the queen", *common)
    piped = octavo("generate", *common, stdin=b"the queen\n")
    dash = octavo("generate", "--prompt", "-", *common, stdin=b"the queen")
    other = octavo("generate", "of york", *common)
    assert bare.json == flag.json == piped.json == dash.json != other.json


def test_data_may_stand_bare_and_behind_a_flag(octavo: Octavo, tiny_llama: Path, plays: Path) -> None:
    one, two = plays / "train" / "play0.txt", plays / "train" / "play1.txt"
    done = octavo("data", one, "--data", two, "--model", tiny_llama, "--json")
    assert [file["source"] for file in done.json["files"]] == [str(one), str(two)]


@pytest.mark.parametrize(("stdin", "said"), [(b"", "empty"), (b"\xff\xfe", "UTF-8")])
def test_a_prompt_that_is_none_is_a_wrong_request(octavo: Octavo, tiny_llama: Path, stdin: bytes, said: str) -> None:
    done = octavo("generate", "--model", tiny_llama, stdin=stdin)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Loading weights" not in done.err


def test_without_a_command_there_is_help_and_no_message(octavo: Octavo) -> None:
    done = octavo()
    assert (done.code, done.err) == (2, "")
    assert "finetune" in done.out


def test_a_prompt_of_bytes_that_are_no_text_is_refused_too(octavo: Octavo, tiny_llama: Path) -> None:
    """Python hands over such an argument with halves of surrogate pairs in it."""
    done = octavo("generate", os.fsdecode(b"\xff"), "--model", tiny_llama)
    assert done.code == 2
    assert "UTF-8" in done.err


def test_a_chat_prompt_goes_through_the_template(octavo: Octavo, tiny_llama: Path) -> None:
    as_chat = octavo("generate", "the king", "--chat", "--model", tiny_llama, *GREEDY, "--json")
    spelt_out = "<|im_start|>user\nthe king<|im_end|>\n<|im_start|>assistant\n"
    as_text = octavo("generate", spelt_out, "--model", tiny_llama, *GREEDY, "--json")
    assert as_chat.json != as_text.json, "in a prompt, a control token's string is text"
    assert as_chat.code == as_text.code == 0


def test_a_piped_conversation_answers_each_line_until_quit(octavo: Octavo, tiny_llama: Path) -> None:
    once = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\n")
    both = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\n\nof storm\n/quit\nthe sea\n")
    assert once.code == both.code == 0
    assert both.out.startswith(once.out)
    assert both.out.count("\n") > once.out.count("\n")


def test_reset_forgets_the_conversation(octavo: Octavo, tiny_llama: Path) -> None:
    alone = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"of storm\n").out
    reset = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\n/reset\nof storm\n").out
    kept = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"the king\nof storm\n").out
    assert reset.endswith(alone)
    assert not kept.endswith(alone)


def test_a_conversation_goes_on_after_a_message_that_is_too_long(octavo: Octavo, tiny_llama: Path) -> None:
    alone = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"of storm\n")
    done = octavo("chat", "--model", tiny_llama, *GREEDY, stdin=b"q" * 500 + b"\nof storm\n")
    assert done.code == 0
    assert "left out" in done.err
    assert done.out == alone.out


def test_a_long_conversation_forgets_whole_turns_and_goes_on(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    """A template may refuse a conversation in which an answer comes first."""
    strict = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.index0 % 2 == 0 %}"
        "{{ raise_exception('question and answer must take turns') }}{% endif %}{% endfor %}"
    )
    model = Path(shutil.copytree(tiny_llama, tmp_path / "strict"))
    template = model / "chat_template.jinja"
    template.write_text(strict + template.read_text())
    done = octavo("chat", "--model", model, *GREEDY, stdin=b"where is my lord the duke of york\n" * 8)
    assert done.code == 0
    assert "oldest turn is forgotten" in done.err


# Standard output is a pipe that has no reader any more.
UNREAD = "import os\nreading, writing = os.pipe()\nos.dup2(writing, 1)\nos.close(reading)\nos.close(writing)\n"


def test_a_reader_that_goes_away_is_no_crash(tiny_llama: Path, forks: Forks) -> None:
    """As `octavo generate ... | head` does, and `octavo finetune --print-config | head`."""
    for arguments in (
        ["finetune", "--print-config"],
        ["generate", "the", "--model", str(tiny_llama), "--max-new-tokens", "50"],
    ):
        process = forks.run(UNREAD + OCTAVO, *arguments)
        _, err = process.communicate()
        assert "Traceback" not in err
        assert "Exception ignored" not in err
        assert process.returncode == 1


def test_what_a_terminal_would_obey_is_shown_there_and_kept_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo import cli

    said = "one\x1b[2J\ttwo\r\x07\x9b1m\n"
    cli._write(said)
    assert capsys.readouterr().out == said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli._write(said)
    assert capsys.readouterr().out == "one\u241b[2J\ttwo\u240d\u2407\ufffd1m\n"
