"""Models that a script around hivemind/gpt-j-6B-8bit saved: read to the bit, served whole, split without a loss.

The fixture `seed` is such a script's model, written for these tests from transformers and bitsandbytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo.adapters import apply_, apply_embedded_adapter_
from octavo.errors import ModelError, UsageError
from octavo.layers.lora import LoraSpec
from octavo.models import Decoder, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.store import peft as peft_module
from octavo.store.contents import stored_scheme
from octavo.store.embedded_adapter import (
    base_of,
    has_embedded_adapter,
    read_embedded_adapter,
    split,
)
from octavo.store.hf_folder import WrittenLayer, write_folder
from octavo.store.peft import read
from octavo.store.resolve import open_source
from octavo.store.sources import FolderSource, fingerprint
from octavo.store.weights import load

pytestmark = [
    # peft 0.21 and the torch that it calls.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
EXACT = 1e-5  # of float32 logits of about 1: the same sums in another order
MODULES = [
    "transformer.wte",
    *(f"transformer.h.{i}.attn.{name}_proj" for i in (0, 1) for name in ("q", "k", "v", "out")),
    *(f"transformer.h.{i}.mlp.fc_{name}" for i in (0, 1) for name in ("in", "out")),
    "lm_head",
]
NORMS = [f"{name}.{kind}" for name in ("transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f")
         for kind in ("weight", "bias")]  # fmt: skip
BIASES = [f"{name}.bias" for name in MODULES if "fc_" in name or name == "lm_head"]
ENDS = (".adapter.0.weight", ".adapter.1.weight")


def opened(folder: Path) -> FolderSource:
    return FolderSource(folder, allow_pickle=True)


def saved(folder: Path) -> dict[str, Tensor]:
    table: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return table


def model_of(folder: Path, scheme: str = "dynamic8") -> Decoder:
    """The model of a folder, with the adapters on it that the folder carries."""
    source = opened(folder)
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    model = load(base_of(source), scheme_named(scheme), **where)  # type: ignore[arg-type]
    apply_embedded_adapter_(model, source, say=lambda _: None)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    actual = model(IDS)
    return actual if isinstance(actual, Tensor) else actual.logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture
def changed(seed: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the seed's folder with some tensors replaced, or (None) left out."""

    def make(tensors: dict[str, Tensor | None]) -> Path:
        folder = Path(shutil.copytree(seed.folder, tmp_path / "changed"))
        table = {name: tensors.get(name, tensor) for name, tensor in {**saved(folder), **tensors}.items()}
        torch.save({name: tensor for name, tensor in table.items() if tensor is not None}, folder / "pytorch_model.bin")
        return folder

    return make


@pytest.fixture
def hivemind(changed: Callable[..., Path]) -> Path:
    """Like hivemind/gpt-j-6B-8bit: quantized values, scales and code tables, no adapter, other norms and biases."""
    others = {name: torch.full_like(tensor, 0.5) for name, tensor in saved_norms_and_biases().items()}
    return changed({**{name + end: None for name in MODULES for end in ENDS}, **others})


def saved_norms_and_biases() -> dict[str, Tensor]:
    sizes = {"fc_in": 256, "lm_head": 300}
    return {name: torch.empty(sizes.get(name.split(".")[-2], 64)) for name in [*NORMS, *BIASES]}


def test_the_test_file_equals_one_saved_by_the_scripts(seed: Any) -> None:
    """Otherwise the tests of this file would test nothing about such files."""
    frozen = [f"{name}.{part}" for name in MODULES for part in ("weight", "absmax", "code")]
    adapters = [name + end for name in MODULES for end in ENDS]
    buffers = [f"transformer.h.{i}.attn.{name}" for i in (0, 1) for name in ("bias", "masked_bias")]
    table = saved(seed.folder)
    assert set(table) == {*frozen, *adapters, *NORMS, *BIASES, *buffers}
    shapes = {name: tuple(table[name].shape) for name in adapters}
    assert shapes["transformer.wte.adapter.0.weight"] == (300, 5)
    assert shapes["transformer.wte.adapter.1.weight"] == (64, 5)
    assert shapes["transformer.h.1.mlp.fc_in.adapter.0.weight"] == (5, 64)
    assert shapes["transformer.h.1.mlp.fc_in.adapter.1.weight"] == (256, 5)
    assert table["transformer.wte.absmax"].shape == ((300 * 64 - 1) // 4096 + 1,)
    assert all(table[name].any() for name in adapters)


def test_a_hivemind_folder_loads_bit_for_bit(hivemind: Path) -> None:
    source, table = opened(hivemind), saved(hivemind)
    assert stored_scheme(source).name == "dynamic8"
    assert not has_embedded_adapter(source)
    assert base_of(source) is source
    for name, entry in weight_entries(model_of(hivemind)).items():
        if entry.matrix is not None:
            for part, tensor in entry.matrix.of(entry.rows_key).items():
                assert torch.equal(tensor, table[f"{name}.{part}"]), name
        for kind in ("weight", "bias"):
            if (parameter := entry.parameter(kind)) is not None:
                assert torch.equal(parameter, table[f"{name}.{kind}"]), name


def test_the_code_table_of_the_file_is_used(changed: Callable[..., Path], hivemind: Path) -> None:
    source = opened(hivemind)
    halves = {f"{name}.code": source.tensor(f"{name}.code") * 0.5 for name in MODULES if name != "lm_head"}
    shutil.rmtree(hivemind)
    folder = changed({**{name + end: None for name in MODULES for end in ENDS}, **halves})
    entry = weight_entries(model_of(folder))["transformer.h.0.mlp.fc_out"]
    assert entry.matrix is not None
    assert torch.equal(entry.matrix.parts["code"], halves["transformer.h.0.mlp.fc_out.code"])


def test_a_hivemind_folder_written_as_safetensors_keeps_every_byte(hivemind: Path, tmp_path: Path) -> None:
    write_folder(opened(hivemind), tmp_path / "out", scheme_named("dynamic8"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: t for name, t in saved(hivemind).items() if not name.endswith((".attn.bias", ".masked_bias"))}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name
    assert torch.equal(logits(model_of(tmp_path / "out")), logits(model_of(hivemind)))


def test_a_pickle_is_read_only_if_that_is_allowed(seed: Any) -> None:
    with pytest.raises(ModelError, match="is a pickle") as caught:
        has_embedded_adapter(FolderSource(seed.folder))
    assert "--allow-pickle" in caught.value.hint


@pytest.mark.parametrize("weights", [True, False])
def test_the_error_of_a_folder_with_only_weights_names_the_missing_files(hivemind: Path, weights: bool) -> None:
    (hivemind / "config.json").unlink()
    if not weights:
        (hivemind / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        open_source(str(hivemind), allow_pickle=True)
    assert ("EleutherAI/gpt-j-6B" in caught.value.hint) is weights


def test_the_error_of_a_folder_without_a_tokenizer_names_the_missing_files(hivemind: Path) -> None:
    """For such a folder transformers makes a GPT-J tokenizer of one token, with which everything else would run."""
    for file in hivemind.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        opened(hivemind).tokenizer()
    assert "tokenizer.json" in caught.value.hint
    assert "EleutherAI/gpt-j-6B" in caught.value.hint


def test_a_tuned_folder_gives_the_scripts_own_logits(seed: Any) -> None:
    messages: list[str] = []
    source = opened(seed.folder)
    base = load(base_of(source), scheme_named("dynamic8"), dtype=torch.float32, device=torch.device("cpu"))
    untuned = logits(base)
    apply_embedded_adapter_(base, source, say=messages.append)
    expected = logits(seed.model)
    assert distance(untuned, expected) > 1
    assert distance(logits(base), expected) <= EXACT
    assert len(messages) == 1
    assert f"on {len(MODULES)} layers" in messages[0]


def test_reading_only_the_weights_of_a_tuned_folder_is_refused(seed: Any, tmp_path: Path) -> None:
    """To load or to write them without the adapters would lose these."""
    for go in (
        lambda: load(opened(seed.folder), scheme_named("int8"), dtype=torch.float32, device=torch.device("cpu")),
        lambda: write_folder(opened(seed.folder), tmp_path / "out", scheme_named("int8")),
    ):
        with pytest.raises(ModelError, match="28 tensors") as caught:
            go()
        assert f"octavo convert {seed.folder} --allow-pickle --out" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_the_embedded_adapter_is_lora_with_alpha_r_and_all_trained_parameters(seed: Any) -> None:
    table, actual = saved(seed.folder), read_embedded_adapter(opened(seed.folder))
    assert actual.spec == LoraSpec(rank=5, alpha=5.0)
    assert set(actual.lora) == set(MODULES)
    for name, (a, b, scaling) in actual.lora.items():
        first, second = (table[name + end] for end in ENDS)
        assert scaling == 1
        assert torch.equal(a, first.T if name == "transformer.wte" else first)
        assert torch.equal(b, second)
    assert actual.embeddings == {"transformer.wte"}
    assert set(actual.full) == {*NORMS, *BIASES}
    assert all(torch.equal(tensor, table[name]) for name, tensor in actual.full.items())


def test_adapters_in_16_bits_are_read_too(changed: Callable[..., Path], seed: Any) -> None:
    table = saved(seed.folder)
    folder = changed({name: table[name].half() for name in table if name.endswith(ENDS)})
    assert distance(logits(model_of(folder)), logits(seed.model)) < 0.05


def test_adapters_on_some_layers_and_of_several_ranks_are_read(changed: Callable[..., Path], tmp_path: Path) -> None:
    missing = [name for name in MODULES if name.endswith(("k_proj", "fc_in", "wte"))]
    some: dict[str, Tensor | None] = {name + end: None for name in missing for end in ENDS}
    a, b = torch.randn(3, 64) * 0.2, torch.randn(300, 3) * 0.2
    folder = changed({**some, "lm_head" + ENDS[0]: a, "lm_head" + ENDS[1]: b})
    actual = split(opened(folder), tmp_path / "out", readme="")
    assert actual.lora.keys() == set(MODULES) - set(missing)
    assert set(actual.full) == {*NORMS, *(name for name in BIASES if "fc_in" not in name)}
    model = model_of(tmp_path / "out" / "base")
    apply_(model, read(tmp_path / "out" / "adapter"))
    assert distance(logits(model), logits(model_of(folder))) <= EXACT


FC_IN = "transformer.h.1.mlp.fc_in"
DAMAGES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no A": ({FC_IN + ENDS[0]: None}, f"lacks {FC_IN}{ENDS[0]}"),
    "no B": ({FC_IN + ENDS[1]: None}, f"lacks {FC_IN}{ENDS[1]}"),
    "another A": ({FC_IN + ENDS[0]: torch.ones(5, 63)}, rf"{FC_IN} .* \(5, 63\) and \(256, 5\)"),
    "another B": ({FC_IN + ENDS[1]: torch.ones(255, 5)}, rf"{FC_IN} .* \(5, 64\) and \(255, 5\)"),
    "another rank": ({FC_IN + ENDS[1]: torch.ones(256, 6)}, rf"{FC_IN} .* \(5, 64\) and \(256, 6\)"),
    "rank 0": ({FC_IN + ENDS[0]: torch.ones(0, 64), FC_IN + ENDS[1]: torch.ones(256, 0)}, r"\(0, 64\) and \(256, 0\)"),
    "a vector": ({"transformer.wte" + ENDS[0]: torch.ones(300)}, r"wte .* \(300,\) and \(64, 5\)"),
    "a number": ({"transformer.wte" + ENDS[1]: torch.ones(())}, r"wte .* and \(\)"),
    "not finite": ({"lm_head" + ENDS[1]: torch.full((300, 5), float("nan"))}, "lm_head.*not finite"),
    "no place": ({"transformer.h.7.attn.q_proj" + ENDS[0]: torch.ones(5, 64)}, r"fits no layer: transformer\.h\.7"),
    "on a norm": ({"transformer.ln_f" + ENDS[0]: torch.ones(5, 64)}, r"fits no layer: transformer\.ln_f"),
    "a norm gone": ({"transformer.ln_f.bias": None}, r"lacks transformer\.ln_f\.bias"),
    "too much": ({FC_IN + ".adapter.0.bias": torch.ones(5)}, r"adapter\.0\.bias too many"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tuned_folder_is_an_error_and_nothing_is_written(
    damage: str, changed: Callable[..., Path], tmp_path: Path
) -> None:
    tensors, message = DAMAGES[damage]
    with pytest.raises(ModelError, match=message):
        split(opened(changed(tensors)), tmp_path / "out", readme="")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


@pytest.fixture(scope="module")
def pieces(seed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The seed's folder, split. Not to be changed."""
    out = tmp_path_factory.mktemp("pieces") / "out"
    split(opened(seed.folder), out, readme="# A model\n")
    return out


def test_the_base_has_every_byte_of_the_frozen_weights_and_loads_by_itself(seed: Any, pieces: Path) -> None:
    table, written = saved(seed.folder), load_file(pieces / "base" / "model.safetensors")
    assert written.keys() == {name for name in table if not name.endswith((*ENDS, ".attn.bias", ".masked_bias"))}
    for name, tensor in written.items():
        assert tensor.dtype == table[name].dtype
        assert torch.equal(tensor, table[name]), name
    base = FolderSource(pieces / "base")
    assert stored_scheme(base).name == "dynamic8"
    assert not has_embedded_adapter(base)
    text = "the king of york"
    assert base.tokenizer()(text)["input_ids"] == FolderSource(seed.folder).tokenizer()(text)["input_ids"]


def test_base_and_adapter_together_give_the_scripts_own_logits(seed: Any, pieces: Path) -> None:
    model = model_of(pieces / "base")
    apply_(model, read(pieces / "adapter"))
    assert distance(logits(model), logits(seed.model)) <= EXACT


def test_the_adapter_gives_the_scripts_own_logits_in_peft(seed: Any, pieces: Path, tmp_path: Path) -> None:
    write_folder(FolderSource(pieces / "base"), tmp_path / "plain", scheme_named("none"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    untuned = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, pieces / "adapter").eval())
    assert distance(theirs, untuned) > 1
    assert distance(theirs, logits(seed.model)) <= EXACT


@pytest.mark.parametrize("reader", ["octavo", "peft"])
def test_the_adapter_fits_the_original_base_whose_norms_and_biases_are_others(
    reader: str, seed: Any, pieces: Path, hivemind: Path, tmp_path: Path
) -> None:
    if reader == "octavo":
        model: Any = model_of(hivemind)
        apply_(model, read(pieces / "adapter"))
    else:
        write_folder(opened(hivemind), tmp_path / "plain", scheme_named("none"))
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, pieces / "adapter").eval()
    assert distance(logits(model), logits(seed.model)) <= EXACT


def test_the_adapters_config_is_plain_lora_on_every_layer(pieces: Path) -> None:
    config = json.loads((pieces / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (5, 5.0, 0.0)
    assert config["target_modules"] == sorted(
        ["wte", "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "lm_head"]
    )
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["base_model_name_or_path"] == str(pieces / "base")
    assert (pieces / "adapter" / "README.md").read_text() == "# A model\n"


def test_the_adapter_has_the_identity_of_its_base(pieces: Path) -> None:
    assert read(pieces / "adapter").origin["base"]["sha256"] == fingerprint(FolderSource(pieces / "base"))


@dataclass(frozen=True)
class NamesOnly:
    """A source with GPT-J-6B's names and shapes, whose tensors are one expanded zero each."""

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    files: tuple[Path, ...] = (Path("nowhere/pytorch_model.bin"),)

    def names(self) -> list[str]:
        return list(self.shapes)

    def tensor(self, name: str) -> Tensor:
        return torch.zeros(()).expand(self.shapes[name])


def test_gpt_j_6b_has_170_adapters_of_340_tensors() -> None:
    width, inner, rows, rank = 4096, 16384, 50400, 16
    linears = {"lm_head": (rows, width)}
    norms = ["transformer.ln_f"]
    for i in range(28):
        block = f"transformer.h.{i}"
        norms.append(f"{block}.ln_1")
        linears |= {f"{block}.attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        linears |= {f"{block}.mlp.fc_in": (inner, width), f"{block}.mlp.fc_out": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    for name, (n, k) in {"transformer.wte": (rows, width), **linears}.items():
        shapes |= {f"{name}.weight": (n, k), f"{name}.absmax": (n * k // 4096,), f"{name}.code": (256,)}
        down = (n, rank) if name.endswith("wte") else (rank, k)
        up = (k, rank) if name.endswith("wte") else (n, rank)
        shapes |= {name + ENDS[0]: down, name + ENDS[1]: up}
        if "fc_" in name or name == "lm_head":
            shapes[f"{name}.bias"] = (n,)
    config = {
        "architectures": ["GPTJForCausalLM"], "vocab_size": rows, "n_embd": width, "n_layer": 28, "n_head": 16,
        "rotary_dim": 64, "n_positions": 2048,
    }  # fmt: skip
    actual = read_embedded_adapter(NamesOnly(shapes, config))  # type: ignore[arg-type]
    halves = [half for a, b, _ in actual.lora.values() for half in (a, b)]
    assert (len(actual.lora), len(halves)) == (170, 340)
    assert sum(half.numel() for half in halves) == 34_774_016
    assert sum(tensor.numel() for tensor in actual.full.values()) == 861_408


def test_a_folder_without_adapters_cannot_be_split(hivemind: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing to convert") as caught:
        split(opened(hivemind), tmp_path / "out", readme="")
    assert "octavo quantize" in caught.value.hint


def test_splitting_refuses_a_folder_with_files_and_accepts_an_empty_one(seed: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (notes := out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds"):
        split(opened(seed.folder), out, readme="")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    notes.unlink()
    split(opened(seed.folder), out, readme="")
    assert {path.name for path in out.iterdir()} == {"base", "adapter"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_split_leaves_no_files(seed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(layer: WrittenLayer) -> None:
        if layer.name == "lm_head.weight":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(opened(seed.folder), tmp_path / "out", readme="", on_layer=interrupt)
    assert list(tmp_path.iterdir()) == []

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft_module, "write", fail)
    with pytest.raises(OSError, match="No space"):
        split(opened(seed.folder), tmp_path / "out", readme="")
    assert list(tmp_path.iterdir()) == []
