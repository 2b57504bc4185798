"""--init-adapter: a run that goes on from an adapter with other data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.errors import AdapterError, CheckpointError, UsageError
from octavo.store import peft

Octavo = Callable[..., Any]
Tune = Callable[..., dict[str, Any]]
Started = Callable[..., dict[str, Any]]

LORA = {
    "rank": 3,
    "alpha": 7.0,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "rslora": True,
    "dropout": 0.1,
}
FIRST = {**LORA, "steps": 3, "train_norms": True, "train_biases": True, "scheme": "none"}


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def first(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter others start from. Read-only."""
    out = tmp_path_factory.mktemp("first") / "run"
    tune(out, **FIRST)
    return out


@pytest.fixture
def started(tiny_llama: Path, plays: Path) -> Started:
    """Starts a run from an adapter with the least options, as a user does."""
    import octavo as octavo_api

    def run(out: Path, adapter: object, /, **changes: Any) -> dict[str, Any]:
        options = {
            "model": tiny_llama, "data": plays / "train" / "play1.txt", "test_data": plays / "test", "seq_len": 32,
            "dtype": "float32", "scheme": "none", "batch_size": 4, "steps": 4, "lr": 0.01, "sample_tokens": 1,
            "out": out, "quiet": True,
        }  # fmt: skip
        finished = octavo_api.finetune(**{**options, "init_adapter": adapter, **changes})
        return dict(finished.to_dict())

    return run


def test_the_run_starts_from_the_adapter_with_its_settings(
    first: Path, started: Started, octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path
) -> None:
    """lr 1e-30 changes nothing: the adapter at the end is the initial one."""
    result = started(tmp_path / "run", first, lr=1e-30, seq_len=12, steps=1)
    before, after = peft.read(first / "adapter"), peft.read(tmp_path / "run" / "adapter")
    assert (after.spec.rank, after.spec.alpha, after.spec.dropout, after.spec.rslora) == (3, 7.0, 0.1, True)
    assert before.lora.keys() == after.lora.keys()
    tensors, others = peft.tensors_of(before), peft.tensors_of(after)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert any("norm" in name for name in tensors)
    assert any(name.endswith("bias") for name in tensors)
    assert after.origin["initial"] == {"path": str(first), "sha256": before.sha256, "step": before.origin["step"]}
    assert f"| init adapter | {first.name} |" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    base, initial, tuned = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["base", "initial", "tuned"]
    assert initial["perplexity"] == tuned["perplexity"] < base["perplexity"]
    model = ("--model", tiny_llama, "--scheme", "none", "--dtype", "float32", "--seq-len", 12)
    rows = octavo("evaluate", *model, "--adapter", first, plays / "test", "--json").json["rows"]
    assert base["loss"] == pytest.approx(rows[0]["loss"], rel=1e-6)
    assert initial["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-6)
    assert [(one["before"], one["after"]) for one in result["differences"]] == [("base", "tuned"), ("initial", "tuned")]
    gain, change = result["differences"]
    assert gain["interval"]["low"] < gain["lower_by"] == base["loss"] - tuned["loss"] < gain["interval"]["high"]
    assert change["lower_by"] == 0


@pytest.mark.exhaustive
def test_training_goes_on_and_a_resumed_run_gives_the_same_bits_without_the_adapter(
    first: Path, started: Started, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    whole = started(tmp_path / "whole", copy)
    started(tmp_path / "parts", copy, stop_after=2)
    shutil.rmtree(copy)
    parts = started(tmp_path / "parts", copy, resume=True)
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole") != adapter_bytes(first)
    assert [row["loss"] for row in parts["rows"]] == [row["loss"] for row in whole["rows"]]
    assert parts["differences"] == whole["differences"]
    assert parts["differences"][-1]["lower_by"] != parts["differences"][0]["lower_by"]


def test_a_checkpoint_can_be_the_start(first: Path, started: Started, tmp_path: Path) -> None:
    result = started(tmp_path / "run", f"{first}@3", steps=1)
    assert result["rows"][1]["adapter"] == f"{first}@3"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 4}, "rank is 4; the adapter .* has 3"),
        ({"alpha": 8.0}, "alpha is 8.0; the adapter .* has 7.0"),
        ({"lora_targets": ["q_proj"]}, "lora_targets is q_proj; the adapter .* has down_proj,k_proj,q_proj,v_proj"),
        ({"train_norms": False}, "has True"),
    ],
)
def test_an_option_that_contradicts_the_adapter_is_refused(
    first: Path, started: Started, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        started(tmp_path / "run", first, **changes)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_option_that_agrees_and_another_dropout_are_taken(first: Path, started: Started, tmp_path: Path) -> None:
    started(
        tmp_path / "run", first, rank=3, lora_targets=["down_proj", "v_proj", "q_proj", "k_proj"], dropout=0.0, steps=1
    )
    assert peft.read(tmp_path / "run" / "adapter").spec.dropout == 0


def changed_config(first: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(first / "adapter", folder)
    (folder / "octavo.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_an_adapter_of_several_scalings_or_a_damaged_one_is_refused(
    first: Path, started: Started, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="several ranks or scalings"):
        started(tmp_path / "run", changed_config(first, tmp_path / "a", alpha_pattern={"q_proj": 9.0}))
    damaged = Path(shutil.copytree(first / "adapter", tmp_path / "b"))
    content = bytearray((damaged / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError):
        started(tmp_path / "run", damaged)


def test_an_adapter_that_trains_a_whole_matrix_is_refused(
    first: Path, started: Started, tmp_path: Path, tiny_llama: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = changed_config(first, tmp_path / "a", modules_to_save=["lm_head"], bias="lora_only")
    tensors = load_file(folder / "adapter_model.safetensors")
    weight = load_file(tiny_llama / "model.safetensors")["lm_head.weight"]
    save_file({**tensors, "base_model.model.lm_head.weight": weight}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="whole matrices"):
        started(tmp_path / "run", folder)


def test_an_adapter_of_another_model_is_refused(first: Path, started: Started, tiny_gptj: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not belong to this model"):
        started(tmp_path / "run", first, model=tiny_gptj)


def test_a_resumed_run_does_not_start_from_another_adapter(first: Path, started: Started, tmp_path: Path) -> None:
    started(tmp_path / "run", first, stop_after=1)
    with pytest.raises(CheckpointError, match="began from"):
        started(tmp_path / "run", first / "adapter", resume=True)
