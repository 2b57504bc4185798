"""A merged source against PEFT, transformers and octavo's own adapters: values, types, memory, identity, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.store.full_adapters import CASES, TOLERANCE, Written, logits, model_of
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from octavo.adapters import AdapterPlan, apply_, create_, save, trained
from octavo.adapters.merging import merged
from octavo.errors import AdapterError, ModelError
from octavo.layers.lora import LoraSpec
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.store import sinks, weights
from octavo.store.hf_folder import WrittenLayer, error_of_all, write_folder
from octavo.store.merged import MergedSource
from octavo.store.peft import Adapter, read
from octavo.store.sources import FolderSource, fingerprint

pytestmark = [
    # peft 0.21 and the torch that it calls.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:You passed `ensure_weight_tying=True`:UserWarning"),
]
NONE = scheme_named("none")
LORA = AdapterPlan(LoraSpec(rank=4, alpha=12.0), norms=True)
EVERYWHERE = replace(LORA, targets=("all-linear", "embed_tokens", "lm_head"))


def adapter_of(folder: Path, out: Path, plan: AdapterPlan = LORA) -> Adapter:
    """A random adapter of octavo for the model in `folder`, with its norms."""
    model = model_of(folder)
    create_(model, plan, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save(out, model, plan, base=str(folder), origin={}, readme="")
    return read(out)


def tensors(source: MergedSource) -> dict[str, Tensor]:
    """All tensors of a merged source, whose shapes are as it says."""
    read_tensors = {name: source.tensor(name) for name in source.names()}
    assert {name: tuple(tensor.shape) for name, tensor in read_tensors.items()} == {
        name: source.shape(name) for name in read_tensors
    }
    return read_tensors


@pytest.mark.parametrize("case", CASES)
def test_the_merged_folder_of_an_adapter_with_full_weights_gives_pefts_logits(
    case: str, families: dict[str, Path], written: Written, tmp_path: Path
) -> None:
    """The logits of PEFT's model are those before a merge: with a tied head its own merge changes both matrices."""
    folder, expected = written(case)
    source = FolderSource(families[CASES[case][0]])
    write_folder(merged(source, read(folder)), tmp_path / "out", NONE)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = model_of(tmp_path / "out")
    assert theirs.config.vocab_size == ours.config.vocabulary == expected.shape[-1]
    assert (logits(theirs) - expected).abs().max() <= TOLERANCE
    assert (logits(ours) - expected).abs().max() <= TOLERANCE


TIED = {
    "tied head": False, "tied embedding": False, "tied both": False, "tied kept": True, "tied saved along": True,
    "tied resized": True, "tied resized head": False, "tied tokens": True,
}  # fmt: skip


@pytest.mark.parametrize("case", TIED)
def test_a_tied_head_is_untied_only_if_it_differs_after_the_merge(
    case: str, families: dict[str, Path], written: Written
) -> None:
    source = merged(FolderSource(families["llama-tied"]), read(written(case)[0]))
    assert source.config["tie_word_embeddings"] is TIED[case]
    assert ("lm_head.weight" in source.names()) is not TIED[case]


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "gptj", "gpt_neo", "llama-tied"])
def test_weights_are_the_base_plus_scaling_b_a_in_the_checkpoints_layout(
    family: str, families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter = FolderSource(families[family]), adapter_of(families[family], tmp_path / "adapter")
    before = load_file(families[family] / "model.safetensors")
    whole = tensors(merged(source, adapter))
    monkeypatch.setattr(weights, "BLOCK_VALUES", 500)  # a few rows
    model = merged(source, adapter)
    changed = 0
    for name, weight in tensors(model).items():
        module = name.removesuffix(".weight")
        expected = adapter.full.get(name, before[name])
        lora = model.adapter.lora.get(module)
        if lora is not None:
            delta = lora[2] * (lora[1] @ lora[0])
            expected = before[name] + (delta.T if family == "gpt2" else delta)
            changed += 1
        assert torch.allclose(weight, expected, rtol=0, atol=1e-6), name
        assert torch.allclose(weight, whole[name], rtol=0, atol=1e-6), name
        assert torch.equal(source.tensor(name), before[name]), "the base is not changed in memory"
    assert changed == len(adapter.lora) > 0


def test_lora_on_embedding_and_head_and_trained_tokens_are_added(families: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_of(families["llama"], tmp_path / "adapter", EVERYWHERE)
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    adapter = replace(adapter, tokens={"model.embed_tokens": ((7, 299), rows)}, config=None)
    source = FolderSource(families["llama"])
    model = merged(source, adapter)
    base = {name: source.tensor(name) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    base["model.embed_tokens.weight"] = base["model.embed_tokens.weight"].clone()
    base["model.embed_tokens.weight"][[7, 299]] = rows
    for name, transposed in (("model.embed_tokens.weight", True), ("lm_head.weight", False)):
        a, b, scaling = adapter.lora[name.removesuffix(".weight")]
        delta = scaling * (b @ a)
        assert torch.allclose(model.tensor(name), base[name] + (delta.T if transposed else delta), rtol=0, atol=1e-6)
    given = {"lm_head.weight": base["lm_head.weight"].clone(), "model.norm.weight": torch.ones(64)}
    full = replace(adapter, lora={}, full=given, tokens={"lm_head": ((0,), rows[:1])})
    assert torch.equal(merged(source, full).tensor("lm_head.weight")[0], rows[0])
    assert torch.equal(given["lm_head.weight"], base["lm_head.weight"]), "the adapter is not changed in memory"
    kinds = model.merged()
    assert kinds["model.embed_tokens"] == ["LoRA", "tokens"]
    assert kinds["model.norm"] == ["weight"]
    assert len(kinds) == 14 + 2 + 5


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied"])
def test_a_quantized_base_is_merged_as_its_dequantized_weights(
    family: str, scheme: str, families: dict[str, Path], tmp_path: Path
) -> None:
    adapter = adapter_of(families[family], tmp_path / "adapter")
    write_folder(FolderSource(families[family]), tmp_path / "quantized", scheme_named(scheme))
    write_folder(FolderSource(tmp_path / "quantized"), tmp_path / "plain", NONE)
    quantized = merged(FolderSource(tmp_path / "quantized"), adapter)
    plain = merged(FolderSource(tmp_path / "plain"), adapter)
    assert "octavo" not in quantized.config
    assert quantized.names() == plain.names()
    actual, expected = tensors(quantized), tensors(plain)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    write_folder(quantized, tmp_path / "out", NONE)
    model = model_of(tmp_path / "quantized", scheme)
    apply_(model, adapter)
    assert (logits(model_of(tmp_path / "out")) - logits(model)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_16_bit_result_is_the_rounded_float32_result(
    stored: torch.dtype, dtype: torch.dtype, families: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(families["llama"], tmp_path / "base"))
    values = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(stored) for name, tensor in values.items()}, folder / "model.safetensors")
    adapter = adapter_of(families["llama"], tmp_path / "adapter")
    exact = tensors(merged(FolderSource(folder), adapter))
    rounded = tensors(merged(FolderSource(folder), adapter, dtype=dtype))
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)
    write_folder(merged(FolderSource(folder), adapter, dtype=dtype), tmp_path / "out", NONE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4-double"])
def test_the_error_of_a_quantized_result_is_that_of_the_merged_weights(
    scheme: str, families: dict[str, Path], tmp_path: Path
) -> None:
    model = merged(FolderSource(families["llama"]), adapter_of(families["llama"], tmp_path / "adapter"))
    layers: list[WrittenLayer] = []
    write_folder(model, tmp_path / "out", scheme_named(scheme), on_layer=layers.append)
    write_folder(FolderSource(tmp_path / "out"), tmp_path / "back", NONE)
    back = load_file(tmp_path / "back" / "model.safetensors")
    exact = {layer.name: model.tensor(layer.name) for layer in layers}
    for layer in layers:
        error = (back[layer.name] - exact[layer.name]).norm() / exact[layer.name].norm()
        assert layer.error == pytest.approx(float(error), rel=1e-4)
    all_errors = torch.cat([(back[name] - exact[name]).flatten() for name in exact]).norm()
    expected = all_errors / torch.cat([weight.flatten() for weight in exact.values()]).norm()
    assert error_of_all(layers) == pytest.approx(float(expected), rel=1e-4)


class Peak(TorchDispatchMode):
    """The most bytes of storages that PyTorch made and that were in use at one time, apart from pages of files."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        mapped = function is torch.ops.aten.set_.source_Storage  # by safetensors
        for tensor in [] if mapped else tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                reference = StorageWeakRef(tensor.untyped_storage())
                self.live.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


def peak(work: Callable[..., object], *arguments: object) -> int:
    measured = Peak()
    with measured:
        work(*arguments)
    return measured.bytes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("stored", ["none", "int8"])
def test_a_tensor_is_merged_in_the_memory_of_its_result_and_a_few_blocks(
    family: str, stored: str, families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, block = adapter_of(families[family], tmp_path / "adapter"), 512
    write_folder(FolderSource(families[family]), tmp_path / "stored", scheme_named(stored))
    model = merged(FolderSource(tmp_path / "stored"), adapter)
    for module in model.adapter.lora:
        name = f"{module}.weight"
        monkeypatch.setattr(weights, "BLOCK_VALUES", block)
        bound = 4 * prod(model.shape(name)) + 5 * 4 * block
        assert peak(model.tensor, name) <= bound
        monkeypatch.setattr(weights, "BLOCK_VALUES", 2**40)
        if prod(model.shape(name)) > 5 * block:  # the measurement sees what whole matrices would take
            assert peak(model.tensor, name) > bound


@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_a_folder_is_written_in_the_memory_of_a_shard_one_matrix_and_a_few_blocks(
    scheme: str, families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(families["llama"])
    model = merged(source, adapter_of(families["llama"], tmp_path / "adapter", EVERYWHERE))
    largest, shard, block = 4 * max(prod(model.shape(name)) for name in model.names()), 20_000, 512
    monkeypatch.setattr(weights, "BLOCK_VALUES", block)
    bound = 8 * 4 * block + largest + max(shard, largest if scheme == "none" else largest // 4 + 1200)
    bound += 0 if scheme == "none" else largest // 4 + 1200  # the quantized matrix, before it is in the shard

    def write(out: str) -> int:
        return peak(lambda: write_folder(model, tmp_path / out, scheme_named(scheme)))

    monkeypatch.setattr(sinks, "SHARD_BYTES", shard)
    assert write("shards") <= bound
    monkeypatch.setattr(sinks, "SHARD_BYTES", 2**40)
    assert write("whole") > bound, "the measurement sees a shard of all tensors"


def test_the_identity_is_that_of_base_and_adapter(families: dict[str, Path], tmp_path: Path) -> None:
    source, adapter = FolderSource(families["llama"]), adapter_of(families["llama"], tmp_path / "adapter")
    model = merged(source, adapter)
    write_folder(model, tmp_path / "out", NONE)
    write_folder(model, tmp_path / "int8", scheme_named("int8"))
    assert fingerprint(FolderSource(tmp_path / "out")) == fingerprint(FolderSource(tmp_path / "int8"))
    assert fingerprint(FolderSource(tmp_path / "out")) == fingerprint(model) != fingerprint(source)
    lora = {name: (a, b, 2 * scaling) for name, (a, b, scaling) in adapter.lora.items()}
    others = [replace(adapter, sha256="0" * 64), replace(adapter, lora=lora)]
    assert len({fingerprint(merged(source, each)) for each in (adapter, *others)}) == 3
    assert fingerprint(merged(FolderSource(tmp_path / "out"), adapter)) != fingerprint(model)


def test_values_beyond_the_type_are_an_error(families: dict[str, Path], tmp_path: Path) -> None:
    adapter = adapter_of(families["llama"], tmp_path / "adapter")
    name = "model.layers.1.mlp.up_proj"
    a, b, scaling = adapter.lora[name]
    adapter = replace(adapter, lora={**adapter.lora, name: (a, b * 1e6, scaling)})
    with pytest.raises(ModelError, match=r"up_proj\.weight, merged, as torch\.float16") as caught:
        tensors(merged(FolderSource(families["llama"]), adapter, dtype=torch.float16))
    assert "bfloat16" in caught.value.hint


def misfits(adapter: Adapter) -> Iterator[tuple[Adapter, str]]:
    """Adapters that do not fit the llama, and what the error says."""
    name = "model.layers.1.mlp.up_proj"
    a, b, scaling = adapter.lora[name]
    adapter = replace(adapter, config=None)
    yield replace(adapter, lora={name: (a[:, :-1], b, scaling)}), "lora_A is"
    yield replace(adapter, lora={f"{name}s": (a, b, scaling)}), "no module for"
    yield replace(adapter, full={f"{name}.weight": torch.zeros(96, 63)}), r"up_proj\.weight is \(96, 63\)"
    yield replace(adapter, full={"model.norm.weight": torch.ones(65)}), r"model\.norm\.weight is \(65,\) in the adapter"
    yield replace(adapter, full={"lm_head.weight": torch.zeros(310, 64)}), "the head 310"
    yield replace(adapter, tokens={"lm_head": ((300,), torch.zeros(1, 64))}), "the last of which is 300"
    yield replace(adapter, tokens={"lm_head": ((3, 4), torch.zeros(1, 64))}), "2 tokens of lm_head"


def test_an_adapter_that_does_not_fit_is_refused_before_a_weight_is_read(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter = FolderSource(families["llama"]), adapter_of(families["llama"], tmp_path / "adapter")
    monkeypatch.setattr(FolderSource, "tensor", lambda self, name: pytest.fail(f"{name} was read"))
    for wrong, message in misfits(adapter):
        with pytest.raises(AdapterError, match=message) as caught:
            merged(source, wrong)
        assert caught.value.hint


def test_a_base_that_lacks_a_tensor_is_an_error(llama_folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(llama_folder, tmp_path / "adapter")
    values = load_file(llama_folder / "model.safetensors")
    del values["model.norm.weight"]
    save_file(values, llama_folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks model\.norm\.weight"):
        merged(FolderSource(llama_folder), adapter)
