"""Folders that octavo wrote: every file must have its hash. Manifests of other programs are ignored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.ops.quantize import scheme_named
from octavo.store import files, manifest
from octavo.store.hf_folder import write_folder
from octavo.store.resolve import open_source
from octavo.store.sources import FolderSource, fingerprint


@pytest.fixture
def quantized(folders: dict[str, Path], tmp_path: Path) -> Path:
    write_folder(FolderSource(folders["llama"]), tmp_path / "int8", scheme_named("int8"))
    return tmp_path / "int8"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_folder_as_it_was_written_is_whole(quantized: Path, folders: dict[str, Path]) -> None:
    source = open_source(str(quantized))
    assert fingerprint(source) == fingerprint(FolderSource(folders["llama"]))
    (quantized / "notes.txt").write_text("a file of the user's own")
    assert open_source(str(quantized)).names() == source.names()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_the_error_of_a_damaged_file_names_it_and_a_next_step(damage: str, quantized: Path) -> None:
    names = sorted(path.name for path in quantized.iterdir() if path.name != "manifest.json")
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    for name in names:
        path, whole = quantized / name, (quantized / name).read_bytes()
        if damage == "flipped":
            flip(path)
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(b"" if damage == "empty" else whole[:-1])
        if name not in ("config.json", "model.safetensors"):  # these may be found to be broken before
            with pytest.raises(ModelError, match=f"is damaged: {name}") as caught:
                open_source(str(quantized))
            assert "octavo quantize" in caught.value.hint
        if name != "config.json" and (damage, name) != ("missing", "model.safetensors"):
            with pytest.raises(ModelError, match=name):
                fingerprint(FolderSource(quantized))
        with pytest.raises(ModelError, match=name):
            open_source(str(quantized))
        path.write_bytes(whole)
    open_source(str(quantized))


def test_a_folder_that_was_changed_on_purpose_opens_without_its_manifest(quantized: Path) -> None:
    (quantized / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(ModelError, match=r"generation_config\.json") as caught:
        open_source(str(quantized))
    assert "delete manifest.json" in caught.value.hint
    (quantized / "manifest.json").unlink()
    assert open_source(str(quantized)).generation_config == {"eos_token_id": 3}


FOREIGN: list[Any] = [
    {"name": "an app", "icons": []}, ["a", "list"], {"origin": 1}, {"origin": "x", "files": ["a"]}, "text", None,
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN, ids=str)
def test_a_manifest_of_another_program_is_ignored(content: Any, llama_folder: Path) -> None:
    before = fingerprint(FolderSource(llama_folder))
    (llama_folder / "manifest.json").write_text(json.dumps(content))
    assert manifest.read_manifest(llama_folder) is None
    assert fingerprint(open_source(str(llama_folder))) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 200_000])
def test_a_manifest_that_is_not_json_is_ignored_unless_octavo_wrote_the_folder(
    content: bytes, llama_folder: Path, quantized: Path
) -> None:
    before = fingerprint(FolderSource(llama_folder))
    (llama_folder / "manifest.json").write_bytes(content)
    assert fingerprint(open_source(str(llama_folder))) == before
    (quantized / "manifest.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"is damaged: .*manifest\.json is not valid JSON"):
        open_source(str(quantized))


BROKEN: dict[str, Any] = {
    "no files": {"files": None},
    "no entries": {"files": {}},
    "files in a list": {"files": ["config.json"]},
    "an entry of nothing": {"files": {"config.json": None}},
    "a size of text": {"files": {"config.json": {"size": "big", "sha256": "0"}}},
    "no hash": {"files": {"config.json": {"size": 1}}},
    "a file outside": {"files": {"../config.json": {"size": 1, "sha256": "0"}}},
    "a name with a null": {"files": {"config\0.json": {"size": 1, "sha256": "0"}}},
    "no origin": {"origin": None},
    "a number as origin": {"origin": 1},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_of_octavo_with_invalid_values_is_damaged(case: str, quantized: Path) -> None:
    content = json.loads((quantized / "manifest.json").read_text()) | BROKEN[case]
    (quantized / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"is damaged: manifest\.json is not what octavo writes"):
        open_source(str(quantized))


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_an_error_that_names_both(version: object, quantized: Path) -> None:
    content = json.loads((quantized / "manifest.json").read_text())
    assert content["format"] == 1
    (quantized / "manifest.json").write_text(json.dumps(content | {"format": version}))
    told = "no format version" if version is None else f"the format version {version!r}"
    with pytest.raises(ModelError, match=rf"manifest\.json has {told}; this octavo reads version 1\."):
        open_source(str(quantized))


def test_a_manifest_that_does_not_list_the_weight_file_is_not_its_identity(
    quantized: Path, folders: dict[str, Path]
) -> None:
    other = quantized / "other.safetensors"
    other.write_bytes((folders["gptj"] / "model.safetensors").read_bytes())

    class OtherFile(FolderSource):
        @property
        def files(self) -> list[Path]:
            return [other]

    assert fingerprint(OtherFile(quantized)) != fingerprint(FolderSource(quantized))


def test_a_file_is_hashed_once_in_a_process_and_again_after_a_change(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    whole = files.sha256_of

    def sha256_of(path: Path) -> str:
        hashed.append(path)
        return whole(path)

    monkeypatch.setattr(manifest, "sha256_of", sha256_of)
    for path in quantized.iterdir():
        os.utime(path, ns=(1, 1))  # long ago
    open_source(str(quantized), weights=False)
    assert not hashed
    for _ in range(3):
        fingerprint(open_source(str(quantized)))
    assert len(hashed) == len(set(hashed)) == len(list(quantized.iterdir())) - 1
    flip(quantized / "tokenizer.json")  # possibly within the granularity of a file system's time
    with pytest.raises(ModelError, match=r"tokenizer\.json has changed"):
        open_source(str(quantized))
