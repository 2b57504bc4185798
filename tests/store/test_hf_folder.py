"""`octavo quantize`: a written folder is the model, and it is written completely or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.forks import Forks
from tests.store.watching import WATCHING
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.errors import ModelError, UsageError
from octavo.models import Decoder, build, weight_entries
from octavo.ops.quantize import SCHEMES, dequantize, scheme_named
from octavo.store import hf_folder as folder_module
from octavo.store import sinks
from octavo.store import weights as weights_module
from octavo.store.contents import items_of
from octavo.store.hf_folder import WrittenLayer, weight_names, write_folder, written_bytes
from octavo.store.sources import FolderSource
from octavo.store.weights import load

FAMILIES = ["llama", "llama-tied", "gptj", "gemma2", "gemma3", "neox", "neox-blocks", "gpt2", "gpt_neo"]
IDS = torch.arange(1, 41).view(2, 20)
# Relative error of a layer of normally distributed weights, K = 64: int8 rounds evenly to absmax / 127 (its
# root mean square is absmax / 127 / sqrt(12), and absmax of 64 numbers is about 2.4 deviations), dynamic8
# rounds to 64 values in the upper decade, and 16 quantiles leave about 9 % (QLoRA, arXiv 2305.14314).
ERRORS = {"none": (0.0, 0.0), "int8": (0.004, 0.01), "dynamic8": (0.008, 0.03), "nf4": (0.08, 0.10)}
ERRORS["nf4-double"] = ERRORS["nf4"]
REFUSED = [("neox", "dynamic8"), ("neox", "nf4-double")]  # rows that are reordered share scales


def loaded(folder: Path, scheme: str) -> Decoder:
    return load(FolderSource(folder), scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


def write(source: Path, out: Path, scheme: str) -> list[WrittenLayer]:
    layers: list[WrittenLayer] = []
    write_folder(FolderSource(source), out, scheme_named(scheme), on_layer=layers.append)
    return layers


def assert_same_model(actual: Decoder, expected: Decoder) -> None:
    """Bit for bit: all parts of all matrices, all norms and biases."""
    for a, b in zip(weight_entries(actual).values(), weight_entries(expected).values(), strict=True):
        assert (a.matrix is None) == (b.matrix is None)
        if a.matrix is not None and b.matrix is not None:
            assert a.matrix.parts.keys() == b.matrix.parts.keys()
            assert all(torch.equal(a.matrix.parts[part], b.matrix.parts[part]) for part in b.matrix.parts)
    assert all(torch.equal(a, b) for a, b in zip(actual.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(("family", "scheme"), [case for case in product(FAMILIES, SCHEMES) if case not in REFUSED])
def test_a_written_folder_loads_like_the_original_under_the_scheme(
    family: str, scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    expected = loaded(folders[family], scheme)
    original = Path(shutil.copytree(folders[family], tmp_path / "original"))
    write(original, tmp_path / "out", scheme)
    shutil.rmtree(original)
    assert_same_model(loaded(tmp_path / "out", scheme), expected)


@pytest.mark.parametrize(("family", "scheme"), REFUSED)
def test_rows_that_are_reordered_and_share_scales_are_refused(
    family: str, scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    message = (
        f"query_key_value.weight is reordered at load in runs of 16 x 64 values.* whole blocks of the scheme {scheme}"
    )
    with pytest.raises(ModelError, match=message) as caught:
        write(folders[family], tmp_path / "out", scheme)
    assert "--scheme int8" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "scheme"), REFUSED)
def test_a_folder_whose_reordered_rows_share_scales_does_not_load(
    family: str, scheme: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "check_row_order", lambda *_: None)  # as another program would write it
    write(folders[family], tmp_path / "out", scheme)
    with pytest.raises(ModelError, match=r"query_key_value\.weight is reordered at load"):
        loaded(tmp_path / "out", scheme)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_folder_loads_in_transformers(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write(folders[family], tmp_path / "out", "none")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folders[family])(IDS).logits
        actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    assert torch.equal(actual, expected)
    assert "octavo" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_and_size_of_every_layer_are_reported(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = FolderSource(folders["llama"])
    layers: list[WrittenLayer] = []
    total = write_folder(source, tmp_path / "out", scheme_named(scheme), on_layer=layers.append)
    assert [layer.name for layer in layers] == weight_names(source)
    for layer in layers:
        table = layer.name.split(".")[-2] in ("embed_tokens", "lm_head")  # in 8 bits if all else is in 4
        low, high = ERRORS[scheme_named(scheme).embedding_scheme if table else scheme]
        assert low <= layer.error <= high, layer
        assert layer.shape == tuple(load_file(folders["llama"] / "model.safetensors")[layer.name].shape)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert total == sum(tensor.numel() * tensor.itemsize for tensor in written.values())
    others = [t for name, t in written.items() if name.endswith(("norm.weight", ".bias"))]
    assert sum(layer.stored_bytes for layer in layers) == total - sum(t.numel() * t.itemsize for t in others)


def test_the_reported_error_is_that_of_the_written_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in write(folders["gptj"], tmp_path / "out", "nf4")}
    model = loaded(tmp_path / "out", "nf4")
    for name, weight in load_file(folders["gptj"] / "model.safetensors").items():
        if name in layers:
            entry = weight_entries(model)[name.removesuffix(".weight")]
            assert entry.matrix is not None
            rows, columns = weight.shape
            back = dequantize(entry.matrix.scheme, entry.matrix.of(entry.rows_key), (rows, columns))
            error = float((back - weight).norm() / weight.norm())
            assert layers[name].error == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_quantized_folder_is_converted_to_another_scheme_or_to_none(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    write(folders[family], tmp_path / "dynamic8", "dynamic8")
    write(tmp_path / "dynamic8", tmp_path / "none", "none")
    write(tmp_path / "dynamic8", tmp_path / "int8", "int8")
    write(tmp_path / "none", tmp_path / "again", "int8")
    assert_same_model(loaded(tmp_path / "int8", "int8"), loaded(tmp_path / "again", "int8"))
    # The plain folder has the dequantized values of dynamic8, and transformers computes the same with it.
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "none")(IDS).logits
        ours = loaded(tmp_path / "dynamic8", "dynamic8")(IDS)
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("scheme", ["int8", "dynamic8", "nf4"])
def test_copying_under_the_same_scheme_changes_no_byte(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    write(folders["gptj"], tmp_path / "first", scheme)
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    # Quantized values that do not reach the ends of their range: quantizing them again would give others.
    name = "transformer.h.0.mlp.fc_in.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(first).items()}
    tensors[name] = tensors[name] // 2
    save_file(tensors, first, metadata={"format": "pt"})
    (first.parent / "manifest.json").unlink()  # with the hash of the original file
    layers = write(tmp_path / "first", tmp_path / "second", scheme)
    assert {layer.error for layer in layers} == {0.0}
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("stored", ["none", "dynamic8"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_size_of_the_blocks_changes_no_byte(
    scheme: str, stored: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folders["llama"], tmp_path / "source", stored)
    whole = write(tmp_path / "source", tmp_path / "whole", scheme)
    monkeypatch.setattr(weights_module, "BLOCK_VALUES", 1000)
    blocks = write(tmp_path / "source", tmp_path / "blocks", scheme)
    first, second = (tmp_path / name / "model.safetensors" for name in ("whole", "blocks"))
    assert first.read_bytes() == second.read_bytes()
    assert [layer.error for layer in blocks] == pytest.approx([layer.error for layer in whole], rel=1e-5)


def test_code_tables_that_share_memory_are_written_separately(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in a pickle of a model whose layers all have the same tensor."""
    write(folders["gptj"], tmp_path / "dynamic8", "dynamic8")
    tensors = load_file(tmp_path / "dynamic8" / "model.safetensors")
    code = tensors["lm_head.code"].clone()
    pickled = Path(shutil.copytree(tmp_path / "dynamic8", tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    shared = {name: code if name.endswith(".code") else tensor for name, tensor in tensors.items()}
    torch.save(shared, pickled / "pytorch_model.bin")
    write_folder(FolderSource(pickled, allow_pickle=True), tmp_path / "out", scheme_named("dynamic8"))
    first, second = (tmp_path / name / "model.safetensors" for name in ("dynamic8", "out"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stored", ["none", "nf4"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_written_bytes_predicts_the_size_of_the_tensors(
    scheme: str, stored: str, dtype: torch.dtype, llama_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, llama_folder / "model.safetensors")
    write(llama_folder, tmp_path / "source", stored)
    source = FolderSource(tmp_path / "source")
    predicted = written_bytes(source, scheme_named(scheme))
    assert predicted == write_folder(source, tmp_path / "out", scheme_named(scheme))


@pytest.mark.parametrize("scheme", ["none", "dynamic8"])
def test_shards_are_small_and_load_here_and_in_transformers(
    scheme: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 60_000  # under the embedding's 76,800 bytes in float32: one tensor may be larger than a shard
    monkeypatch.setattr(sinks, "SHARD_BYTES", limit)
    out = tmp_path / "out"
    total = write_folder(FolderSource(folders["llama"]), out, scheme_named(scheme))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    sizes = {}
    for file in files:
        tensors = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        sizes[file] = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        assert sizes[file] <= limit or len(tensors) == 1
    assert index["metadata"]["total_size"] == total == sum(sizes.values())
    assert len(files) <= 2 * total / limit + 2
    assert_same_model(loaded(out, scheme), loaded(folders["llama"], scheme))
    if scheme == "none":
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folders["llama"])(IDS).logits
            assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, expected)


def test_the_tokenizer_is_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    write(folders["llama"], tmp_path / "out", "int8")
    text = "he said: “naïve” 12345\n\t<|endoftext|>x"
    expected = AutoTokenizer.from_pretrained(folders["llama"])
    for actual in (
        FolderSource(tmp_path / "out").tokenizer(),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    ):
        assert actual(text)["input_ids"] == expected(text)["input_ids"]
        assert actual.eos_token_id == expected.eos_token_id


def test_the_manifest_names_every_file_with_its_size_and_hash(folders: dict[str, Path], tmp_path: Path) -> None:
    write(folders["llama"], tmp_path / "out", "int8")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["scheme"] == "int8"
    actual = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (tmp_path / "out").iterdir()
        if path.name != "manifest.json"
    }
    assert manifest["files"] == actual
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= actual.keys()


def test_files_have_the_modes_of_the_umask(folders: dict[str, Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(folders["llama"], tmp_path / "out", "int8")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_a_folder_that_is_not_empty_is_refused_and_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(folders["llama"], out, "int8")  # an empty folder is no loss
    (out / "notes.txt").write_text("mine")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UsageError, match="already holds"):
        write(folders["llama"], out, "nf4")
    assert sorted(path.name for path in out.iterdir()) == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match="already holds"):
        write(folders["llama"], file, "nf4")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_keeps_the_old_folder(
    existing: bool, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "SHARD_BYTES", 20_000)  # some shards are on disk by then
    out = tmp_path / "out"
    if existing:
        write(folders["llama"], out, "int8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(layer: WrittenLayer) -> None:
        if layer.name == "lm_head.weight":
            raise KeyboardInterrupt

    source = FolderSource(folders["llama"])
    with pytest.raises(KeyboardInterrupt):
        write_folder(source, out, scheme_named("nf4"), on_layer=interrupt, replace=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == ([out] if existing else [])
    write_folder(source, out, scheme_named("nf4"), replace=True)
    assert loaded(out, "nf4")


DIE = """
import os, signal, sys
from pathlib import Path
from octavo.ops.quantize import scheme_named
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource

source, out = FolderSource(Path(sys.argv[1])), Path(sys.argv[2])
write_folder(source, out, scheme_named("int8"), on_layer=lambda layer: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_files_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(
    folders: dict[str, Path], tmp_path: Path, forks: Forks
) -> None:
    out = tmp_path / "out"
    killed = forks.run(DIE, folders["llama"], out)
    assert killed.wait() == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-out-")
    (living := tmp_path / ".tmp-out-1").mkdir()
    (other := tmp_path / ".tmp-output-1").mkdir()
    descriptor = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a process does for as long as it lives
        write(folders["llama"], out, "int8")
    finally:
        os.close(descriptor)
    assert set(tmp_path.iterdir()) == {out, living, other}


# 36 million values in float16. In float32, the embedding alone is 67 MB.
WIDE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16384, "hidden_size": 1024,
    "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
MEASURE = (
    WATCHING
    + """
from octavo.ops.quantize import scheme_named
from octavo.store import weights
from octavo.store import hf_folder, sinks
from octavo.store.sources import FolderSource

sinks.SHARD_BYTES = 2**24
source, out = FolderSource(Path(sys.argv[1])), Path(sys.argv[2])
source.tokenizer()  # with all that transformers imports for it
hf_folder.weight_names(source)

def written(block_values):
    weights.BLOCK_VALUES = block_values
    return watched(lambda: hf_folder.write_folder(source, out / str(block_values), scheme_named("int8")))[1]

print(json.dumps([written(weights.BLOCK_VALUES), written(2**40)]))
"""
)


@pytest.mark.exhaustive
def test_writing_takes_the_memory_of_a_shard_and_one_quantized_tensor(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "config.json").write_text(json.dumps(WIDE))
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).half()
    tensors, largest = {}, 0
    for name, item in items_of(build(WIDE)):
        matrix = item.entry.matrix
        shape = (matrix.outputs[item.entry.rows_key], matrix.in_features) if matrix else (WIDE["hidden_size"],)
        count = torch.Size(shape).numel()
        tensors[name] = noise.repeat(-(-count // noise.numel()))[:count].view(shape)
        largest = max(largest, count)
    save_file(tensors, llama_folder / "model.safetensors")
    # The C library returns memory to the system at once, so that the measured memory is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(llama_folder), str(tmp_path / "out")]
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    in_blocks, whole = json.loads(ran.stdout)
    # A byte per value and a float32 per row; 16 MB for the libraries, 24 MB for float32 copies of a block, 4 MiB each.
    assert in_blocks <= 2**24 + 1.01 * largest + 40e6
    assert whole > 2 * 4 * largest, "the measurement itself sees what whole tensors would take"


def test_a_model_without_a_tokenizer_is_refused_before_writing(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        write_folder(
            FolderSource(llama_folder),
            tmp_path / "out",
            scheme_named("int8"),
            on_layer=lambda layer: pytest.fail(f"{layer.name} was written"),
        )
    assert not (tmp_path / "out").exists()
