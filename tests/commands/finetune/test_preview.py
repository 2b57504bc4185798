"""commands/finetune/preview.py: `--dry-run` says what a run would do, and changes nothing."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from tests.conftest import Octavo

module = import_module("octavo.commands.finetune.prepare")  # it has a function of its name


@pytest.fixture
def arguments(tiny_llama: Path, plays: Path, tmp_path: Path) -> list[object]:
    return [
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--no-probes",
        "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--rank", 2, "--sample-tokens", 4,
    ]  # fmt: skip


def test_a_dry_run_has_the_numbers_of_the_run_and_writes_nothing(
    octavo: Octavo, arguments: list[object], tmp_path: Path
) -> None:
    planned = octavo(*arguments, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert list(tmp_path.iterdir()) == []
    done = octavo(*arguments)
    assert done.code == 0, done.err
    assert f"Training {planned.json['trained_parameters']:,} parameters in " in done.err
    assert (planned.json["steps"], planned.json["batch_size"]) == (2, 2)
    assert planned.json["train"]["tokens"] > planned.json["test"]["tokens"] > 0
    assert planned.json["peak_bytes"] > 0


def test_a_dry_run_prints_ledger_and_plan_and_loads_no_weights(
    octavo: Octavo, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights are loaded"))
    shown = octavo(*arguments, "--dry-run")
    assert shown.code == 0, shown.err
    assert "Training text: " in shown.err
    assert "Held-out text (" in shown.err
    assert "in 2 steps of 2 x 32 tokens, and evaluates every 2 steps." in shown.out
    assert "Memory: about " in shown.out
    assert "Nothing was trained, and nothing was written to " in shown.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--seq-len", 4096], "--seq-len 4,096 is more than the model's context"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--track", "nobody"], "nobody"),
    ],
)
def test_a_dry_run_has_the_errors_of_the_run(
    octavo: Octavo, arguments: list[object], changes: list[object], message: str, tmp_path: Path
) -> None:
    shown = octavo(*arguments, *changes, "--dry-run")
    assert shown.code in (1, 2)
    assert message in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_is_not_begun_again(octavo: Octavo, arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    shown = octavo(*arguments, "--dry-run")
    assert shown.code == 2
    assert "already contains a run" in shown.err


def test_a_switch_of_one_call_is_in_no_settings_file(octavo: Octavo, arguments: list[object], tmp_path: Path) -> None:
    assert "dry_run" not in octavo(*arguments, "--print-config").out
    (tmp_path / "settings.yaml").write_text("dry_run: true\n")
    refused = octavo(*arguments, "--config", tmp_path / "settings.yaml")
    assert refused.code == 2
    assert "dry_run" in refused.err
