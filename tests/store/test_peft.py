"""Adapters in PEFT's file format: what a folder says, that it is whole or not there, and what is refused.

No model is needed here; that peft reads these folders, and octavo peft's, is in test_adapter.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import AdapterError
from octavo.layers.lora import LoraSpec
from octavo.store import peft
from octavo.store.peft import Adapter, read, tensors_of, write

SPEC = LoraSpec(rank=4, alpha=12.0)
BLOCKS = [f"model.layers.{i}" for i in (0, 1)]
MODULES = [
    "model.embed_tokens",
    *(f"{block}.{name}" for block in BLOCKS for name in ("norm", "attn.q_proj", "attn.v_proj", "mlp.up_proj")),
    "lm_head",
]


def pair(rank: int = 4, scaling: float = 3.0) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator), scaling


QUERIES = Adapter(SPEC, {f"{block}.attn.q_proj": pair() for block in BLOCKS}, {})
LINEARS = Adapter(SPEC, {name: pair() for name in MODULES if name.endswith("_proj")}, {})


def put(out: Path, adapter: Adapter = QUERIES, *, biases: bool = False, base: str = "base") -> dict[str, Any]:
    """Writes an adapter and returns its adapter_config.json."""
    write(out, adapter, modules=MODULES, biases=biases, base=base, card="# A card\n")
    config: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return config


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    name = f"{BLOCKS[0]}.mlp.up_proj"
    adapter = Adapter(
        SPEC,
        {"model.embed_tokens": pair(), name: pair(), "lm_head": pair()},
        {
            f"{BLOCKS[1]}.norm.weight": torch.randn(8),
            f"{BLOCKS[1]}.norm.bias": torch.randn(8),
            f"{name}.bias": pair()[0],
        },
        {"base": {"sha256": "0"}},
        frozenset({"model.embed_tokens"}),
    )
    put(tmp_path / "adapter", adapter, biases=True)
    found = read(tmp_path / "adapter")
    assert (found.spec, found.origin, found.embeddings) == (adapter.spec, adapter.origin, adapter.embeddings)
    assert found.pairs.keys() == adapter.pairs.keys()
    for key, (a, b, scaling) in adapter.pairs.items():
        assert torch.equal(found.pairs[key][0], a)
        assert torch.equal(found.pairs[key][1], b)
        assert found.pairs[key][2] == scaling
    assert found.full.keys() == adapter.full.keys()
    assert all(torch.equal(found.full[key], tensor) for key, tensor in adapter.full.items())


def test_names_in_the_file_are_pefts(tmp_path: Path) -> None:
    pairs = {"model.embed_tokens": pair(), f"{BLOCKS[0]}.attn.q_proj": pair()}
    full = {f"{BLOCKS[0]}.attn.q_proj.bias": torch.ones(6), f"{BLOCKS[0]}.norm.weight": torch.ones(8)}
    put(tmp_path / "adapter", Adapter(SPEC, pairs, full, {}, frozenset({"model.embed_tokens"})), biases=True)
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.layers.0.attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.attn.q_proj.base_layer.bias",
        "base_model.model.model.layers.0.norm.weight",
    }


def test_tensors_have_memory_of_their_own() -> None:
    a = torch.randn(8, 4)
    shared = {"q_proj": (a.T, a, 1.0), "v_proj": (a.T, a, 1.0)}
    found = tensors_of(Adapter(SPEC, shared, {}))
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in [a, *found.values()]}) == 5


def test_a_last_name_stands_for_all_layers_or_whole_names_are_given(tmp_path: Path) -> None:
    assert put(tmp_path / "all", LINEARS)["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    some = replace(LINEARS, pairs={**QUERIES.pairs, f"{BLOCKS[1]}.mlp.up_proj": pair()})
    assert put(tmp_path / "some", some)["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]


@pytest.mark.parametrize("rslora", [False, True])
def test_pairs_of_another_rank_or_scaling_are_named_and_come_back(rslora: bool, tmp_path: Path) -> None:
    """PEFT's scaling is alpha / r, or alpha / sqrt(r): 3 and 6 with the rank 4 and the alpha 12."""
    usual = 6.0 if rslora else 3.0
    scalings = {"attn.q_proj": usual, "attn.v_proj": 0.5, "mlp.up_proj": usual}
    ranks = {"attn.q_proj": 4, "attn.v_proj": 4, "mlp.up_proj": 9}
    pairs = {f"{BLOCKS[0]}.{name}": pair(ranks[name], scalings[name]) for name in ranks}
    config = put(tmp_path / "adapter", Adapter(replace(SPEC, rslora=rslora), pairs, {}))
    assert config["rank_pattern"] == {f"{BLOCKS[0]}.mlp.up_proj": 9}
    wanted = {f"{BLOCKS[0]}.attn.v_proj": 1.0 if rslora else 2.0, f"{BLOCKS[0]}.mlp.up_proj": 18.0 if rslora else 27.0}
    assert config["alpha_pattern"] == pytest.approx(wanted)
    found = {name: scaling for name, (_, _, scaling) in read(tmp_path / "adapter").pairs.items()}
    assert found == pytest.approx({f"{BLOCKS[0]}.{name}": scaling for name, scaling in scalings.items()})


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "another type": ({"peft_type": "IA3"}, "IA3"),
    "no rank": ({"r": None}, "no usable rank"),
    "a rank of text": ({"r": "many"}, "no usable rank"),
    "rank 0": ({"r": 0}, "rank is 0"),
    "another rank": ({"r": 8}, "has rank 4,"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_config_of_another_adapter_is_refused(case: str, tmp_path: Path) -> None:
    changes, told = CHANGES[case]
    config = put(tmp_path / "adapter") | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(kept))
    with pytest.raises(AdapterError, match=told):
        read(tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["no folder", "no config", "broken config", "no tensors", "cut tensors", "odd name"])
def test_a_damaged_adapter_is_an_adapter_error(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    put(folder)
    tensors = folder / "adapter_model.safetensors"
    if damage == "no folder":
        shutil.rmtree(folder)
    elif damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "broken config":
        (folder / "adapter_config.json").write_text("{")
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    else:
        save_file({"q_proj.lora_A.weight": torch.ones(4, 8)}, tensors)
    with pytest.raises(AdapterError, match="adapter"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank_pattern": {"(": 3}}, "patterns of rank and alpha"),
        ({"rank_pattern": ["q_proj"]}, "patterns of rank and alpha"),
        ({"alpha_pattern": {"q_proj": None}}, "patterns of rank and alpha"),
        ({"lora_alpha": float("nan")}, "no usable rank, alpha or dropout"),
        ({"lora_alpha": [1]}, "no usable rank, alpha or dropout"),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_an_adapter_error(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    config = put(out)
    (out / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(AdapterError, match=match):
        read(out)


@pytest.mark.parametrize("shape", [(), (4,), (4, 8, 1)])
def test_a_pair_that_is_no_two_matrices_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    tensors = load_file(out / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: torch.zeros(shape)}, out / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="not two matrices"):
        read(out)


def test_an_adapter_of_nothing_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    save_file({}, out / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="nothing that was trained"):
        read(out)


def test_what_was_read_is_told_by_its_hash_and_no_later_write_changes_it(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    found = read(out)
    file = out / "adapter_model.safetensors"
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    before = {name: (a.clone(), b.clone()) for name, (a, b, _) in found.pairs.items()}
    file.write_bytes(bytes(file.stat().st_size))  # in place, as cp does
    for name, (a, b, _) in found.pairs.items():
        assert torch.equal(a, before[name][0])
        assert torch.equal(b, before[name][1])


@pytest.mark.parametrize("origin", [{}, {"base": None}, {"base": "x"}, {"base": {"sha256": 3}}])
def test_a_base_that_is_not_named_is_none(origin: dict[str, Any]) -> None:
    assert Adapter(SPEC, {}, {}, origin).trained_on is None
    assert Adapter(SPEC, {}, {}, {"base": {"sha256": "0a"}}).trained_on == "0a"


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(half: str, tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    gone = f"base_model.model.model.layers.0.attn.q_proj.{half}.weight"
    save_file({name: t.clone() for name, t in load_file(path).items() if name != gone}, path)
    with pytest.raises(AdapterError, match=gone):
        read(tmp_path / "adapter")


def test_a_written_folder_says_where_it_comes_from(tmp_path: Path) -> None:
    config = put(tmp_path / "adapter", replace(QUERIES, origin={"base": "hash"}), base="owner/name")
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["target_modules"] == ["q_proj"]
    assert (config["modules_to_save"], config["bias"]) == (None, "none")
    assert read(tmp_path / "adapter").origin == {"base": "hash"}
    assert (tmp_path / "adapter" / "README.md").read_text() == "# A card\n"


def test_what_is_trained_whole_is_named_for_peft(tmp_path: Path) -> None:
    norms = {f"{block}.norm.{kind}": torch.ones(8) for block in BLOCKS for kind in ("weight", "bias")}
    biases = {f"{block}.attn.q_proj.bias": torch.ones(6) for block in BLOCKS}
    config = put(tmp_path / "adapter", replace(QUERIES, full={**norms, **biases}), biases=True)
    assert config["modules_to_save"] == [f"{block}.norm" for block in BLOCKS]
    assert config["bias"] == "lora_only"


def test_a_new_write_replaces_the_old_one_whole(tmp_path: Path) -> None:
    for adapter in (LINEARS, QUERIES):
        put(tmp_path / "run" / "adapter", adapter)
        (tmp_path / "run" / "adapter" / "left-over").touch()
    (tmp_path / "run" / "adapter" / "left-over").unlink()
    assert read(tmp_path / "run" / "adapter").pairs.keys() == QUERIES.pairs.keys()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]
    assert len(list((tmp_path / "run" / "adapter").iterdir())) == 4


@pytest.mark.parametrize("fails", ["tensors", "disk", "rename"])
def test_a_write_that_fails_loses_nothing_and_leaves_nothing(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run" / "adapter"
    put(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    rename = Path.rename
    if fails == "rename":
        monkeypatch.setattr(Path, "rename", lambda a, b: fail() if a.name.startswith(".tmp") else rename(a, b))
    else:
        monkeypatch.setattr(peft, {"tensors": "save_file", "disk": "fsync_file"}[fails], fail)
    with pytest.raises(OSError, match="No space"):
        put(out, LINEARS)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]


def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        put(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()} == {0o640}
