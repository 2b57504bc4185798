"""`octavo adapters show`: norms against explicit matrices, what is trained in full, and the run."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tests.commands.adapters.conftest import Write
from tests.commands.adapters.test_combine import changes
from tests.conftest import Octavo

import octavo as api
from octavo.store import peft
from octavo.store.sources import FolderSource, fingerprint


def test_norms_are_those_of_the_matrices(peft_adapters: dict[str, Path], tiny_llama: Path) -> None:
    for folder in peft_adapters.values():
        shown = api.show_adapter(folder, model=str(tiny_llama), quiet=True)
        source, matrices = FolderSource(tiny_llama), changes(peft.read(folder))
        assert [one["name"] for one in shown["modules"]] == sorted(matrices)
        weights = {name: source.tensor(f"{name}.weight").double().norm() for name in matrices}
        for one in shown["modules"]:
            assert one["norm"] == pytest.approx(float(matrices[one["name"]].norm()))
            assert one["relative"] == pytest.approx(float(matrices[one["name"]].norm() / weights[one["name"]]))
        for row in shown["layers"]:
            own = [name for name in matrices if f".{row['layer']}." in name]
            norm = math.hypot(*(float(matrices[name].norm()) for name in own))
            assert row["norm"] == pytest.approx(norm)
            assert row["relative"] == pytest.approx(norm / math.hypot(*(float(weights[name]) for name in own)))
            assert row["types"].keys() == {name.rpartition(".")[2] for name in own}
        assert shown["norm"] == pytest.approx(math.hypot(*(float(one.norm()) for one in matrices.values())))


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4-double"])
def test_a_quantized_base_is_dequantized(
    peft_adapters: dict[str, Path], tiny_llama: Path, tmp_path: Path, scheme: str
) -> None:
    api.quantize(model=tiny_llama, scheme=scheme, out=tmp_path / "base", quiet=True)
    plain, shown = (
        api.show_adapter(peft_adapters["b"], model=str(base), quiet=True)["relative"]
        for base in (tiny_llama, tmp_path / "base")
    )
    assert shown == pytest.approx(plain, rel=0.05)
    assert shown != plain


def test_a_transposed_weight_of_gpt2_is_that_of_the_module(write: Write, tiny_gpt2: Path) -> None:
    adapter = write("a", base=tiny_gpt2, seed=1, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    shown = api.show_adapter(adapter, model=str(tiny_gpt2), quiet=True)
    assert shown["relative"] is not None
    assert shown["targets"] == {"c_attn": 1}


def test_settings_base_and_parameters(peft_adapters: dict[str, Path]) -> None:
    shown = api.show_adapter(peft_adapters["b"], quiet=True)
    assert (shown["rank"], shown["alpha"], shown["rslora"]) == (3, 4.0, True)
    assert shown["scaling"] == pytest.approx(4 / math.sqrt(3))
    assert shown["targets"] == {"down_proj": 2, "q_proj": 2}
    assert shown["parameters"] == 2 * (3 * (32 + 32) + 3 * (48 + 32))
    assert shown["base"]["sha256"] is None
    assert shown["run"] is None
    assert shown["relative"] is None
    assert (
        shown["sha256"] == hashlib.sha256((peft_adapters["b"] / "adapter_model.safetensors").read_bytes()).hexdigest()
    )


def test_what_is_trained_in_full(write: Write, octavo: Octavo) -> None:
    folder = write(
        "a", seed=1, r=2, target_modules=["q_proj", "k_proj"], bias="lora_only", modules_to_save=["norm", "lm_head"],
        trainable_token_indices=[5, 7],
    )  # fmt: skip
    done = octavo("adapters", "show", folder, "--json").json
    assert done["in_full"] == {"biases": 4, "norms": 5, "head": 1, "tokens": 2}
    lora = sum(one["parameters"] for one in done["modules"])
    assert done["parameters"] == lora + 2 * (32 + 16) + 5 * 32 + 300 * 32 + 2 * 32
    text = octavo("adapters", "show", folder).out
    for word in ("in full: biases", "in full: norms", "in full: head", "model.embed_tokens[5]", "4 = alpha 8 / rank"):
        assert word in text


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_a_weight_of_the_base_that_peft_saved_is_not_trained(write: Write) -> None:
    shown = api.show_adapter(write("a", seed=1, r=2, target_modules=["embed_tokens"]), quiet=True)
    assert shown["in_full"] == {"weights of the base, not trained": 1}
    assert shown["parameters"] == 2 * (300 + 32)
    assert [row["layer"] for row in shown["layers"]] == [None]


def test_the_tables_have_a_row_a_layer_and_a_column_a_type(
    peft_adapters: dict[str, Path], tiny_llama: Path, octavo: Octavo
) -> None:
    out = octavo("adapters", "show", peft_adapters["a"], "--model", tiny_llama).out
    words = " ".join(out.split())
    assert "||s B A||_F by layer and module" in words
    assert "||s B A||_F / ||W||_F by layer and module" in words
    header = next(line for line in out.splitlines() if "layer" in line and "q_proj" in line)
    assert header.index("q_proj") < header.index("v_proj") < header.index("all")


def test_the_run_of_an_adapter_its_data_and_its_verdict(
    run: Path, tiny_llama: Path, plays: Path, octavo: Octavo
) -> None:
    files = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in (plays / "train").iterdir())
    data = hashlib.sha256("".join(f"{one}\n" for one in files).encode()).hexdigest()
    for name in (run, run / "adapter"):
        shown = octavo("adapters", "show", name, "--json").json
        assert shown["base"]["sha256"] == fingerprint(FolderSource(tiny_llama))
        assert shown["step"] == 2
        assert shown["run"]["state"] == "finished"
        assert shown["run"]["data_sha256"] == data
        assert shown["run"]["verdict"]["sentences"] == list(api.Run(run).verdict.sentences)
    assert data in octavo("adapters", "show", run).out
    shown = octavo("adapters", "show", f"{run}@1", "--json").json
    assert shown["step"] == 1
    assert shown["run"]["path"] == str(run)
    assert shown["run"]["verdict"] is None  # it is that of the adapter at the end


def test_a_ledger_without_hashes_gives_no_hash_of_the_data(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for ledger in ("{}", "[", json.dumps({"train": {"files": [{"sha256": "a"}, {}]}})):
        (copy / "ledger.json").write_text(ledger)
        found = api.show_adapter(copy, quiet=True)["run"]
        assert found is not None
        assert found["data_sha256"] is None


def test_errors(peft_adapters: dict[str, Path], octavo: Octavo, tmp_path: Path, tiny_gptj: Path) -> None:
    missing = octavo("adapters", "show")
    assert missing.code == 2
    assert "The adapter is missing" in missing.err
    nothing = octavo("adapters", "show", tmp_path / "none")
    assert nothing.code == 1
    assert "There is no folder" in nothing.err
    other = octavo("adapters", "show", peft_adapters["a"], "--model", tiny_gptj)
    assert other.code == 1
    assert "The base has no model.layers.0.self_attn.q_proj" in " ".join(other.err.split())
    other = octavo("adapters", "show", peft_adapters["a"], "--json", "--model", tiny_gptj)
    assert json.loads(other.out)["error"]["type"] == "AdapterError"


def test_an_adapter_with_zero_b_changes_nothing(tmp_path: Path, octavo: Octavo) -> None:
    from octavo.layers.lora import LoraSpec

    lora = {"model.layers.0.q_proj": (torch.ones(1, 3), torch.zeros(4, 1), 2.0)}
    adapter = peft.Adapter(LoraSpec(1, 2.0), lora, {})
    peft.write(tmp_path / "a", adapter, modules=list(lora), biases=False, base="", readme="")
    shown = octavo("adapters", "show", tmp_path / "a", "--json").json
    assert shown["norm"] == 0
    assert shown["base"] == {"name": None, "sha256": None}
    assert "not named (hash unknown)" in octavo("adapters", "show", tmp_path / "a").out
