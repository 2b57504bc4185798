"""A model with learned positions has no more of them than its table: longer texts are errors before work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Octavo, _write_tiny
from transformers import GPT2Config, GPTNeoConfig

POSITIONS = 128
SIZES: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 2, "eos_token_id": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, **SIZES),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=POSITIONS, **SIZES,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_tiny(tmp_path_factory.mktemp("models") / request.param, CONFIGS[request.param])


def test_rows_as_long_as_the_table_train_and_are_evaluated(
    folder: Path, plays: Path, octavo: Octavo, tmp_path: Path
) -> None:
    common = ("--model", folder, "--seq-len", POSITIONS, "--device", "cpu", "--dtype", "float32", "--json")
    tuned = octavo(
        "finetune", "--data", plays / "train", "--test-data", plays / "test", *common, "--out", tmp_path / "run",
        "--steps", 1, "--train-norms", "--sample-tokens", 4,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert octavo("evaluate", plays / "test", *common, "--adapter", tmp_path / "run").code == 0


@pytest.mark.parametrize("command", ["finetune", "evaluate", "plan"])
def test_longer_rows_are_an_error(command: str, folder: Path, plays: Path, octavo: Octavo, tmp_path: Path) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "finetune": ("--data", plays / "test", "--out", tmp_path / "run"),
        "evaluate": (plays / "test",),
        "plan": ("--gpu-memory", "11GiB"),
    }
    done = octavo(command, *arguments[command], "--model", folder, "--seq-len", POSITIONS + 1)
    assert done.code == 2
    assert f"--seq-len {POSITIONS + 1} is more than the model's context of {POSITIONS} tokens" in done.err


def test_an_answer_ends_at_the_last_position_and_a_longer_prompt_is_an_error(folder: Path, octavo: Octavo) -> None:
    arguments = ("generate", "--model", folder, "--device", "cpu", "--max-new-tokens", 500, "--json")
    done = octavo(*arguments, "--prompt", "the king", "--temperature", 0)
    assert done.code == 0, done.err
    long = octavo(*arguments, "--prompt", "the king " * POSITIONS)
    assert long.code == 2
    assert f"the model's context holds {POSITIONS}" in long.err
