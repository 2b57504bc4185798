"""Loading: every value in its parameter under every scheme, errors for damage, and the memory that it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.forks import Forks
from tests.store.conftest import NEOX, write_model
from tests.store.watching import WATCHING
from torch import Tensor
from transformers import GPTNeoXConfig

from octavo.errors import ModelError
from octavo.models import Decoder, build, weight_entries
from octavo.ops.quantize import SCHEMES, dequantize, scheme_named
from octavo.ops.scheme import parts_of_rows
from octavo.store import weights as weights_module
from octavo.store.contents import entries, items_of, stored_scheme
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource
from octavo.store.weights import full_rows, load, requantized, row_blocks

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama-tied", "gptj"]
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def loaded(folder: Path, scheme: str = "none", dtype: torch.dtype = torch.float32) -> Decoder:
    return load(FolderSource(folder), scheme_named(scheme), dtype=dtype, device=CPU)


def change(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """Replaces or adds tensors of the folder's file, or (None) leaves them out."""
    table = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    table |= {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file({n: t for n, t in table.items() if tensors.get(n, t) is not None}, folder / WEIGHTS)


@pytest.mark.parametrize("numbers", [weights_module.BLOCK_VALUES, 1000])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_loaded_into_its_parameter(
    family: str, scheme: str, numbers: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "BLOCK_VALUES", numbers)
    stored = load_file(folders[family] / WEIGHTS)
    model = loaded(folders[family], scheme)
    seen = set()
    for entry in weight_entries(model).values():
        for kind in ("weight", "bias"):
            name = f"{entry.name}.{kind}"
            if name not in stored:
                continue
            seen.add(name)
            if entry.matrix is not None and kind == "weight":
                table = entry.key in ("embed_tokens", "wte", "lm_head")  # in 8 bits where all else is in 4
                under = scheme_named(scheme)
                expected = (scheme_named(under.embedding_scheme) if table else under).quantize(stored[name])
                parts = entry.matrix.of(entry.rows_key)
                assert parts.keys() == expected.keys()
                assert all(torch.equal(parts[part], expected[part]) for part in expected), name
            else:
                parameter = entry.parameter(kind)
                assert parameter is not None
                assert torch.equal(parameter, stored[name]), name
    assert seen == stored.keys()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# K = 96 fills a block of dynamic8 with 128 rows, K = 3 with 4096; 7 rows of 3 leave half a byte of nf4.
@pytest.mark.parametrize("shape", [(300, 64), (130, 96), (7, 3), (4100, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_row_blocks_concatenate_to_those_of_the_matrix(
    scheme: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "BLOCK_VALUES", 1)  # as few rows as the scheme allows
    under, weight = scheme_named(scheme), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = under.quantize(weight)
    parts = {part: torch.zeros_like(tensor) for part, tensor in whole.items()}
    blocks = list(row_blocks(shape, under))
    for rows in blocks:
        for part, block in parts_of_rows(parts, shape, rows, under).items():
            block.copy_(parts_of_rows(whole, shape, rows, under)[part])
        if under.first_pass is under:
            made = under.quantize(weight[rows])
            assert all(
                torch.equal(block, made[part]) for part, block in parts_of_rows(parts, shape, rows, under).items()
            )
        assert torch.equal(full_rows(whole, shape, rows, under), dequantize(under, whole, shape)[rows])
    assert [row for rows in blocks for row in range(shape[0])[rows]] == list(range(shape[0]))
    assert all(torch.equal(parts[part], whole[part]) for part in whole)
    if scheme == "int8":
        assert len(blocks) == shape[0]
    made = requantized({"weight": weight}, shape, scheme_named("none"), under, CPU)
    assert all(torch.equal(made[part], whole[part]) for part in whole)


QKV = "gpt_neox.layers.1.attention.query_key_value"


def test_scales_of_the_whole_matrix_are_those_of_the_checkpoints_order_of_rows(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A mean depends on the order of its terms, and a folder is written in the checkpoint's order."""
    folder, double = Path(shutil.copytree(folders["neox-blocks"], tmp_path / "copy")), scheme_named("nf4-double")
    order = weight_entries(build(FolderSource(folder).config))[QKV].order
    assert order is not None
    for seed in range(200):  # about every third weight has another mean in the other order
        weight = torch.randn(768, 256, generator=torch.Generator().manual_seed(seed))
        written, reordered = (double.quantize(w)["nested_offset"] for w in (weight, order.from_checkpoint(weight)))
        if not torch.equal(written, reordered):
            break
    change(folder, {f"{QKV}.weight": weight})
    matrix = weight_entries(loaded(folder, "nf4-double"))[QKV].matrix
    assert matrix is not None
    assert torch.equal(matrix.parts["nested_offset"], written)
    assert not torch.equal(matrix.parts["nested_offset"], reordered)


def test_rows_that_are_reordered_within_blocks_are_quantized_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with their scales could not be read, so none is written; the scales are those of the decoder's order."""
    monkeypatch.setattr(weights_module, "BLOCK_VALUES", 1)
    folder = write_model(tmp_path / "neox", GPTNeoXConfig(**NEOX | {"hidden_size": 128}))
    entry = weight_entries(loaded(folder, "nf4-double"))[QKV]
    assert entry.matrix is not None
    assert entry.order is not None
    expected = scheme_named("nf4-double").quantize(
        entry.order.from_checkpoint(load_file(folder / WEIGHTS)[f"{QKV}.weight"])
    )
    assert len(expected["nested_offset"]) == 3
    assert all(torch.equal(entry.matrix.parts[part], expected[part]) for part in expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_16_bits_loads(
    family: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders[family], tmp_path / "half"))
    change(folder, {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()})
    name = next(name for name in load_file(folder / WEIGHTS) if "q_proj.weight" in name)
    stored = load_file(folder / WEIGHTS)[name]
    for scheme in SCHEMES:
        entry = weight_entries(loaded(folder, scheme))[name.removesuffix(".weight")]
        assert entry.matrix is not None
        expected = scheme_named(scheme).quantize(stored.float())
        parts = entry.matrix.of(entry.rows_key)
        assert all(torch.equal(parts[part], expected[part]) for part in expected)


def test_only_unquantized_weights_have_the_compute_type(folders: dict[str, Path]) -> None:
    for scheme, kinds in (("none", {torch.bfloat16}), ("int8", {torch.int8, torch.float32})):
        model = loaded(folders["llama"], scheme, torch.bfloat16)
        actual = {t.dtype for p in weight_entries(model).values() if p.matrix for t in p.matrix.parts.values()}
        assert actual == kinds
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}  # norms and biases


def test_progress_counts_every_tensor_once(folders: dict[str, Path]) -> None:
    heard: list[tuple[int, int]] = []
    source = FolderSource(folders["gptj"])
    load(
        source,
        scheme_named("int8"),
        dtype=torch.float32,
        device=CPU,
        progress=lambda a, b: heard.append((a, b)),
    )
    total = len(source.names())
    assert heard == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_items_of_a_model_are_the_entries_of_its_checkpoint(family: str, folders: dict[str, Path]) -> None:
    source = FolderSource(folders[family])
    model = build(source.config)
    assert [name for name, _ in items_of(model)] == list(entries(source, model))


def test_the_error_names_missing_and_unknown_tensors(llama_folder: Path) -> None:
    change(llama_folder, {UP: None, "model.layers.7.mlp.up_proj.weight": torch.ones(1), "surprise": torch.ones(1)})
    with pytest.raises(ModelError) as caught:
        loaded(llama_folder)
    assert f"lacks {UP} and has " in caught.value.message
    assert "model.layers.7.mlp.up_proj.weight" in caught.value.message
    assert "surprise" in caught.value.message


def test_a_bias_that_is_not_in_the_config_is_an_unknown_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama-tied"], tmp_path / "biased"))
    name = "model.layers.0.self_attn.q_proj.bias"
    change(folder, {name: torch.zeros(64)})
    with pytest.raises(ModelError, match=name):
        loaded(folder)


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.layers.0.self_attn.k_proj.bias", "lm_head.weight"])
def test_the_error_of_a_misshapen_tensor_has_both_shapes(name: str, llama_folder: Path) -> None:
    right = load_file(llama_folder / WEIGHTS)[name]
    wrong = torch.zeros(right.shape[0] + 1, *right.shape[1:])
    change(llama_folder, {name: wrong})
    with pytest.raises(ModelError, match=name) as caught:
        loaded(llama_folder, "int8")
    assert str(tuple(right.shape)) in caught.value.message
    assert str(tuple(wrong.shape)) in caught.value.message


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.layers.0.self_attn.k_proj.bias"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_error_of_a_value_that_is_not_finite_names_the_tensor(
    name: str, bad: float, scheme: str, llama_folder: Path
) -> None:
    tensor = load_file(llama_folder / WEIGHTS)[name].clone()
    tensor.view(-1)[17] = bad
    change(llama_folder, {name: tensor})
    with pytest.raises(ModelError, match=name):
        loaded(llama_folder, scheme)


@pytest.mark.parametrize("scheme", ["int8", "dynamic8", "nf4"])
def test_the_error_of_a_scale_that_is_not_finite_names_the_tensor(
    scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_folder(FolderSource(folders["llama"]), tmp_path / "q", scheme_named(scheme))
    name = UP.replace("weight", "absmax")
    scales = load_file(tmp_path / "q" / WEIGHTS)[name].clone()
    scales[-1] = float("nan")
    change(tmp_path / "q", {name: scales})
    with pytest.raises(ModelError, match=name):
        loaded(tmp_path / "q", scheme)


def test_a_weight_too_large_for_the_compute_type_is_an_error(llama_folder: Path) -> None:
    tensor = load_file(llama_folder / WEIGHTS)[UP].clone()
    tensor[0, 0] = 1e6
    change(llama_folder, {UP: tensor})
    assert loaded(llama_folder, dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=f"{UP} as torch.float16"):
        loaded(llama_folder, dtype=torch.float16)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantized_values_are_not_read_as_plain_weights(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write_folder(FolderSource(folders["llama"]), tmp_path / "q", scheme_named(scheme))
    shutil.copy(folders["llama"] / "config.json", tmp_path / "q")  # which names no scheme
    with pytest.raises(ModelError, match=r"scheme none|shape"):
        loaded(tmp_path / "q", "none")


@pytest.mark.parametrize("part", ["absmax", "code"])
def test_the_error_of_a_missing_part_names_it(part: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write_folder(FolderSource(folders["llama"]), tmp_path / "q", scheme_named("dynamic8"))
    change(tmp_path / "q", {UP.replace("weight", part): None})
    with pytest.raises(ModelError, match=UP.replace("weight", part)):
        loaded(tmp_path / "q", "dynamic8")


def test_two_code_tables_in_one_matrix_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    write_folder(FolderSource(folders["llama"]), tmp_path / "q", scheme_named("dynamic8"))
    name = UP.replace("weight", "code")
    change(tmp_path / "q", {name: load_file(tmp_path / "q" / WEIGHTS)[name] * 0.5})
    assert loaded(tmp_path / "q", "int8")  # each matrix has its own code table
    with pytest.raises(ModelError, match=UP):
        loaded(tmp_path / "q", "dynamic8")


def test_quantized_values_without_octavos_config_are_read_as_the_hivemind_format(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    write_folder(FolderSource(folders["gptj"]), tmp_path / "q", scheme_named("dynamic8"))
    shutil.copy(folders["gptj"] / "config.json", tmp_path / "q")
    assert stored_scheme(FolderSource(tmp_path / "q")).name == "dynamic8"
    actual = weight_entries(loaded(tmp_path / "q", "dynamic8"))["transformer.h.1.mlp.fc_in"]
    assert actual.matrix is not None
    original = load_file(folders["gptj"] / WEIGHTS)["transformer.h.1.mlp.fc_in.weight"]
    back = dequantize(scheme_named("dynamic8"), actual.matrix.of("fc_in"), (256, 64))
    assert torch.linalg.vector_norm(back - original) < 0.03 * torch.linalg.vector_norm(original)


def test_an_unknown_scheme_in_the_config_lists_the_known_ones(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text()) | {"octavo": {"format": 1, "scheme": "int3"}}
    (llama_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="int3") as caught:
        loaded(llama_folder)
    assert "nf4" in caught.value.hint


@pytest.mark.parametrize("scheme", ["int8", "nf4", "dynamic8"])
def test_another_format_version_of_the_weights_is_an_error_that_names_both(
    scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_folder(FolderSource(folders["llama"]), tmp_path / "q", scheme_named(scheme))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["octavo"]["format"] == 1
    for version, told in ((2, "the format version 2"), (None, "no format version")):
        config["octavo"]["format"] = version
        (tmp_path / "q" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=f"q has {told}; this octavo reads version 1"):
            loaded(tmp_path / "q")


def test_buffers_of_old_checkpoints_and_a_tied_heads_copy_are_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    extras = {
        "gptj": {
            "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
            "transformer.h.0.attn.masked_bias": torch.ones(()),
        },
        "llama-tied": {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "lm_head.weight": load_file(folders["llama-tied"] / WEIGHTS)["model.embed_tokens.weight"].clone(),
        },
    }
    for family, tensors in extras.items():
        folder = Path(shutil.copytree(folders[family], tmp_path / family))
        change(folder, {**tensors})
        ids = torch.arange(10)[None]
        assert torch.equal(loaded(folder)(ids), loaded(folders[family])(ids))


# Llama's shapes, 78 million weights: 0.3 GB in float32; the largest tensor is 32000 x 1024.
LARGE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
WRITE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from octavo.models import build
from octavo.store.contents import items_of

folder, config = Path(sys.argv[1]), json.loads(sys.argv[2])
(folder / "config.json").write_text(json.dumps(config))
noise = torch.randn(2048 * 1024)
table = {}
for i, (name, item) in enumerate(items_of(build(config))):
    if item.is_matrix:
        matrix = item.entry.matrix
        rows = matrix.outputs[item.entry.rows_key]
        shape = (rows, matrix.in_features)
    else:
        shape = tuple(item.entry.parameter(item.kind).shape)
    count = torch.Size(shape).numel()
    tensor = noise.repeat(-(-count // noise.numel()))[:count].view(shape)
    table[name] = f"model-{i}.safetensors"
    save_file({name: tensor}, folder / table[name])
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
"""
MEASURE = (
    WATCHING
    + """
import torch
from octavo.models import build, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.store import weights
from octavo.store.sources import FolderSource

source = FolderSource(Path(sys.argv[1]))
build(source.config).to_empty(device="cpu")  # torch loads 35 MB of code at the first such call

def loaded(block_values):
    weights.BLOCK_VALUES = block_values
    start, where = anonymous(), {"dtype": torch.float32, "device": torch.device("cpu")}
    model, peak = watched(lambda: weights.load(source, scheme_named("int8"), **where))
    matrices = {id(p.matrix): p.matrix for p in weight_entries(model).values() if p.matrix is not None}.values()
    return {
        "peak": peak,
        "kept": anonymous() - start,
        "stored": sum(m.stored_bytes for m in matrices),
        "float32": sum(4 * rows * m.in_features for m in matrices for rows in m.outputs.values()),
        "largest": max(4 * rows * m.in_features for m in matrices for rows in m.outputs.values()),
    }

print(json.dumps([loaded(weights.BLOCK_VALUES), loaded(2**40)]))
"""
)


@pytest.mark.exhaustive
def test_loading_takes_little_more_memory_than_the_quantized_model(tmp_path: Path, forks: Forks) -> None:
    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
        # The C library returns memory to the system at once, so that the measured memory is in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    try:
        written = forks.run(WRITE, tmp_path, json.dumps(LARGE))
        assert written.communicate() == ("", "")
        assert written.wait() == 0
        actual, whole = json.loads(run(MEASURE, str(tmp_path)))
    finally:
        shutil.rmtree(tmp_path)
    assert actual["float32"] > 3e8
    # 16 MB for the libraries, and as much again for float32 copies of a block, 4 MiB each. The
    # pages of the file are not counted.
    assert actual["kept"] <= actual["stored"] + 16e6
    assert actual["peak"] <= actual["stored"] + 32e6
    # The measurement itself: a peak that misses the temporaries would be no evidence.
    assert whole["peak"] >= whole["stored"] + 0.5 * whole["largest"]
