"""`octavo merge`: the folder, its model card, the base that is chosen, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import Octavo
from transformers import AutoModelForCausalLM, AutoTokenizer

import octavo as api
from octavo.errors import AdapterError, UsageError
from octavo.store.peft import read

GREEDY = ("--temperature", 0, "--max-new-tokens", 12, "--scheme", "none", "--dtype", "float32")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def run(tiny_llama: Path, plays: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps over int8 weights, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("merge") / "mine"
    api.finetune(
        model=tiny_llama, data=[plays / "train"], test_data=[plays / "test"], out=out, dtype="float32", seq_len=8,
        steps=2, checkpoint_every=1, rank=2, sample_tokens=1, keep="last", lr=0.05, scheme="int8", quiet=True,
    )  # fmt: skip
    return out


def renamed_base(adapter: Path, out: Path, base: str) -> Path:
    """A copy of an adapter whose base is called `base`."""
    shutil.copytree(adapter, out)
    for name, change in (
        ("adapter_config.json", {"base_model_name_or_path": base}),
        ("octavo.json", {"base": json.loads((out / "octavo.json").read_text())["base"] | {"name": base}}),
    ):
        path = out / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return out


def test_the_merged_folder_generates_what_the_base_with_the_adapter_does(
    octavo: Octavo, tiny_llama: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = octavo("merge", "--model", tiny_llama, "--adapter", adapter_folder, "--type", "float32", "--out", out)
    assert done.code == 0, done.err
    assert "dequantized" not in done.err
    for module in MODULES:
        assert module in done.out
    tuned = octavo("generate", "the king", "--model", tiny_llama, "--adapter", adapter_folder, *GREEDY)
    again = octavo("generate", "the king", "--model", out, *GREEDY)
    untuned = octavo("generate", "the king", "--model", tiny_llama, *GREEDY)
    assert tuned.out == again.out != untuned.out
    for name in ("generation_config.json", "chat_template.jinja"):
        if (tiny_llama / name).is_file():
            assert (out / name).is_file()
    theirs, expected = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tiny_llama)
    turns = [{"role": "user", "content": "the king"}]
    assert theirs.apply_chat_template(turns) == expected.apply_chat_template(turns)


def test_a_run_is_merged_into_the_base_that_it_names_in_bfloat16(octavo: Octavo, run: Path, tmp_path: Path) -> None:
    done = octavo("merge", "--adapter", run, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    found = done.json
    base = json.loads((run / "adapter" / "octavo.json").read_text())["base"]
    assert (found["type"], found["base"], found["base_scheme"]) == ("bfloat16", base["name"], "none")
    assert found["adapter_sha256"] == read(run / "adapter").sha256
    expected = {f"{part}.{name}" for part in ("self_attn", "mlp") for name in MODULES}
    assert {".".join(each["name"].split(".")[-2:]) for each in found["modules"]} <= expected
    assert [each["merged"] for each in found["modules"]] == [["LoRA"]] * 14
    assert found["error"] is None
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert found["bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_the_readme_has_base_adapter_type_and_the_verdict_of_the_run(run: Path, tmp_path: Path) -> None:
    api.merge(adapter=run, out=tmp_path / "story", type="float16", quiet=True)
    readme = (tmp_path / "story" / "README.md").read_text()
    metadata = yaml.safe_load(readme.split("---")[1])
    assert metadata["library_name"] == "transformers"
    base = json.loads((run / "adapter" / "octavo.json").read_text())["base"]
    for text in (
        base["sha256"],
        read(run / "adapter").sha256,
        "| type | float16 |",
        "# story: llama with a LoRA adapter",
    ):
        assert text in readme
    sentences = api.Run(run).verdict.sentences
    assert sentences
    assert all(sentence in readme for sentence in sentences)
    assert "over the frozen weights (scheme int8), not merged" in readme
    assert str(run.parent) not in readme
    assert str(Path(base["name"]).parent) not in readme


def test_a_checkpoint_has_no_verdict_and_another_adapter_no_run(
    run: Path, tiny_llama: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    api.merge(adapter=f"{run}@1", out=tmp_path / "first", quiet=True)
    readme = (tmp_path / "first" / "README.md").read_text()
    assert "| optimizer step of the adapter | 1 |" in readme
    assert "## Held-out text" not in readme
    api.merge(model=tiny_llama, adapter=adapter_folder, out=tmp_path / "other", quiet=True)
    assert "optimizer step" not in (tmp_path / "other" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
def test_a_quantized_result_has_the_error_of_each_layer_and_of_all(
    kind: str, octavo: Octavo, run: Path, tmp_path: Path
) -> None:
    done = octavo("merge", "--adapter", run, "--type", kind, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    errors = [layer["error"] for layer in done.json["layers"]]
    assert len(errors) == 16
    assert 0 < min(errors) <= done.json["error"] <= max(errors)
    assert done.json["error"] < (0.02 if kind == "int8" else 0.15)
    assert "octavo's format" in (tmp_path / "out" / "README.md").read_text()
    assert octavo("generate", "the", "--model", tmp_path / "out", "--max-new-tokens", 2).code == 0


def test_the_unquantized_base_is_used_where_it_is_and_its_absence_said_once(
    octavo: Octavo, run: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    assert octavo("quantize", "--model", tiny_llama, "--scheme", "int8", "--out", small).code == 0
    direct = octavo("merge", "--model", tiny_llama, "--adapter", run, "--out", tmp_path / "direct")
    assert direct.code == 0, direct.err
    here = octavo("merge", "--model", small, "--adapter", run, "--out", tmp_path / "here")
    assert "merged into the same model unquantized" in here.err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("direct", "here")]
    assert weights[0] == weights[1]
    gone = renamed_base(run / "adapter", tmp_path / "gone", str(tmp_path / "nowhere"))
    from_small = octavo("merge", "--model", small, "--adapter", gone, "--out", tmp_path / "from-small", "--json")
    assert from_small.code == 0, from_small.err
    assert from_small.json["base_scheme"] == "int8"
    assert from_small.err.count("merged into dequantized int8 weights") == 1
    assert (tmp_path / "from-small" / "model.safetensors").read_bytes() != weights[0]
    assert "dequantized int8 weights" in (tmp_path / "from-small" / "README.md").read_text()


def test_the_base_is_found_in_the_cache_of_the_hub(
    run: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_llama, repository / "snapshots" / ("0" * 40))
    adapter = renamed_base(run / "adapter", tmp_path / "adapter", "owner/name")
    found = api.merge(adapter=adapter, out=tmp_path / "out", quiet=True)
    assert found["base"] == "owner/name"
    assert "base_model: owner/name" in (tmp_path / "out" / "README.md").read_text()
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").unlink()  # as after the download of config.json alone
    with pytest.raises(UsageError, match="the base 'owner/name', which is not on this machine"):
        api.merge(adapter=adapter, out=tmp_path / "again", quiet=True)


def test_an_adapter_of_other_weights_is_refused_unless_forced(
    octavo: Octavo, run: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    assert octavo("merge", "--adapter", run, "--type", "float32", "--out", tmp_path / "once").code == 0
    arguments = ("merge", "--model", tmp_path / "once", "--adapter", run, "--out", tmp_path / "twice")
    refused = octavo(*arguments)
    assert (refused.code, refused.out) == (1, "")
    assert "was trained on other base weights" in refused.err
    assert "--model" in refused.err
    assert not (tmp_path / "twice").exists()
    forced = octavo(*arguments, "--force")
    assert forced.code == 0
    assert "warning: The adapter" in forced.err
    assert "the adapter was trained on other weights" in (tmp_path / "twice" / "README.md").read_text()
    with pytest.raises(AdapterError, match="other base weights") as caught:
        api.merge(model=tmp_path / "once", adapter=run, out=tmp_path / "third", quiet=True)
    assert "force" in caught.value.hint
    assert "--" not in caught.value.hint


def test_errors_say_what_to_do_and_write_nothing(octavo: Octavo, run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (kept := tmp_path / "kept").mkdir()
    (kept / "notes.txt").write_text("mine")
    new = ("--out", tmp_path / "new")
    nameless = renamed_base(run / "adapter", tmp_path / "nameless", "")
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        (new, 2, "The adapter is missing"),
        (("--adapter", run), 2, "Name a new folder with --out"),
        (("--adapter", run, "--out", kept), 2, "already holds"),
        (("--adapter", tmp_path / "mien", *new), 1, "There is no folder"),
        (("--adapter", f"{run}@7", *new), 1, "no checkpoint of step 7"),
        (("--adapter", run, "--model", tmp_path / "lama", *new), 2, "lama"),
        (("--adapter", tiny_llama, *new), 1, "is a model's folder, not an adapter"),
        (("--adapter", run, "--model", run / "adapter", *new), 1, "is an adapter, not a model"),
        (("--adapter", nameless, *new), 2, "names no base"),
        (("--adapter", run, "--type", "int3", *new), 2, "'int3'"),
    ]
    for arguments, code, expected in cases:
        done = octavo("merge", *arguments)
        assert (done.code, done.out) == (code, ""), (arguments, done.err)
        assert expected in done.err, done.err
        assert "Traceback" not in done.err
    assert not (tmp_path / "new").exists()
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
