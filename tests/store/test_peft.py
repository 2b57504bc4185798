"""Adapters in PEFT's file format: the content of a folder, atomic writes, and what is refused.

No model is needed here; that peft reads these folders, and octavo peft's, is tested in test_adapters.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo import atomic
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


def random_lora(rank: int = 4, scaling: float = 3.0) -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator), scaling


QUERIES = Adapter(SPEC, {f"{block}.attn.q_proj": random_lora() for block in BLOCKS}, {})
LINEARS = Adapter(SPEC, {name: random_lora() for name in MODULES if name.endswith("_proj")}, {})


def put(out: Path, adapter: Adapter = QUERIES, *, biases: bool = False, base: str = "base") -> dict[str, Any]:
    """Writes an adapter and returns its adapter_config.json."""
    write(out, adapter, modules=MODULES, biases=biases, base=base, readme="# A model\n")
    config: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return config


def change(out: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None) -> None:
    """Changes an adapter's files and removes octavo.json's hash, as if another program had written them."""
    origin = json.loads((out / "octavo.json").read_text())
    for key in ("sha256", "targets"):
        origin.pop(key, None)
    (out / "octavo.json").write_text(json.dumps(origin))
    if config is not None:
        (out / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, out / "adapter_model.safetensors")


def test_an_adapter_round_trips_bit_for_bit(tmp_path: Path) -> None:
    name = f"{BLOCKS[0]}.mlp.up_proj"
    adapter = Adapter(
        SPEC,
        {"model.embed_tokens": random_lora(), name: random_lora(), "lm_head": random_lora()},
        {
            f"{BLOCKS[1]}.norm.weight": torch.randn(8),
            f"{BLOCKS[1]}.norm.bias": torch.randn(8),
            f"{name}.bias": random_lora()[0],
        },
        {"base": {"sha256": "0"}},
        frozenset({"model.embed_tokens"}),
    )
    put(tmp_path / "adapter", adapter, biases=True)
    actual = read(tmp_path / "adapter")
    assert (actual.spec, actual.origin, actual.embeddings) == (adapter.spec, adapter.origin, adapter.embeddings)
    assert actual.lora.keys() == adapter.lora.keys()
    for key, (a, b, scaling) in adapter.lora.items():
        assert torch.equal(actual.lora[key][0], a)
        assert torch.equal(actual.lora[key][1], b)
        assert actual.lora[key][2] == scaling
    assert actual.full.keys() == adapter.full.keys()
    assert all(torch.equal(actual.full[key], tensor) for key, tensor in adapter.full.items())


def test_the_file_has_pefts_tensor_names(tmp_path: Path) -> None:
    lora = {"model.embed_tokens": random_lora(), f"{BLOCKS[0]}.attn.q_proj": random_lora()}
    full = {f"{BLOCKS[0]}.attn.q_proj.bias": torch.ones(6), f"{BLOCKS[0]}.norm.weight": torch.ones(8)}
    put(tmp_path / "adapter", Adapter(SPEC, lora, full, {}, frozenset({"model.embed_tokens"})), biases=True)
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
        "base_model.model.model.layers.0.attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.attn.q_proj.base_layer.bias",
        "base_model.model.model.layers.0.norm.weight",
    }


def test_written_tensors_share_no_memory() -> None:
    a = torch.randn(8, 4)
    shared = {"q_proj": (a.T, a, 1.0), "v_proj": (a.T, a, 1.0)}
    actual = tensors_of(Adapter(SPEC, shared, {}))
    assert all(tensor.is_contiguous() for tensor in actual.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in [a, *actual.values()]}) == 5


def test_target_modules_are_last_names_or_full_names_if_a_layer_has_no_lora(tmp_path: Path) -> None:
    assert put(tmp_path / "all", LINEARS)["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    some = replace(LINEARS, lora={**QUERIES.lora, f"{BLOCKS[1]}.mlp.up_proj": random_lora()})
    assert put(tmp_path / "some", some)["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]


@pytest.mark.parametrize("rslora", [False, True])
def test_modules_of_another_rank_or_scaling_round_trip_through_patterns(rslora: bool, tmp_path: Path) -> None:
    """PEFT's scaling is alpha / r, or alpha / sqrt(r): 3 and 6 with the rank 4 and the alpha 12."""
    usual = 6.0 if rslora else 3.0
    scalings = {"attn.q_proj": usual, "attn.v_proj": 0.5, "mlp.up_proj": usual}
    ranks = {"attn.q_proj": 4, "attn.v_proj": 4, "mlp.up_proj": 9}
    lora = {f"{BLOCKS[0]}.{name}": random_lora(ranks[name], scalings[name]) for name in ranks}
    config = put(tmp_path / "adapter", Adapter(replace(SPEC, rslora=rslora), lora, {}))
    assert config["rank_pattern"] == {f"{BLOCKS[0]}.mlp.up_proj": 9}
    expected = {
        f"{BLOCKS[0]}.attn.v_proj": 1.0 if rslora else 2.0,
        f"{BLOCKS[0]}.mlp.up_proj": 18.0 if rslora else 27.0,
    }
    assert config["alpha_pattern"] == pytest.approx(expected)
    actual = {name: scaling for name, (_, _, scaling) in read(tmp_path / "adapter").lora.items()}
    assert actual == pytest.approx({f"{BLOCKS[0]}.{name}": scaling for name, scaling in scalings.items()})


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "another type": ({"peft_type": "IA3"}, "IA3"),
    "of parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "a type that is no word": ({"peft_type": ["LORA"]}, "type a list of 1"),
    "no rank": ({"r": None}, "r is missing"),
    "a rank of text": ({"r": "many"}, "r is 'many'"),
    "a truth value as rank": ({"r": True}, "r is True"),
    "half a rank": ({"r": 4.5}, "r is 4.5; it must be an integer"),
    "rank 0": ({"r": 0}, "r is 0"),
    "a rank of no layer": ({"r": 10**30}, "r is 1000"),
    "an alpha that overflows": ({"lora_alpha": 1e300}, "lora_alpha is 1e.300"),
    "a dropout of all": ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    "a dropout of text": ({"lora_dropout": "none"}, "lora_dropout is 'none'"),
    "rslora of text": ({"use_rslora": "false"}, "use_rslora is 'false'"),
    "modules of a number": ({"modules_to_save": 3}, "modules_to_save is 3"),
    "modules that are no names": ({"modules_to_save": [["lm_head"]]}, "modules_to_save is a list"),
    "tokens of text": ({"trainable_token_indices": "all"}, "trainable_token_indices is 'all'"),
    "tokens under 0": ({"trainable_token_indices": [-1]}, "trainable_token_indices does not hold"),
    "tokens twice": ({"trainable_token_indices": {"lm_head": [3, 3]}}, "trainable_token_indices does not hold"),
    "tokens of no number": ({"trainable_token_indices": {"lm_head": ["x"]}}, "trainable_token_indices does not hold"),
    "patterns in a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern is a list of 1"),
    "an alpha of nothing": ({"alpha_pattern": {"q_proj": None}}, "q_proj is missing"),
    "a list as alpha": ({"lora_alpha": [1]}, "lora_alpha is a list"),
    "an alpha of no bound": ({"alpha_pattern": {"q_proj": -1e40}}, "q_proj is -1e"),
    "another rank": ({"r": 8}, "has rank 4,"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_config_of_another_adapter_is_refused(case: str, tmp_path: Path) -> None:
    changes, reason = CHANGES[case]
    config = put(tmp_path / "adapter") | changes
    change(tmp_path / "adapter", config={key: value for key, value in config.items() if value is not None})
    with pytest.raises(AdapterError, match=reason):
        read(tmp_path / "adapter")


NOT_JSON = {
    "deep": "[" * 200_000,
    "deep in a value": '{"r": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "infinite": '{"peft_type": "LORA", "r": 1e999, "lora_alpha": 8}',
    "infinite in a pattern": '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 1e999}}',
    "NaN": '{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}',
    "twice": '{"peft_type": "LORA", "r": 4, "r": 8, "lora_alpha": 8}',
    "a list": "[]",
}


@pytest.mark.parametrize("name", ["adapter_config.json", "octavo.json"])
@pytest.mark.parametrize("case", NOT_JSON)
def test_json_beyond_the_limits_is_an_adapter_error(case: str, name: str, tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_text(NOT_JSON[case])
    with pytest.raises(AdapterError, match=name) as caught:
        read(tmp_path / "adapter")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_an_error_that_names_both(version: object, tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    path = tmp_path / "adapter" / "octavo.json"
    origin = json.loads(path.read_bytes())
    assert origin["format"] == 1
    path.write_text(json.dumps({**origin, "format": version}))
    told = "no format version" if version is None else f"the format version {version!r}"
    with pytest.raises(AdapterError, match=rf"octavo\.json has {told}; this octavo reads version 1\."):
        read(tmp_path / "adapter")
    path.unlink()  # as its hint says
    assert read(tmp_path / "adapter").lora.keys() == QUERIES.lora.keys()


EXPRESSIONS = [
    "(?:(?:[a-z_.0-9]+)+)+!", "((.*)*)*x", "(" * 5000, ".*q_proj", r"layers\.\d+\.attn", "q_proj$", "(q|v)_proj", "",
    "q_proj\n", "a^b",
]  # fmt: skip


@pytest.mark.parametrize("key", EXPRESSIONS, ids=lambda key: repr(key[:20]))
@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_is_never_run_as_a_regular_expression(pattern: str, key: str, tmp_path: Path) -> None:
    config = put(tmp_path / "adapter")
    change(tmp_path / "adapter", config={**config, pattern: {key: 4}})
    with pytest.raises(AdapterError, match=f"{pattern} has the key") as caught:
        read(tmp_path / "adapter")
    assert "one key each" in caught.value.hint
    assert len(str(caught.value)) < 600


NAME_KEYS = {
    "an end": ({"q_proj": 24}, (24, 12, 24, 12)),
    "part of a name": ({"proj": 24}, (12, 12, 12, 12)),
    "two names": ({"q_proj|v_proj": 24}, (24, 24, 24, 24)),
    "the first key": ({"v_proj": 36, "attn.v_proj": 24}, (12, 36, 12, 36)),
    "a longer end first": ({"1.attn.v_proj": 24, "v_proj": 36}, (12, 36, 12, 24)),
    "a whole name": ({"model.layers.1.attn.q_proj": 24}, (12, 12, 24, 12)),
    "a whole name marked": ({"^model.layers.1.attn.q_proj": 24, "^q_proj": 36}, (12, 12, 24, 12)),
    "escaped dots": ({r"layers\.0\.attn\.q_proj": 24}, (24, 12, 12, 12)),
}


@pytest.mark.parametrize("case", NAME_KEYS)
def test_names_in_a_pattern_are_matched_as_peft_matches_them(case: str, tmp_path: Path) -> None:
    pattern, alphas = NAME_KEYS[case]
    names = [f"{block}.attn.{key}_proj" for block in BLOCKS for key in "qv"]
    config = put(tmp_path / "adapter", Adapter(SPEC, {name: random_lora() for name in names}, {}))
    change(tmp_path / "adapter", config={**config, "alpha_pattern": pattern})
    actual = read(tmp_path / "adapter").lora
    keys = {name: get_pattern_key(list(pattern), name) for name in names}
    assert [actual[name][2] * 4 for name in names] == [pattern.get(keys[name], 12) for name in names] == list(alphas)


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


@pytest.mark.parametrize("shape", [(), (4,), (4, 8, 1)])
def test_lora_that_is_not_two_matrices_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    tensors = load_file(out / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_A" in key)
    change(out, tensors={**tensors, key: torch.zeros(shape)})
    with pytest.raises(AdapterError, match=rf"{re.escape(key)} is no matrix, its shape is {re.escape(str(shape))}"):
        read(out)


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    change(out, tensors={})
    with pytest.raises(AdapterError, match="nothing that was trained"):
        read(out)


def test_a_read_adapter_has_its_files_hash_and_is_independent_of_later_writes(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    actual = read(out)
    file = out / "adapter_model.safetensors"
    assert actual.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    before = {name: (a.clone(), b.clone()) for name, (a, b, _) in actual.lora.items()}
    file.write_bytes(bytes(file.stat().st_size))  # in place, as cp does
    for name, (a, b, _) in actual.lora.items():
        assert torch.equal(a, before[name][0])
        assert torch.equal(b, before[name][1])


@pytest.mark.parametrize("origin", [{}, {"base": None}, {"base": "x"}, {"base": {"sha256": 3}}])
def test_an_adapter_without_a_base_name_has_an_empty_one(origin: dict[str, Any]) -> None:
    assert Adapter(SPEC, {}, {}, origin).trained_on is None
    assert Adapter(SPEC, {}, {}, {"base": {"sha256": "0a"}}).trained_on == "0a"


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_lora_without_a_or_b_is_refused(half: str, tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    removed = f"base_model.model.model.layers.0.attn.q_proj.{half}.weight"
    change(tmp_path / "adapter", tensors={name: t.clone() for name, t in load_file(path).items() if name != removed})
    with pytest.raises(AdapterError, match=removed):
        read(tmp_path / "adapter")


def test_a_written_folder_contains_its_origin(tmp_path: Path) -> None:
    config = put(tmp_path / "adapter", replace(QUERIES, origin={"base": "hash"}), base="owner/name")
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["target_modules"] == ["q_proj"]
    assert (config["modules_to_save"], config["bias"]) == (None, "none")
    assert read(tmp_path / "adapter").origin == {"base": "hash"}
    assert (tmp_path / "adapter" / "README.md").read_text() == "# A model\n"


def test_fully_trained_modules_are_in_modules_to_save(tmp_path: Path) -> None:
    norms = {f"{block}.norm.{kind}": torch.ones(8) for block in BLOCKS for kind in ("weight", "bias")}
    biases = {f"{block}.attn.q_proj.bias": torch.ones(6) for block in BLOCKS}
    config = put(tmp_path / "adapter", replace(QUERIES, full={**norms, **biases}), biases=True)
    assert config["modules_to_save"] == [f"{block}.norm" for block in BLOCKS]
    assert config["bias"] == "lora_only"


def test_a_write_replaces_the_folder_completely(tmp_path: Path) -> None:
    for adapter in (LINEARS, QUERIES):
        put(tmp_path / "run" / "adapter", adapter)
        (tmp_path / "run" / "adapter" / "left-over").touch()
    (tmp_path / "run" / "adapter" / "left-over").unlink()
    assert read(tmp_path / "run" / "adapter").lora.keys() == QUERIES.lora.keys()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["adapter"]
    assert len(list((tmp_path / "run" / "adapter").iterdir())) == 4


@pytest.mark.parametrize("fails", ["tensors", "disk", "rename"])
def test_a_failed_write_keeps_the_old_folder_and_leaves_no_files(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run" / "adapter"
    put(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if fails == "rename":
        monkeypatch.setattr(atomic, "rename_over", lambda a, b: fail() if a.name[:4] == ".tmp" else a.replace(b))
    elif fails == "disk":
        monkeypatch.setattr(atomic, "fsync_file", fail)
    else:
        monkeypatch.setattr(peft, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        put(out, LINEARS)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in out.parent.iterdir()] == ["adapter"]


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        put(tmp_path / "adapter")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()} == {0o640}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    put(tmp_path / "adapter", replace(QUERIES, full={f"{BLOCKS[0]}.norm.weight": torch.ones(8)}))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for key in tensors:
        damaged = {name: tensor.to(dtype).clone() for name, tensor in tensors.items()}
        damaged[key].view(-1)[-1] = value
        change(tmp_path / "adapter", tensors=damaged)
        with pytest.raises(AdapterError, match="not finite in float32, in " + key):
            read(tmp_path / "adapter")


def test_float64_values_beyond_float32_are_refused(tmp_path: Path) -> None:
    """They would be infinite in the model, whose adapters are float32."""
    put(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    change(tmp_path / "adapter", tensors=wide)
    assert read(tmp_path / "adapter").lora.keys() == QUERIES.lora.keys()
    for value in (1e39, -1e300):
        key = next(iter(wide))
        damaged = {name: tensor.clone() for name, tensor in wide.items()}
        damaged[key][0, 0] = value
        change(tmp_path / "adapter", tensors=damaged)
        with pytest.raises(AdapterError, match=f"not finite in float32, in {key}"):
            read(tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_not_floating_point_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    change(tmp_path / "adapter", tensors={name: tensor.to(dtype) for name, tensor in tensors.items()})
    with pytest.raises(AdapterError, match="octavo reads 16 to 64 bits"):
        read(tmp_path / "adapter")


def test_a_flipped_bit_of_a_tensor_or_a_changed_config_value_is_detected(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    config = put(out, LINEARS)
    data = (out / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), (len(data) - start) // 7):
        damaged = bytearray(data)
        damaged[position] ^= 1
        (out / "adapter_model.safetensors").write_bytes(damaged)
        with pytest.raises(AdapterError, match="changed since it was written") as caught:
            read(out)
        assert caught.value.hint == "Restore it from a copy.", "not to remove the hash that found the damage"
    (out / "adapter_model.safetensors").write_bytes(data)
    for key, value in {"lora_alpha": 13.0, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}.items():
        (out / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(AdapterError, match="changed since it was written"):
            read(out)
    # What does not change the function may change: the base's name, the layout of the file.
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/name"}))
    save_file(load_file(out / "adapter_model.safetensors"), out / "adapter_model.safetensors", metadata={"a": "b"})
    assert read(out).lora.keys() == LINEARS.lora.keys()


def test_the_error_of_a_changed_adapter_names_its_tensors(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    config = put(out, LINEARS)
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second, third, *_ = sorted(tensors)
    rest = {key: tensor for key, tensor in tensors.items() if key != second}
    changes: dict[str, tuple[dict[str, Tensor], str]] = {
        "missing": (rest, f"adapter_model.safetensors lacks {second}."),
        "extra": ({**tensors, "other": torch.ones(2)}, "adapter_model.safetensors has, and should not have, other."),
        "renamed": ({**rest, "x": tensors[second]}, f"lacks {second}; it has, and should not have, x."),
        "value": ({**tensors, third: tensors[third] + 1}, f"has other values or another shape in {third}."),
        "shape": ({**tensors, first: tensors[first][:-1]}, f"has other values or another shape in {first}."),
        "all": (
            {key: tensor + 1 for key, tensor in tensors.items()},
            f"in {first}, {second}, {third} and {len(tensors) - 3} more.",
        ),
    }
    for changed, message in changes.values():
        save_file(changed, file)
        with pytest.raises(AdapterError, match=re.escape(message)) as caught:
            read(out)
        assert str(out) in caught.value.message
        assert caught.value.hint.startswith("Restore it from a copy.")
    save_file(tensors, file)
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 13.0}))
    with pytest.raises(AdapterError, match=r"the values in adapter_config\.json are others"):
        read(out)
    origin = json.loads((out / "octavo.json").read_text())  # as earlier versions wrote it
    (out / "octavo.json").write_text(json.dumps({key: value for key, value in origin.items() if key != "tensors"}))
    with pytest.raises(AdapterError, match=r"do not have the hash in octavo\.json"):
        read(out)


def test_the_error_of_another_programs_adapter_names_all_its_damaged_tensors(tmp_path: Path) -> None:
    """It has no hash, and none is mentioned."""
    out = tmp_path / "adapter"
    put(out, LINEARS)
    (out / "octavo.json").unlink()
    tensors = load_file(out / "adapter_model.safetensors")
    a, b, *_ = sorted(key for key in tensors if "lora_A" in key)
    renamed = {key.replace("lora_A", "lora_C") if key in (a, b) else key: tensor for key, tensor in tensors.items()}
    lacking = {key: tensor for key, tensor in tensors.items() if key not in (a, b)}
    for changed, message in (
        (renamed, f"holds {a.replace('lora_A', 'lora_C')}, {b.replace('lora_A', 'lora_C')}, which octavo does not"),
        (lacking, f"lacks {a}, {b}: it has only one of the two matrices"),
    ):
        save_file(changed, out / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=re.escape(message)) as caught:
            read(out)
        assert str(out) in caught.value.message
        assert "from a copy" in caught.value.hint
        assert "hash" not in str(caught.value)


TARGETS: dict[str, Any] = {
    "a list": [],
    "one less": {f"{BLOCKS[0]}.attn.q_proj": {"rank": 4, "scaling": 3.0}},
    "one more": {f"{block}.attn.q_proj": {"rank": 4, "scaling": 3.0} for block in (*BLOCKS, "model.layers.2")},
    "another rank": {f"{block}.attn.q_proj": {"rank": 5, "scaling": 3.0} for block in BLOCKS},
    "another scaling": {f"{block}.attn.q_proj": {"rank": 4, "scaling": 3.1} for block in BLOCKS},
    "no scaling": {f"{block}.attn.q_proj": {"rank": 4} for block in BLOCKS},
    "names alone": {f"{block}.attn.q_proj": 4 for block in BLOCKS},
}


@pytest.mark.parametrize("case", TARGETS)
def test_lora_that_octavo_json_does_not_list_is_refused(case: str, tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    path = tmp_path / "adapter" / "octavo.json"
    origin = json.loads(path.read_bytes())
    assert origin["targets"] == {f"{block}.attn.q_proj": {"rank": 4, "scaling": 3.0} for block in BLOCKS}
    path.write_text(json.dumps({**origin, "targets": TARGETS[case]}))
    with pytest.raises(AdapterError, match=r"octavo\.json lists: model\.layers\.\d\.attn\.q_proj.* is missing, not"):
        read(tmp_path / "adapter")
    path.write_text(json.dumps({key: value for key, value in origin.items() if key != "targets"}))
    assert read(tmp_path / "adapter").lora.keys() == QUERIES.lora.keys()  # as written before there were targets


def test_an_adapter_without_a_hash_is_read(tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    change(tmp_path / "adapter")
    assert read(tmp_path / "adapter").origin == {}
    (tmp_path / "adapter" / "octavo.json").unlink()
    assert read(tmp_path / "adapter").origin == {}


def test_a_pickle_is_read_if_allowed_and_otherwise_the_error_names_the_flag(tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    put(out)
    expected = read(out)
    tensors = load_file(out / "adapter_model.safetensors")
    torch.save(tensors, out / "adapter_model.bin")
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="pickle") as caught:
        read(out)
    assert "--allow-pickle" in caught.value.hint
    actual = read(out, allow_pickle=True)
    assert all(torch.equal(actual.lora[name][0], expected.lora[name][0]) for name in expected.lora)
    (out / "adapter_model.bin").write_bytes(bytes(1000))  # in place: the tensors that were read do not change
    assert all(torch.equal(actual.lora[name][0], expected.lora[name][0]) for name in expected.lora)
    with pytest.raises(AdapterError, match="cannot be read"):
        read(out, allow_pickle=True)


def test_a_pickle_that_would_run_a_program_is_refused(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    out = tmp_path / "adapter"
    put(out)
    (out / "adapter_model.safetensors").unlink()
    torch.save({"x": Program()}, out / "adapter_model.bin")
    with pytest.raises(AdapterError, match="cannot be read"):
        read(out, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_the_error_of_a_folder_without_an_adapter_suggests_the_right_one(tmp_path: Path) -> None:
    trainer, model = (tmp_path / name for name in ("trainer", "model"))
    for step in (9, 80, 500):
        put(trainer / f"checkpoint-{step}")
    (trainer / "checkpoint-1000").mkdir()  # without an adapter
    (trainer / "checkpoint-best").mkdir()
    model.mkdir()
    (model / "config.json").write_text("{}")
    for folder, hint in ((trainer, "checkpoint-500"), (model, "--model ")):
        with pytest.raises(AdapterError, match=f"{folder} .*not an adapter") as caught:
            read(folder)
        assert hint in caught.value.hint
    with pytest.raises(AdapterError, match="no folder"):
        read(tmp_path / "none")


def test_a_git_lfs_pointer_and_a_file_that_is_not_regular_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "adapter")
    tensors = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(AdapterError, match="Git LFS pointer"):
        read(tmp_path / "adapter")
    tensors.unlink()
    os.mkfifo(tensors)
    with pytest.raises(AdapterError, match="not a regular file"):
        read(tmp_path / "adapter")


@pytest.mark.parametrize("target", ["/nowhere/octavo.json", "octavo.json", "/dev/null", "."])
def test_an_octavo_json_that_is_not_a_regular_file_is_refused(target: str, tmp_path: Path) -> None:
    """Read as absent, it would leave the tensors unchecked."""
    put(tmp_path / "adapter")
    path = tmp_path / "adapter" / "octavo.json"
    path.unlink()
    path.symlink_to(target)
    with pytest.raises(AdapterError, match=r"octavo\.json (cannot be read|is not a regular file)"):
        read(tmp_path / "adapter")
