"""commands/finetune/demo.py: the settings of the demo are defaults, and no demo overwrites an earlier one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo import system
from octavo.commands.finetune import demo as demo_module
from octavo.config import DEMO

Octavo = Callable[..., Any]


@pytest.fixture
def demo(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Octavo:
    """`octavo demo` with the tiny model and two steps, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    small = ("--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--sample-tokens", 4)
    return lambda *more, steps=2: octavo("demo", *small, "--steps", steps, "--json", *more)


def test_the_package_has_the_plays_and_one_is_held_out() -> None:
    train, test = (list(Path(DEMO[side][0]).glob("*.txt")) for side in ("data", "test_data"))
    assert len(train) > 1
    assert [path.stem.lower() for path in test] == ["hamlet"]
    assert not any("hamlet" in path.stem.lower() for path in train)


def test_the_demo_evaluates_the_base_in_full_precision_quantized_and_tuned(demo: Octavo) -> None:
    done = demo()
    assert done.code == 0
    assert [(row["name"], row["scheme"]) for row in done.json["rows"]] == [
        ("base", "none"),
        ("quantized base", "int8"),
        ("tuned", "int8"),
    ]


def test_flags_and_files_override_the_defaults_of_the_demo(octavo: Octavo, tmp_path: Path) -> None:
    """Also to a value that is the default of finetune, like this rank."""
    (file := tmp_path / "settings.yaml").write_text("lr: 0.0002\n")
    done = octavo("demo", "--rank", 16, "--seq-len", 64, "--config", file, "--print-config")
    values = yaml.safe_load(done.out)
    changed = {"rank": 16, "seq_len": 64, "lr": 0.0002}
    assert {key: values[key] for key in DEMO} == {**DEMO, **changed}


def test_an_earlier_demo_is_not_overwritten(demo: Octavo, tmp_path: Path) -> None:
    assert [demo().json["out"] for _ in range(2)] == ["runs/demo", "runs/demo-2"]
    assert demo("--out", "runs/mine").json["out"] == "runs/mine"


def test_the_folder_of_a_demo_that_failed_before_its_start_is_used_again(demo: Octavo) -> None:
    assert demo("--seq-len", 999).code == 2
    assert demo().json["out"] == "runs/demo"


def test_a_demo_is_resumed_in_its_own_folder(demo: Octavo, octavo: Octavo) -> None:
    assert demo("--stop-after", 1).json["steps"] == 1
    done = octavo("demo", "--resume", "--json")
    assert (done.json["out"], done.json["steps"]) == ("runs/demo", 2)


def test_the_last_line_is_the_next_command_as_octavo_is_called_in_the_shell(
    demo: Octavo, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture calls octavo as `octavo`, which is neither on the PATH nor in this folder."""
    (scripts := tmp_path / "environment" / "bin").mkdir(parents=True)
    (command := scripts / "octavo").touch(0o755)
    monkeypatch.setenv("PATH", str(scripts))
    whole = system.own_command
    called: list[str] = []

    def own_command() -> str:
        monkeypatch.setattr(sys, "argv", [str(command)])
        called.append(whole())
        return called[-1]

    monkeypatch.setattr(demo_module, "own_command", own_command)
    lines = demo().err.strip().splitlines()
    assert called == ["octavo"]
    assert lines[-1] == f"Chat with it: octavo chat --model {tiny_llama} --adapter runs/demo/adapter"


@pytest.mark.exhaustive
def test_the_demo_trains_its_real_model_in_a_few_steps(
    octavo: Octavo, smollm2_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 and the plays, with a few short rows and two steps; `make demo` is the full run."""
    monkeypatch.setenv("OCTAVO_CACHE", str(smollm2_cache))
    done = octavo(
        "demo", "--out", tmp_path / "run", "--data", Path(DEMO["data"][0]) / "macbeth.txt", "--steps", 2,
        "--batch-size", 4, "--seq-len", 32, "--eval-rows", 4, "--warmup", 0, "--sample-tokens", 1, "--no-probes",
        "--json",
    )  # fmt: skip
    assert done.code == 0
    base, quantized, tuned = (row["perplexity"] for row in done.json["rows"])
    assert quantized == pytest.approx(base, rel=0.1), "on 128 tokens; on the whole play it is far less"
    assert tuned < quantized
