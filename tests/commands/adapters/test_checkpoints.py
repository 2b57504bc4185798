"""Every command that takes an adapter takes RUN@STEP, a checkpoint of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Octavo

import octavo as api
from octavo.config import Config, ServeOptions
from octavo.config.commands import SERVE
from octavo.reporting import Report
from octavo.server.serve import adapter_folders, open_engine
from octavo.store import peft

COMMANDS: dict[str, str] = {
    "generate": "generate --model MODEL --adapter RUN@1 --prompt the --max-new-tokens 2",
    "chat": "chat --model MODEL --adapter RUN@1 --max-new-tokens 2",
    "evaluate": "evaluate PLAYS --model MODEL --adapter RUN@1 --rows 1 --seq-len 32 --no-probes",
    "finetune": "finetune --model MODEL --data PLAYS --out OUT --init-adapter RUN@1 --steps 1 --seq-len 32 --no-probes",
    "push": "push RUN@1 me/adapter --dry-run",
    "adapters show": "adapters show RUN@1",
    "adapters diff": "adapters diff RUN@1 RUN",
    "adapters combine": "adapters combine RUN@1=0.5 RUN=0.5 --out OUT",
}


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The adapter folders that are read, in order."""
    found: list[Path] = []
    original = peft.read

    def read(folder: Path, **options: Any) -> peft.Adapter:
        found.append(folder)
        return original(folder, **options)

    monkeypatch.setattr(peft, "read", read)
    return found


def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-00000001" / "adapter"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_reads_the_adapter_of_the_checkpoint(
    name: str, run: Path, tiny_llama: Path, plays: Path, tmp_path: Path, octavo: Octavo, folders: list[Path]
) -> None:
    values = {"MODEL": tiny_llama, "PLAYS": plays / "test", "OUT": tmp_path / "out"}
    words = [str(values.get(word, word.replace("RUN", str(run)))) for word in COMMANDS[name].split()]
    done = octavo(*words, stdin=b"Hello\n")
    assert done.code == 0, done.err
    assert checkpoint(run) in folders


@pytest.mark.parametrize("name", COMMANDS)
def test_a_step_without_a_checkpoint_is_an_error_that_lists_the_steps(
    name: str, run: Path, tiny_llama: Path, plays: Path, tmp_path: Path, octavo: Octavo
) -> None:
    values = {"MODEL": tiny_llama, "PLAYS": plays / "test", "OUT": tmp_path / "out"}
    command = COMMANDS[name].replace("RUN@1", "RUN@7")
    words = [str(values.get(word, word.replace("RUN", str(run)))) for word in command.split()]
    done = octavo(*words, stdin=b"Hello\n")
    assert done.code == 1
    assert f"The run {run} has no checkpoint of step 7." in " ".join(done.err.split())
    assert "checkpoints of the steps 1, 2" in " ".join(done.err.split())


def test_a_server_serves_a_checkpoint(run: Path, tiny_llama: Path, folders: list[Path]) -> None:
    values = {"model": str(tiny_llama), "adapter": [f"early={run}@1", f"last={run}"], "max_model_len": 64}
    config = Config.read(SERVE, values)
    with Report(console=False) as report:
        open_engine(config, report, adapters=adapter_folders(config[ServeOptions]))
    assert folders == [checkpoint(run), run / "adapter"]


def test_a_loaded_model_has_the_adapter_of_the_checkpoint(run: Path, tiny_llama: Path, folders: list[Path]) -> None:
    api.load(tiny_llama, adapter=f"{run}@1", quiet=True)
    assert folders == [checkpoint(run)]


def test_compare_takes_a_run_up_to_a_checkpoint(run: Path, octavo: Octavo) -> None:
    done = octavo("compare", f"{run}@1", run)
    assert done.code == 0, done.err
    early, whole = api.compare([f"{run}@1", run], quiet=True)["runs"]
    assert (early["state"], early["steps"], early["path"]) == ("checkpoint", 1, f"{run}@1")
    assert (whole["state"], whole["steps"]) == ("finished", 2)
    assert [step for step, _ in early["held_out"]] == [0, 1]
    assert [step for step, _ in whole["held_out"]] == [0, 1, 2]
    assert early["perplexity_after"] == pytest.approx(api.Run(run).metrics[0]["held_out_perplexity"])
    text = api.compare([f"{run}@1", run], quiet=True)["differences"][0]["text"]
    assert "`octavo evaluate --adapter RUN@STEP` measures it" in text
    last = api.compare([f"{run}@2", f"{run}@1"], quiet=True)["runs"][0]
    assert (last["state"], last["steps"], last["rows"]) == ("checkpoint", 2, [])
    missing = octavo("compare", f"{run}@7", run)
    assert missing.code == 1
    assert "has no checkpoint of step 7" in " ".join(missing.err.split())


def test_compare_takes_a_folder_whose_name_has_an_at_sign(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "mine@1")
    assert api.compare([copy, run], quiet=True)["runs"][0]["state"] == "finished"
