"""`octavo adapters diff`: base, settings, and the distances of the changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.commands.adapters.test_combine import changes
from tests.conftest import Octavo

import octavo as api
from octavo.store import peft


def test_distances_are_those_of_the_matrices(peft_adapters: dict[str, Path]) -> None:
    found = api.diff_adapters(list(peft_adapters.values()), quiet=True)
    x, y = (changes(peft.read(folder)) for folder in peft_adapters.values())
    names = sorted({*x, *y})
    for one in found["modules"]:
        zero = torch.zeros_like(x.get(one["name"], y.get(one["name"])))  # type: ignore[arg-type]
        a, b = x.get(one["name"], zero), y.get(one["name"], zero)
        assert one["difference"] == pytest.approx(float((a - b).norm()))
        if one["name"] in x and one["name"] in y:
            assert one["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
        else:
            assert one["cosine"] is None
    assert [one["name"] for one in found["modules"]] == names
    assert [row["layer"] for row in found["layers"]] == [0, 1]
    assert found["only_in_a"] == sorted(x.keys() - y.keys())
    assert found["only_in_b"] == sorted(y.keys() - x.keys())
    assert found["base"] == "unknown"
    assert found["settings"]["rank"] == [2, 3]
    assert found["settings"]["rslora"] == [False, True]
    assert found["settings"]["targets"] == [{"q_proj": 2, "v_proj": 2}, {"down_proj": 2, "q_proj": 2}]
    assert "base" not in found["settings"]


def test_an_adapter_and_its_copy(adapter_folder: Path, tmp_path: Path, octavo: Octavo) -> None:
    copy = shutil.copytree(adapter_folder, tmp_path / "copy")
    found = octavo("adapters", "diff", adapter_folder, copy, "--json").json
    assert (found["base"], found["difference"], found["settings"]) == ("same", 0.0, {})
    assert found["cosine"] == pytest.approx(1)
    assert found["text"] == (
        "Both adapters were trained on the same base weights. Their LoRA is the same in all 14 modules."
    )
    assert "Settings that differ: none" in octavo("adapters", "diff", adapter_folder, copy).out


def test_different_bases_are_said(adapter_folder: Path, tmp_path: Path, octavo: Octavo) -> None:
    other = Path(shutil.copytree(adapter_folder, tmp_path / "other"))
    origin = json.loads((other / "octavo.json").read_text())
    (other / "octavo.json").write_text(json.dumps({**origin, "base": {"sha256": "f" * 64}}))
    found = octavo("adapters", "diff", adapter_folder, other, "--json").json
    assert found["base"] == "different"
    assert found["base_sha256"][1] == "f" * 64
    assert "different base weights" in found["text"]


def test_checkpoints_of_a_run_and_what_the_terminal_shows(run: Path, octavo: Octavo) -> None:
    done = octavo("adapters", "diff", f"{run}@1", run)
    assert done.code == 0, done.err
    assert "The cosine of their changes is" in " ".join(done.out.split())
    assert "step" in done.out
    assert "||A - B||" in done.out
    found = octavo("adapters", "diff", f"{run}@1", run, "--json").json
    assert found["settings"] == {"step": [1, 2]}
    assert f"{found['cosine']:.4f}" in done.out


def test_tensors_in_full_are_compared(tiny_llama: Path, tmp_path: Path, octavo: Octavo) -> None:
    from tests.commands.adapters.conftest import write_peft

    a = write_peft(tmp_path / "a", tiny_llama, seed=1, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    b = write_peft(tmp_path / "b", tiny_llama, seed=2, r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    c = write_peft(tmp_path / "c", tiny_llama, seed=2, r=2, target_modules=["q_proj"])
    norms = (peft.read(one).full for one in (a, b))
    x, y = (torch.cat([full[key] for key in sorted(full)]) for full in norms)
    found = api.diff_adapters([a, b], quiet=True)["in_full"]
    assert found["relative_to_a"] == pytest.approx(float((x - y).norm() / x.norm()))
    assert api.diff_adapters([a, c], quiet=True)["in_full"]["only_in_a"][-1] == "model.norm.weight"
    assert (
        "In full in A alone: 5 tensors (model.layers.0.input_layernorm.weight" in octavo("adapters", "diff", a, c).out
    )


def test_adapters_of_a_text_model_and_of_a_composite_one_have_the_same_modules(tmp_path: Path) -> None:
    from tests.adapters.test_combination import adapter

    names = ["model.layers.0.q_proj", "model.language_model.layers.0.q_proj"]
    for number, name in enumerate(names):
        one = adapter(2, [name], seed=number)
        peft.write(tmp_path / str(number), one, modules=[name], biases=False, base="", readme="")
    for order in ((0, 1), (1, 0)):
        found = api.diff_adapters([tmp_path / str(number) for number in order], quiet=True)
        assert [one["name"] for one in found["modules"]] == [names[order[0]]]
        assert found["modules"][0]["cosine"] is not None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_adapters_are_needed(octavo: Octavo, adapter_folder: Path, count: int) -> None:
    done = octavo("adapters", "diff", *[adapter_folder] * count)
    assert done.code == 2
    assert f"needs two adapters, not {count}" in done.err


def test_a_missing_folder(octavo: Octavo, adapter_folder: Path, tmp_path: Path) -> None:
    done = octavo("adapters", "diff", adapter_folder, tmp_path / "none")
    assert done.code == 1
    assert f"There is no folder {tmp_path / 'none'}" in "".join(done.err.splitlines())
