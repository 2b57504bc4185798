"""Folders of weights: whole, sharded, incomplete, damaged and hostile; and the identity of a base model."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.errors import ModelError
from octavo.models import build
from octavo.store.sources import FolderSource, fingerprint, load_pickle, read_json
from octavo.store.tokenizer_files import load_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
UNUSUAL_PICKLE = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


def shard(folder: Path, *, suffix: str = "safetensors", single: str = WEIGHTS) -> dict[str, str]:
    """Splits the folder's single file in two with an index; returns the index's table."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    stem = single.partition(".")[0]
    table = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in names}
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
        table.update(dict.fromkeys(names, file))
    write_index(folder, table, f"{stem}.{suffix}.index.json")
    return table


def write_index(folder: Path, table: Any, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def as_pickle(folder: Path, content: Any = None) -> None:
    torch.save(content or load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def all_tensors(source: FolderSource) -> dict[str, Tensor]:
    return {name: source.tensor(name) for name in source.names()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["single", "sharded", "pickle", "sharded pickle", "old pickle"])
def test_every_layout_gives_the_same_tensors(layout: str, llama_folder: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in load_file(llama_folder / WEIGHTS).items()}
    if layout == "sharded":
        shard(llama_folder)
    elif layout == "sharded pickle":
        shard(llama_folder, suffix="bin", single=PICKLE)
    elif layout == "pickle":
        as_pickle(llama_folder)
    elif layout == "old pickle":  # before torch 1.6
        torch.save(expected, llama_folder / PICKLE, _use_new_zipfile_serialization=False)
        (llama_folder / WEIGHTS).unlink()
    source = FolderSource(llama_folder, allow_pickle="pickle" in layout)
    assert_same(all_tensors(source), expected)
    assert len(source.files) == (2 if "sharded" in layout else 1)


@pytest.mark.parametrize("other", [PICKLE, "pytorch_model.bin.index.json", "consolidated.safetensors"])
def test_other_files_next_to_a_safetensors_file_are_not_read(other: str, llama_folder: Path) -> None:
    (llama_folder / other).write_bytes(b"not even a file of its kind")
    for allowed in (False, True):
        source = FolderSource(llama_folder, allow_pickle=allowed)
        assert source.files == [llama_folder / WEIGHTS]
        assert source.names()


def test_other_files_next_to_a_single_pickle_are_not_read(llama_folder: Path) -> None:
    as_pickle(llama_folder)
    torch.save({"learning_rate": 1e-4}, llama_folder / "training_args.bin")
    assert FolderSource(llama_folder, allow_pickle=True).files == [llama_folder / PICKLE]


def test_the_error_of_missing_shards_has_their_number_and_names(llama_folder: Path) -> None:
    file = shard(llama_folder)["model.norm.weight"]
    (llama_folder / file).unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of the 2 files that {INDEX} names: {file}"):
        FolderSource(llama_folder).names()


def test_shapes_are_read_from_the_header(llama_folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(llama_folder / WEIGHTS).items()}
    shard(llama_folder)
    source = FolderSource(llama_folder)
    assert {name: source.shape(name) for name in source.names()} == expected


@pytest.mark.parametrize("file", [WEIGHTS, PICKLE])
def test_a_git_lfs_pointer_is_an_error(file: str, llama_folder: Path) -> None:
    (llama_folder / WEIGHTS).unlink()
    (llama_folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 4096\n")
    with pytest.raises(ModelError, match=r"Git LFS pointer(.|\n)*git lfs pull"):
        FolderSource(llama_folder, allow_pickle=True).names()


def test_a_pipe_called_like_weights_is_not_opened(llama_folder: Path) -> None:
    (llama_folder / WEIGHTS).unlink()
    os.mkfifo(llama_folder / WEIGHTS)
    with pytest.raises(ModelError, match="holds no weights"):
        FolderSource(llama_folder).names()


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd.safetensors", "..", "", "sub/x.safetensors", 7]
)
def test_an_index_names_only_files_of_its_folder(file: object, llama_folder: Path) -> None:
    shutil.copy(llama_folder / WEIGHTS, llama_folder.parent / "outside.safetensors")
    (llama_folder / "sub").mkdir()
    shutil.copy(llama_folder / WEIGHTS, llama_folder / "sub" / "x.safetensors")
    table = shard(llama_folder)
    write_index(llama_folder, {**table, "model.norm.weight": file})
    for allowed in (False, True):
        with pytest.raises(ModelError):
            FolderSource(llama_folder, allow_pickle=allowed).names()


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[1]", "{broken"])
def test_a_broken_index_is_an_error(content: str, llama_folder: Path) -> None:
    (llama_folder / INDEX).write_text(content)
    with pytest.raises(ModelError, match=INDEX):
        FolderSource(llama_folder).names()


def test_a_tensor_missing_from_its_indexed_file_is_an_error(llama_folder: Path) -> None:
    for suffix, single in (("safetensors", WEIGHTS), ("bin", PICKLE)):
        folder = Path(shutil.copytree(llama_folder, llama_folder.parent / suffix))
        table = shard(folder, suffix=suffix, single=single)
        other = next(file for file in table.values() if file != table["model.norm.weight"])
        write_index(folder, {**table, "model.norm.weight": other}, f"{single}.index.json")
        with pytest.raises(ModelError, match=r"model\.norm\.weight"):
            FolderSource(folder, allow_pickle=True).tensor("model.norm.weight")


@settings(max_examples=30, deadline=None)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_safetensors_file_cut_anywhere_is_refused(
    part: float, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = (folders["llama"] / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ModelError, match=WEIGHTS):
        FolderSource(folder).names()


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        FolderSource(tmp_path).names()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_error_of_a_pickle_names_the_flag(sharded: bool, llama_folder: Path) -> None:
    if sharded:
        table = shard(llama_folder, suffix="bin", single=PICKLE)
        (llama_folder / table["model.norm.weight"]).unlink()  # as after a download without pickles
    else:
        as_pickle(llama_folder)
    with pytest.raises(ModelError, match="--allow-pickle"):
        FolderSource(llama_folder).names()


@pytest.mark.parametrize("file", ["weights.bin", "weights.pt"])
def test_a_pickle_in_a_safetensors_index_needs_the_flag_too(file: str, llama_folder: Path) -> None:
    torch.save(load_file(llama_folder / WEIGHTS), llama_folder / file)
    write_index(llama_folder, {"model.norm.weight": file})
    with pytest.raises(ModelError, match="--allow-pickle"):
        FolderSource(llama_folder).tensor("model.norm.weight")


class Program:
    """What a hostile pickle holds: a call."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@UNUSUAL_PICKLE
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_a_program_in_a_pickle_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    file, mark = tmp_path / PICKLE, tmp_path / "ran"
    content = {"model.norm.weight": torch.ones(3), "x": Program(mark)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ModelError, match=PICKLE):
        load_pickle(file)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {"model": {"a": torch.ones(2)}}])
def test_a_pickle_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / PICKLE)
    with pytest.raises(ModelError, match="dict of tensors"):
        load_pickle(tmp_path / PICKLE)


@UNUSUAL_PICKLE
@settings(max_examples=150, deadline=None)
@given(data=st.data(), old=st.booleans())
def test_a_damaged_pickle_is_a_model_error_or_a_dict_of_tensors(
    data: st.DataObject, old: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.bin"
    torch.save({"a": torch.ones(3), "b": torch.zeros(2, 2)}, file, _use_new_zipfile_serialization=not old)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = load_pickle(file)
    except ModelError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())


@pytest.mark.parametrize(("content", "message"), [("{broken", "not valid JSON"), ("[]", "JSON object"), (None, "read")])
def test_a_broken_config_is_an_error(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        _ = FolderSource(tmp_path).config
    assert "config.json" in caught.value.message


def test_a_config_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ModelError, match="not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["OPTForCausalLM"]},
        {"architectures": None, "model_type": "opt"},
        {"model_type": "opt"},
        {"architectures": [], "model_type": None},
    ],
)
def test_the_error_of_an_unknown_architecture_says_how_to_list_the_known_ones(
    change: dict[str, Any], folders: dict[str, Path]
) -> None:
    config = {**FolderSource(folders["llama"]).config, **change}
    with pytest.raises(ModelError, match=r"OPTForCausalLM|opt|neither") as caught:
        build(config)
    assert "octavo models" in caught.value.hint


def test_the_error_of_a_config_without_a_size_names_the_key(folders: dict[str, Path]) -> None:
    config = {key: value for key, value in FolderSource(folders["llama"]).config.items() if key != "hidden_size"}
    with pytest.raises(ModelError, match="hidden_size"):
        build(config)


@pytest.mark.parametrize("damage", ["missing", "broken", "empty", "no EOS token"])
def test_a_tokenizer_that_cannot_be_used_is_a_model_error(damage: str, llama_folder: Path) -> None:
    if damage == "no EOS token":
        settings = json.loads((llama_folder / "tokenizer_config.json").read_text())
        del settings["eos_token"]
        (llama_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    elif damage == "missing":
        (llama_folder / "tokenizer.json").unlink()
    else:
        (llama_folder / "tokenizer.json").write_text("{broken" if damage == "broken" else "{}")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(llama_folder)


def test_tokenizer_code_in_the_folder_is_not_run(llama_folder: Path) -> None:
    mark = llama_folder / "ran"
    (llama_folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: ...\n")
    settings = json.loads((llama_folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "code.T"]}, "tokenizer_class": "T"}
    (llama_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with suppress(ModelError):
        load_tokenizer(llama_folder)
    assert not mark.exists()


def test_a_copy_of_a_folder_has_the_same_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folders["llama"], tmp_path / "another name"))
    assert fingerprint(FolderSource(copy)) == fingerprint(FolderSource(folders["llama"]))


@pytest.mark.parametrize("manifest", [None, {"files": ["of another program"]}, {"name": "an app"}])
def test_a_changed_byte_changes_the_fingerprint(manifest: object, llama_folder: Path) -> None:
    if manifest:
        (llama_folder / "manifest.json").write_text(json.dumps(manifest))
    before = fingerprint(FolderSource(llama_folder))
    content = bytearray((llama_folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (llama_folder / WEIGHTS).write_bytes(content)
    assert fingerprint(FolderSource(llama_folder)) != before


def test_every_shard_counts_in_the_fingerprint(llama_folder: Path) -> None:
    actual = set()
    for file in ["", *sorted(set(shard(llama_folder).values()))]:
        if file:
            content = bytearray((llama_folder / file).read_bytes())
            content[-1] ^= 1
            (llama_folder / file).write_bytes(content)
        actual.add(fingerprint(FolderSource(llama_folder)))
    assert len(actual) == 3
