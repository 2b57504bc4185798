"""`octavo adapters combine`, against PEFT with the same files, and its errors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import devices
from tests.commands.adapters.conftest import Write
from tests.conftest import Octavo
from torch import Tensor
from transformers import AutoModelForCausalLM

import octavo as api
from octavo.adapters import apply_
from octavo.commands import loading
from octavo.commands.adapters.combine import weights_of
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store import peft
from octavo.store.sources import FolderSource

IDS = torch.arange(3, 35)[None]  # (1, T)


def changes(adapter: peft.Adapter) -> dict[str, Tensor]:
    """s B A by module, (N, K)."""
    return {name: scaling * b.double() @ a.double() for name, (a, b, scaling) in adapter.lora.items()}


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    """The same as PEFT computes it."""
    modules = {key: module for key, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    return {key: module.get_delta_weight(name).double() for key, module in modules.items() if name in module.lora_A}


def peft_logits(base: Path, *folders: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits)


def octavo_logits(base: Path, folder: Path) -> Tensor:
    with Report(console=False) as report:
        hardware = devices.hardware(devices.CPU)
        model = loading.load_model(FolderSource(base), scheme_named("none"), hardware, report)
    apply_(model, peft.read(folder))
    with torch.no_grad():
        return torch.as_tensor(model(IDS))


def combine(*adapters: str, out: Path, **options: Any) -> Any:
    return api.combine_adapters(list(adapters), out=out, quiet=True, **options)


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 2)])
def test_the_sum_is_that_of_pefts_add_weighted_adapter(
    tiny_llama: Path, peft_adapters: dict[str, Path], tmp_path: Path, kind: str, rank: int | None
) -> None:
    a, b = peft_adapters["a"], peft_adapters["b"]
    done = combine(f"{a}=0.7", f"{b}=-0.3", out=tmp_path / "c", **({"rank": rank} if rank else {}))
    reference: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), a, adapter_name="a")
    reference.load_adapter(b, adapter_name="b")
    reference.add_weighted_adapter(["a", "b"], [0.7, -0.3], "c", combination_type=kind, svd_rank=rank or 2)
    wanted, got = deltas(reference, "c"), changes(peft.read(tmp_path / "c"))
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert done["rank"] == (rank or 5)
    assert (done["error"] > 0.01) == bool(rank)
    reference.set_adapter("c")
    with torch.no_grad():
        logits = reference(IDS).logits
    torch.testing.assert_close(peft_logits(tiny_llama, tmp_path / "c"), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(octavo_logits(tiny_llama, tmp_path / "c"), logits, rtol=1e-4, atol=1e-4)


def test_the_errors_are_those_of_the_svd_of_the_matrices(peft_adapters: dict[str, Path], tmp_path: Path) -> None:
    parts = {name: peft.read(folder) for name, folder in peft_adapters.items()}
    done = combine(f"{peft_adapters['a']}=0.5", f"{peft_adapters['b']}=0.5", out=tmp_path / "c", rank=1)
    whole, cut = 0.0, 0.0
    for one in done["modules"]:
        matrix = sum(0.5 * changes(part)[one["name"]] for part in parts.values() if one["name"] in part.lora)
        values = torch.linalg.svdvals(torch.as_tensor(matrix))
        assert one["error"] == pytest.approx(float(values[1:].norm() / values.norm()))
        whole, cut = whole + float(values.square().sum()), cut + float(values[1:].square().sum())
    assert done["error"] == pytest.approx(math.sqrt(cut / whole))
    assert done["rank"] == 1


def test_weight_1_and_weight_0_give_the_adapter(peft_adapters: dict[str, Path], tmp_path: Path) -> None:
    combine(f"{peft_adapters['a']}=1", f"{peft_adapters['b']}=0", out=tmp_path / "c")
    wanted, got = (peft.read(folder) for folder in (peft_adapters["a"], tmp_path / "c"))
    assert got.lora.keys() == wanted.lora.keys()
    for name, (a, b, scaling) in wanted.lora.items():
        assert torch.equal(got.lora[name][0], a)
        assert torch.equal(got.lora[name][1], b)
        assert got.lora[name][2] == scaling


def test_the_folder_names_its_parents_and_its_base(adapter_folder: Path, tmp_path: Path, octavo: Octavo) -> None:
    other = shutil.copytree(adapter_folder, tmp_path / "other")
    done = octavo("adapters", "combine", f"{adapter_folder}=0.25", f"{other}=0.5", "--out", tmp_path / "c", "--json")
    assert done.code == 0, done.err
    read = peft.read(tmp_path / "c")
    first = peft.read(adapter_folder)
    assert read.trained_on == first.trained_on is not None
    assert read.sha256 == done.json["sha256"]
    parents = [
        {"name": f"{adapter_folder.parent.name}/adapter", "weight": 0.25, "sha256": first.sha256},
        {"name": "other", "weight": 0.5, "sha256": first.sha256},
    ]
    assert read.origin["combined"] == parents
    assert [{**one, "folder": ""} for one in done.json["parents"]] == [{**one, "folder": ""} for one in parents]
    readme = (tmp_path / "c" / "README.md").read_text()
    assert readme.startswith("---\nlibrary_name: peft")
    assert f"| other | 0.5 | `{first.sha256}` |" in readme
    assert str(first.trained_on) in readme
    assert str(tmp_path) not in readme
    shown = octavo("adapters", "show", tmp_path / "c", "--json").json
    assert shown["parents"] == parents


def test_modules_that_are_not_all_of_their_name_keep_full_names(write: Write, tmp_path: Path, tiny_llama: Path) -> None:
    a = write("a", seed=1, r=2, target_modules=["model.layers.0.self_attn.q_proj"])
    b = write("b", seed=2, r=2, target_modules=["v_proj"], layers_to_transform=[1])
    c = write("c", seed=3, r=2, target_modules=["k_proj"])
    combine(f"{a}=1", f"{b}=1", f"{c}=1", out=tmp_path / "sum")
    config = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    torch.testing.assert_close(
        octavo_logits(tiny_llama, tmp_path / "sum"), peft_logits(tiny_llama, tmp_path / "sum"), rtol=1e-4, atol=1e-4
    )
    with_model = combine(f"{a}=1", f"{b}=1", f"{c}=1", out=tmp_path / "named", model=str(tiny_llama))
    assert len(with_model["modules"]) == 4
    named = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert named["target_modules"] == config["target_modules"]


def test_full_weights_are_a_mean_or_need_the_base(write: Write, tmp_path: Path, tiny_llama: Path) -> None:
    norms = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]}
    a, b = write("a", seed=1, **norms), write("b", seed=2, **norms)
    x, y = peft.read(a), peft.read(b)
    assert {"model.norm.weight", "lm_head.weight"} <= x.full.keys()
    combine(f"{a}=0.7", f"{b}=0.3", out=tmp_path / "mean")
    mean = peft.read(tmp_path / "mean")
    for key in x.full:
        torch.testing.assert_close(mean.full[key], 0.7 * x.full[key] + 0.3 * y.full[key])
    with pytest.raises(api.AdapterError, match=r"sum to 0\.8, not to 1: the sum needs the base") as caught:
        combine(f"{a}=0.5", f"{b}=0.3", out=tmp_path / "no")
    assert "model" in caught.value.hint
    assert not (tmp_path / "no").exists()
    combine(f"{a}=0.5", f"{b}=0.3", out=tmp_path / "sum", model=str(tiny_llama))
    total, source = peft.read(tmp_path / "sum"), FolderSource(tiny_llama)
    for key in x.full:
        base = source.tensor(key).float()
        torch.testing.assert_close(total.full[key], base + 0.5 * (x.full[key] - base) + 0.3 * (y.full[key] - base))
    torch.testing.assert_close(
        octavo_logits(tiny_llama, tmp_path / "sum"), peft_logits(tiny_llama, tmp_path / "sum"), rtol=1e-4, atol=1e-4
    )


def test_trained_tokens_are_a_mean_or_need_the_base(write: Write, tmp_path: Path, tiny_llama: Path) -> None:
    a = write("a", seed=1, r=2, target_modules=["q_proj"], trainable_token_indices=[5, 7])
    b = write("b", seed=2, r=2, target_modules=["q_proj"], trainable_token_indices=[9, 7])
    with pytest.raises(api.AdapterError, match=r"the token 5 of model\.embed_tokens in full sum to 0\.7"):
        combine(f"{a}=0.7", f"{b}=0.3", out=tmp_path / "no")
    combine(f"{a}=0.7", f"{b}=0.3", out=tmp_path / "c", model=str(tiny_llama))
    (name,), (ids, rows) = peft.read(tmp_path / "c").tokens, *peft.read(tmp_path / "c").tokens.values()
    x, y = (peft.read(folder).tokens[name][1] for folder in (a, b))
    base = FolderSource(tiny_llama).tensor(f"{name}.weight")
    assert sorted(ids) == [5, 7, 9]
    torch.testing.assert_close(rows[ids.index(5)], 0.7 * x[0] + 0.3 * base[5])
    torch.testing.assert_close(rows[ids.index(7)], 0.7 * x[1] + 0.3 * y[1])
    torch.testing.assert_close(rows[ids.index(9)], 0.3 * y[0] + 0.7 * base[9])
    torch.testing.assert_close(
        octavo_logits(tiny_llama, tmp_path / "c"), peft_logits(tiny_llama, tmp_path / "c"), rtol=1e-4, atol=1e-4
    )


def test_biases_of_one_adapter_are_completed_from_the_base(write: Write, tmp_path: Path, tiny_llama: Path) -> None:
    a = write("a", seed=1, r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], bias="lora_only")
    b = write("b", seed=2, r=2, target_modules=["q_proj", "down_proj"])
    with pytest.raises(api.AdapterError, match="the biases of their linears"):
        combine(f"{a}=1", f"{b}=1", out=tmp_path / "no")
    combine(f"{a}=1", f"{b}=1", out=tmp_path / "c", model=str(tiny_llama))
    torch.testing.assert_close(
        octavo_logits(tiny_llama, tmp_path / "c"), peft_logits(tiny_llama, tmp_path / "c"), rtol=1e-4, atol=1e-4
    )
    c = write("only-attention", seed=3, r=2, target_modules=["q_proj", "k_proj"])
    combine(f"{a}=1", f"{c}=1", out=tmp_path / "d")  # nothing is missing
    assert peft.read(tmp_path / "d").full.keys() == peft.read(a).full.keys()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # it saves the base's embedding
def test_an_embedding_with_lora(write: Write, tmp_path: Path, tiny_llama: Path) -> None:
    a = write("a", seed=1, r=2, target_modules=["embed_tokens", "q_proj"])
    b = write("b", seed=2, r=3, target_modules=["embed_tokens", "lm_head"])
    combine(f"{a}=0.5", f"{b}=2", out=tmp_path / "c")
    read = peft.read(tmp_path / "c")
    x, y = (changes(peft.read(folder))["model.embed_tokens"] for folder in (a, b))
    assert read.embeddings == {"model.embed_tokens"}
    torch.testing.assert_close(changes(read)["model.embed_tokens"], 0.5 * x + 2 * y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        octavo_logits(tiny_llama, tmp_path / "c"), peft_logits(tiny_llama, tmp_path / "c"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # it saves the base's embedding
def test_a_module_that_is_trained_in_two_ways_is_refused(write: Write, tmp_path: Path) -> None:
    a = write("a", seed=1, r=2, target_modules=["lm_head"])
    b = write("b", seed=2, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(api.AdapterError, match="train lm_head in different ways"):
        combine(f"{a}=1", f"{b}=1", out=tmp_path / "c")


def test_adapters_of_different_bases_are_refused(adapter_folder: Path, tmp_path: Path, octavo: Octavo) -> None:
    other = Path(shutil.copytree(adapter_folder, tmp_path / "other"))
    origin = json.loads((other / "octavo.json").read_text())
    (other / "octavo.json").write_text(json.dumps({**origin, "base": {"sha256": "f" * 64}}))
    arguments = ("adapters", "combine", f"{adapter_folder}=1", f"{other}=1", "--out", tmp_path / "c")
    refused = octavo(*arguments)
    assert refused.code == 1
    assert "were trained on different base weights" in refused.err
    assert "ffff" in refused.err
    assert "--force" in refused.err
    forced = octavo(*arguments, "--force")
    assert forced.code == 0
    assert "warning" in forced.err
    assert peft.read(tmp_path / "c").trained_on is None


def test_names_of_bases_without_a_hash_that_differ_are_a_warning(write: Write, tmp_path: Path, octavo: Octavo) -> None:
    a, b = (write(name, seed=1, r=2, target_modules=["q_proj"]) for name in "ab")
    config = json.loads((b / "adapter_config.json").read_text())
    (b / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/other-model"}))
    done = octavo("adapters", "combine", f"{a}=1", f"{b}=1", "--out", tmp_path / "c")
    assert done.code == 0
    assert "someone/other-model'; check that they are the same model" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("A:0.7", "'A:0.7' is not ADAPTER=WEIGHT"),
        ("A", "'A' is not ADAPTER=WEIGHT"),
        ("=0.5", "'=0.5' is not ADAPTER=WEIGHT"),
        ("A=x", "the weight 'x' is no number"),
        ("A=", "the weight '' is no number"),
        ("A=nan", "the weight 'nan' is no number"),
        ("A=-inf", "the weight '-inf' is no number"),
        ("A=0.5=", "the weight '' is no number"),
    ],
)
def test_a_weight_of_another_form(octavo: Octavo, tmp_path: Path, argument: str, message: str) -> None:
    done = octavo("adapters", "combine", argument, "--out", tmp_path / "c")
    assert done.code == 2
    assert message in done.err.replace('"', "'")
    assert "runs/a=0.7" in done.err


def test_weights_are_after_the_last_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert weights_of(["lr=0.1=0.5", "b=-2e-1"]) == {"lr=0.1": 0.5, "b": -0.2}
    Path("lr=0.1").mkdir()
    with pytest.raises(api.UsageError, match="is not ADAPTER=WEIGHT"):
        weights_of(["lr=0.1"])
    with pytest.raises(api.UsageError, match="is given twice"):
        weights_of(["a=1", "./a=2"])


def test_other_errors(peft_adapters: dict[str, Path], octavo: Octavo, tmp_path: Path) -> None:
    a = peft_adapters["a"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, code, message in (
        ([f"{tmp_path / 'none'}=1", "--out", tmp_path / "c"], 1, "There is no folder"),
        ([f"{a}=1"], 2, "The output folder is missing"),
        (["--out", tmp_path / "c"], 2, "The adapters are missing"),
        ([f"{a}=1", "--out", tmp_path / "full"], 2, "already holds something"),
        ([f"{a}=1", "--out", a], 2, "already holds something"),
        ([f"{a}=0", "--out", tmp_path / "c"], 1, "All weights are 0"),
        ([f"{a}=1e300", "--out", tmp_path / "c"], 1, "LoRA alpha"),
        ([f"{a}=1", "--out", tmp_path / "c", "--rank", 0], 2, "greater than or equal to 1"),
    ):
        done = octavo("adapters", "combine", *arguments)
        assert done.code == code, (arguments, done.err)
        assert message in " ".join(done.err.split()), (message, done.err)
    assert not (tmp_path / "c").exists()


def test_a_mapping_gives_the_weights_in_python(peft_adapters: dict[str, Path], tmp_path: Path) -> None:
    weights = {peft_adapters["a"]: 0.1 + 0.2, str(peft_adapters["b"]): 1}
    done = api.combine_adapters(weights, out=tmp_path / "c", quiet=True)
    assert [one["weight"] for one in done["parents"]] == [0.1 + 0.2, 1.0]
