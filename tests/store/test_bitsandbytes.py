"""NF4 checkpoints of transformers and bitsandbytes: their parts come out bit for bit, under octavo's names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file, save_file
from tests.store.conftest import CONFIGS, LLAMA, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from octavo.errors import ModelError
from octavo.models import Decoder, weight_entries
from octavo.ops.quantize import dequantize, scheme_named
from octavo.store.bitsandbytes import STATE, with_scheme
from octavo.store.contents import stored_scheme
from octavo.store.hf_folder import write_folder, written_bytes
from octavo.store.resolve import open_source
from octavo.store.sources import FolderSource
from octavo.store.weights import load

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj"
SCHEMES = {True: "nf4-double", False: "nf4"}
every_scheme = pytest.mark.parametrize("double", SCHEMES, ids=SCHEMES.values())
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Checkpoints as transformers writes them, with double quantization and without; one linear is left in 32 bits.

    K is a multiple of 64: of a matrix with 96 columns bitsandbytes (0.50.2, AVX-512) dequantizes other values.
    """
    made, config = {}, LlamaConfig(**LLAMA | {"intermediate_size": 128}, tie_word_embeddings=False)
    plain = write_model(tmp_path_factory.mktemp("plain") / "llama", config)
    for double in SCHEMES:
        settings: Any = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
            llm_int8_skip_modules=["lm_head", "layers.0.mlp.down_proj"],
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, quantization_config=settings, device_map="cpu"
        )
        made[double] = tmp_path_factory.mktemp("quantized") / SCHEMES[double]
        model.save_pretrained(made[double])
        for file in plain.glob("*token*"):
            shutil.copy(file, made[double])
    return made


def loaded(folder: Path, scheme: str) -> Decoder:
    return load(open_source(str(folder)), scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


def states_of(folder: Path) -> dict[str, tuple[Tensor, QuantState]]:
    """(codes, state) of each quantized linear, as bitsandbytes reads them."""
    tensors = load_file(folder / WEIGHTS)
    modules = [name.removesuffix(STATE) for name in tensors if name.endswith(STATE)]
    return {
        module: (
            tensors[f"{module}.weight"],
            QuantState.from_dict(
                {key: tensor for key, tensor in tensors.items() if key.startswith(f"{module}.weight.")},
                device=torch.device("cpu"),
            ),
        )
        for module in modules
    }


@every_scheme
def test_the_parts_of_bitsandbytes_are_kept_bit_for_bit(double: bool, quantized: dict[bool, Path]) -> None:
    folder, entries = quantized[double], weight_entries(loaded(quantized[double], SCHEMES[double]))
    states = states_of(folder)
    assert len(states) == 2 * 7 - 1
    for module, (codes, state) in states.items():
        matrix = entries[module].matrix
        assert matrix is not None
        parts = matrix.of(entries[module].rows_key)
        assert torch.equal(parts["weight"], codes.view(-1))
        assert torch.equal(parts["absmax"], state.absmax)
        if double:
            assert torch.equal(parts["nested_absmax"], state.state2.absmax)
            assert torch.equal(parts["code"], state.state2.code)
            assert (parts["nested_offset"] == state.offset).all()
        restored = dequantize(matrix.scheme, parts, tuple(state.shape))
        assert torch.equal(restored, dequantize_4bit(codes, state))


@every_scheme
@pytest.mark.parametrize("scheme", ["none", "int8", "nf4", "nf4-double"])
def test_it_loads_under_every_scheme(double: bool, scheme: str, quantized: dict[bool, Path]) -> None:
    """What bitsandbytes left in 32 bits is quantized from that; the rest from its dequantized values."""
    tensors, states = load_file(quantized[double] / WEIGHTS), states_of(quantized[double])
    for name, entry in weight_entries(loaded(quantized[double], scheme)).items():
        if entry.matrix is None or (name in states and scheme == SCHEMES[double]):
            continue
        weight = dequantize_4bit(*states[name]) if name in states else tensors[f"{name}.weight"]
        parts = entry.matrix.of(entry.rows_key)
        expected = entry.matrix.scheme.quantize(weight)
        assert all(torch.equal(parts[part], expected[part]) for part in expected), name


@every_scheme
def test_linears_that_a_plain_checkpoint_has_transposed_are_not_when_quantized(double: bool, tmp_path: Path) -> None:
    """transformers quantizes the (N, K) of GPT-2's Conv1D, and leaves the (K, N) of those that it skips."""
    plain, skipped = write_model(tmp_path / "plain", CONFIGS["gpt2"]), "transformer.h.0.mlp.c_fc"
    settings: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["lm_head", skipped],
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    ).save_pretrained(tmp_path / "quantized")
    states, entries = states_of(tmp_path / "quantized"), weight_entries(loaded(tmp_path / "quantized", "none"))
    assert len(states) == 2 * 4 - 1
    weights = {name: dequantize_4bit(*state) for name, state in states.items()}
    weights[skipped] = load_file(plain / WEIGHTS)[f"{skipped}.weight"].t()
    for name, weight in weights.items():
        matrix = entries[name].matrix
        assert matrix is not None
        assert torch.equal(matrix.parts["weight"], weight)
    if not double:  # octavo quantizes to the same bits
        ours, theirs = (loaded(folder, "nf4").matrices for folder in (plain, tmp_path / "quantized"))
        for mine, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(mine.parts[part], other.parts[part]) for part in mine.parts)


@every_scheme
def test_a_folder_written_from_it_has_the_same_parts(double: bool, quantized: dict[bool, Path], tmp_path: Path) -> None:
    source, scheme = open_source(str(quantized[double])), scheme_named(SCHEMES[double])
    assert stored_scheme(source) is scheme
    errors: dict[str, float] = {}
    total = write_folder(
        source, tmp_path / "out", scheme, on_layer=lambda layer: errors.update({layer.name: layer.error})
    )
    assert total == written_bytes(source, scheme)
    assert {name for name, error in errors.items() if error} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.weight",
    }  # fmt: skip
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ours, theirs = (weight_entries(loaded(folder, scheme.name)) for folder in (tmp_path / "out", quantized[double]))
    for name, entry in theirs.items():
        if entry.matrix is not None:
            written = ours[name].matrix
            assert written is not None
            assert all(torch.equal(written.parts[part], tensor) for part, tensor in entry.matrix.parts.items())


def test_the_scheme_of_a_config_without_weights_is_that_of_its_settings() -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for double, scheme in SCHEMES.items():
        config = with_scheme({"a": 1, "quantization_config": settings | {"bnb_4bit_use_double_quant": double}})
        assert config == {"a": 1, "octavo": {"format": 1, "scheme": scheme, "unquantized": []}}
    assert with_scheme({"a": 1}) == {"a": 1}


def changed(folder: Path, out: Path, change: Change) -> Path:
    shutil.copytree(folder, out)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    return out


def state_with(**changes: Any) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[UP + STATE].tolist())) | changes
        tensors[UP + STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def put(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


BROKEN: list[tuple[Change, str]] = [
    (state_with(blocksize=128), "blocksize 128; octavo reads 64"),
    (state_with(nested_blocksize=512), "nested_blocksize 512; octavo reads 256"),
    (state_with(shape=[96]), "shape is a list of 1"),
    (state_with(shape=[97, 64]), r"weight has the shape \(3104,\)"),
    (state_with(nested_offset="x"), "nested_offset is 'x'"),
    (put(UP + STATE, torch.zeros(3, dtype=torch.uint8)), "up_proj.*nf4 in .*broken: Expecting value"),
    (put(UP + STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)), "it is a list of 1"),
    (put(f"{UP}.weight.quant_map", torch.linspace(-1, 1, 16)), "not the table of NF4"),
    (put(f"{UP}.weight.absmax", torch.zeros(5, dtype=torch.uint8)), r"up_proj.absmax has the shape \(5,\)"),
    (
        lambda tensors: tensors.__delitem__(f"{UP}.weight.nested_absmax"),
        "lacks model.layers.1.mlp.up_proj.nested_absmax",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_checkpoint_of_another_layout_is_an_error_that_names_the_module(
    change: Change, message: str, quantized: dict[bool, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        loaded(changed(quantized[True], tmp_path / "broken", change), "nf4-double")
    assert "up_proj" in caught.value.message


def test_weights_in_another_storage_type_are_the_same_bytes(quantized: dict[bool, Path], tmp_path: Path) -> None:
    """bnb_4bit_quant_storage=bfloat16, for FSDP."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].view(-1, 2).view(torch.bfloat16)

    matrices = []
    for folder in (quantized[True], changed(quantized[True], tmp_path / "bf16", change)):
        matrices.append(weight_entries(loaded(folder, "nf4-double"))[UP].matrix)
    assert matrices[0] is not None
    assert matrices[1] is not None
    assert torch.equal(matrices[0].parts["weight"], matrices[1].parts["weight"])


def test_a_source_lists_octavos_names(quantized: dict[bool, Path]) -> None:
    source, plain = open_source(str(quantized[True])), FolderSource(quantized[True])
    names = set(source.names())
    assert not any(".weight." in name for name in names)
    assert {f"{UP}.{part}" for part in ("weight", "absmax", "nested_absmax", "nested_offset", "code")} <= names
    assert all(tuple(source.tensor(name).shape) == source.shape(name) for name in names)
    assert source.files == plain.files
    assert source.tokenizer().get_vocab() == plain.tokenizer().get_vocab()
