"""Warnings about the base that an adapter names: none if it is this model, and no false ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from octavo.layers.lora import LoraSpec
from octavo.ops.quantize import scheme_named
from octavo.store.base_names import base_warning
from octavo.store.hf_folder import write_folder
from octavo.store.peft import Adapter
from octavo.store.sources import FolderSource, fingerprint


def warning(base: str, folder: Path, sha256: str | None = None) -> str:
    origin = {"base": {"sha256": sha256}} if sha256 else {}
    return base_warning(Adapter(LoraSpec(), {}, {}, origin, base=base), Path("the-adapter"), FolderSource(folder))


SAME = [
    ("owner/Llama-3.2-1B", "Llama-3.2-1B"),
    ("/home/somebody/models/Llama-3.2-1B/", "llama-3.2-1b"),
    ("unsloth/llama-3.2-1b-unsloth-bnb-4bit", "Llama-3.2-1B"),
    ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
    ("owner/Qwen2.5-0.5B", "qwen2.5_0.5b-int8"),
    ("owner/Model", "models--owner--Model/snapshots/0123"),
    ("owner/Qwen2.5-0.5B", "qwen2.5-0.5b-nf4-double"),
    ("", "anything"),
]
OTHER = [
    ("owner/Llama-3.2-1B", "Llama-3.2-1B-Instruct"),
    ("owner/Llama-3.2-1B", "Llama-3.2-3B"),
    ("owner/Qwen2.5-0.5B", "Qwen2-0.5B"),
    ("owner/Llama-3.2-1B", "my-model"),
]


@pytest.mark.parametrize(("named", "folder"), SAME)
def test_names_of_the_same_model_give_no_warning(named: str, folder: str, llama_folder: Path, tmp_path: Path) -> None:
    here = tmp_path / folder
    shutil.copytree(llama_folder, here)
    assert warning(named, here) == ""


@pytest.mark.parametrize(("named", "folder"), OTHER)
def test_the_warning_of_another_name_has_both_names(
    named: str, folder: str, llama_folder: Path, tmp_path: Path
) -> None:
    here = tmp_path / folder
    shutil.copytree(llama_folder, here)
    message = warning(named, here)
    assert named in message
    assert str(here) in message


def test_an_existing_base_folder_is_compared_by_its_weights(
    folders: dict[str, Path], llama_folder: Path, tmp_path: Path
) -> None:
    named = str(folders["llama"])
    assert warning(named, llama_folder) == ""  # a copy under another path
    write_folder(FolderSource(llama_folder), tmp_path / "q", scheme_named("int8"))
    assert warning(named, tmp_path / "q") == ""  # made from it
    weights = llama_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "the weights of" in warning(named, llama_folder)


def test_the_config_may_name_the_model(llama_folder: Path) -> None:
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "owner/Some-Model"}))
    assert warning("other/some-model", llama_folder) == ""
    assert warning("other/some-thing", llama_folder)


def test_a_hash_of_the_base_decides_if_there_is_one(llama_folder: Path) -> None:
    assert warning("any/name", llama_folder, fingerprint(FolderSource(llama_folder))) == ""
    message = warning("any/name", llama_folder, "0" * 64)
    assert "other base weights ('any/name')" in message
