"""`octavo convert`, and the other commands on a folder with embedded adapters: they apply them, or fail with a hint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.commands.convert import convert
from octavo.commands.generate import open_model
from octavo.config import Config
from octavo.config import commands as sections
from octavo.errors import ModelError, UsageError
from octavo.reporting import Report

Octavo = Callable[..., Any]

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
EXACT = 1e-5  # of float32 logits of about 1: the same sums in another order


def converted(folder: Path, out: Path) -> dict[str, Any]:
    config = Config.read(sections.CONVERT, {"model": str(folder), "out": str(out), "allow_pickle": True})
    with Report(console=False) as report:
        return convert(config, report)


@pytest.fixture(scope="module")
def split(seed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `seed`, converted. Read-only."""
    out = tmp_path_factory.mktemp("converted") / "out"
    converted(seed.folder, out)
    return out


@pytest.fixture(scope="module")
def hivemind(seed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like hivemind/gpt-j-6B-8bit with config.json and tokenizer: that of `seed`, without its adapters."""
    folder = Path(shutil.copytree(seed.folder, tmp_path_factory.mktemp("hivemind") / "model"))
    table = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({name: t for name, t in table.items() if ".adapter." not in name}, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def logits(**options: Any) -> Tensor:
    """The logits of the model of `octavo generate`, in float32."""
    config = Config.read(sections.GENERATE, {"dtype": "float32", "allow_pickle": True, **options})
    with Report(console=False) as report:
        actual: Tensor = open_model(config, report).model(IDS)
    return actual


@torch.no_grad()
def expected_logits(seed: Any) -> Tensor:
    actual: Tensor = seed.model(IDS).logits
    return actual


def test_the_folder_and_its_converted_parts_give_the_logits_of_the_training_script(seed: Any, split: Path) -> None:
    base = logits(model=str(split / "base"))
    assert float((base - expected_logits(seed)).abs().max()) > 1
    for actual in (
        logits(model=str(seed.folder)),
        logits(model=str(split / "base"), adapter=str(split / "adapter")),
        logits(model=str(split / "base"), adapter=str(split / "adapter"), scheme="none"),
    ):
        assert float((actual - expected_logits(seed)).abs().max()) <= EXACT


def test_the_written_modules_and_parameters_are_counted(seed: Any, tmp_path: Path) -> None:
    answer = converted(seed.folder, tmp_path / "out")
    out = str(tmp_path / "out")
    assert [answer[key] for key in ("out", "base", "adapter")] == [out, f"{out}/base", f"{out}/adapter"]
    block = 4 * 64 * 64 + 2 * 64 * 256
    table = 300 * 64
    frozen, lora, full = answer["contents"]
    assert (frozen["modules"], frozen["tensors"]) == (14, 42)
    assert frozen["parameters"] == 2 * block + 2 * table
    rank = 5
    assert (lora["modules"], lora["tensors"]) == (14, 28)
    assert lora["parameters"] == rank * (2 * (4 * 128 + 2 * 320) + 2 * 364)
    assert (full["modules"], full["tensors"]) == (3 + 5, 6 + 5)
    assert full["parameters"] == 6 * 64 + 2 * (256 + 64) + 300
    bytes_on_disk = (tmp_path / "out" / "base" / "model.safetensors").stat().st_size
    assert 0 < bytes_on_disk - (frozen["MiB"] + full["MiB"]) * 2**20 < 10_000, "a header of names"


@pytest.mark.parametrize("command", ["finetune", "evaluate", "generate", "quantize"])
def test_every_command_reads_a_hivemind_folder_with_allow_pickle(
    octavo: Octavo, hivemind: Path, plays: Path, tmp_path: Path, command: str
) -> None:
    short = ("--steps", 2, "--batch-size", 2, "--seq-len", 32, "--sample-tokens", 2)
    arguments = {
        "finetune": (*short, "--data", plays / "train", "--test-data", plays / "test", "--out", tmp_path / "run"),
        "evaluate": (plays / "test", "--seq-len", 32),
        "generate": ("the king", "--max-new-tokens", 4),
        "quantize": ("--out", tmp_path / "small"),
    }
    command_line = (command, *arguments[command], "--model", hivemind, "--json")
    failed = octavo(*command_line)
    assert failed.code == 1
    assert "--allow-pickle" in failed.err
    done = octavo(*command_line, "--allow-pickle")
    assert done.code == 0
    if command in ("finetune", "evaluate"):
        assert done.json["rows"][0]["scheme"] == "dynamic8"
    if command == "quantize":
        assert done.json["scheme"] == "dynamic8"
        assert {layer["error"] for layer in done.json["layers"]} == {0.0}


@pytest.mark.parametrize("missing", ["model", "out"])
def test_a_missing_folder_is_a_usage_error(seed: Any, tmp_path: Path, missing: str) -> None:
    values = {"model": str(seed.folder), "out": str(tmp_path / "out")}
    del values[missing]
    with Report(console=False) as report, pytest.raises(UsageError, match="missing"):
        convert(Config.read(sections.CONVERT, values), report)


def test_the_error_for_a_folder_without_a_tokenizer_names_the_files_to_copy(seed: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (folder / name).symlink_to(seed.folder / name)
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        converted(folder, tmp_path / "out")
    assert "tokenizer.json" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_generate_reports_the_embedded_adapters_once(octavo: Octavo, seed: Any, split: Path) -> None:
    greedy = ("--temperature", 0, "--max-new-tokens", 12, "--dtype", "float32", "--allow-pickle")
    tuned = octavo("generate", "the king", "--model", seed.folder, *greedy)
    assert tuned.code == 0
    assert tuned.err.count("has trained adapters on 14 layers: they are applied") == 1
    separate = octavo("generate", "the king", "--model", split / "base", "--adapter", split / "adapter", *greedy)
    base = octavo("generate", "the king", "--model", split / "base", *greedy)
    assert tuned.out == separate.out != base.out
    assert "adapters" not in base.err


def test_evaluate_applies_the_embedded_adapters(octavo: Octavo, seed: Any, split: Path, plays: Path) -> None:
    common = (plays / "test", "--seq-len", 32, "--dtype", "float32", "--json")
    embedded = octavo("evaluate", *common, "--model", seed.folder, "--allow-pickle")
    separate = octavo("evaluate", *common, "--model", split / "base", "--adapter", split / "adapter")
    (row,) = embedded.json["rows"]
    untuned, tuned = separate.json["rows"]
    assert (row["name"], untuned["name"], tuned["name"]) == ("tuned", "quantized base", "tuned")
    assert row["perplexity"] == pytest.approx(tuned["perplexity"], rel=1e-5)
    assert abs(row["perplexity"] - untuned["perplexity"]) > 1


@pytest.mark.parametrize("command", ["finetune", "quantize", "evaluate", "generate"])
def test_commands_that_would_lose_the_embedded_adapters_fail_at_once(
    octavo: Octavo, seed: Any, split: Path, plays: Path, tmp_path: Path, command: str
) -> None:
    """Two adapters cannot be saved as one; the quantized weights alone would be the untuned model."""
    arguments = {
        "finetune": ("--data", plays / "train", "--out", tmp_path / "run"),
        "quantize": ("--out", tmp_path / "small", "--scheme", "int8"),
        "evaluate": (plays / "test", "--adapter", split / "adapter"),
        "generate": ("the", "--adapter", split / "adapter"),
    }
    done = octavo(command, *arguments[command], "--model", seed.folder, "--allow-pickle")
    assert (done.code, done.out) == (1, "")
    assert f"octavo convert {seed.folder} --allow-pickle --out" in done.err
    assert "Evaluating" not in done.err
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


def test_the_converted_base_trains_and_data_reads_the_folder_itself(
    octavo: Octavo, seed: Any, split: Path, plays: Path, tmp_path: Path
) -> None:
    looked = octavo("data", plays / "train", "--model", seed.folder, "--seq-len", 32, "--json")
    assert looked.code == 0
    tuned = octavo(
        "finetune", "--model", split / "base", "--data", plays / "train", "--test-data", plays / "test", "--steps", 2,
        "--batch-size", 2, "--seq-len", 32, "--sample-tokens", 2, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert tuned.code == 0
    origin = json.loads((tmp_path / "run" / "adapter" / "octavo.json").read_text())
    converted_origin = json.loads((split / "adapter" / "octavo.json").read_text())
    assert origin["base"]["sha256"] == converted_origin["base"]["sha256"]
    assert origin["base"]["scheme"] == "dynamic8"
