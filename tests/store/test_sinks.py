"""Sinks: a folder is complete or absent, and another format is one more sink."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo.errors import ModelError, UsageError
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.store import sinks
from octavo.store.hf_folder import header_of, write_folder, write_tensors
from octavo.store.sinks import Header, Sink, folder_sink
from octavo.store.sources import FolderSource, fingerprint

FAMILIES = ["llama", "gptj", "neox-blocks"]


class PickleSink:
    """Another format, as somebody would add one: a file of torch.save."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> int:
        self.tensors |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
        return sum(tensor.nbytes for tensor in tensors.values())


@contextmanager
def pickle_sink(out: Path, header: Header) -> Iterator[Sink]:
    sink = PickleSink()
    yield sink
    torch.save({"tensors": sink.tensors, "config": dict(header.config)}, out)


@pytest.fixture
def header(folders: dict[str, Path]) -> Header:
    return header_of(FolderSource(folders["llama"]), scheme_named("none"))


def put_some(sink: Sink) -> int:
    return sink.put("a", {"weight": torch.ones(4, 8)}) + sink.put("b", {"bias": torch.zeros(3, dtype=torch.float16)})


def put_some_and_fail(sink: Sink) -> None:
    put_some(sink)
    put_some(sink)
    raise ZeroDivisionError


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_format_gets_the_tensors_of_a_folder(
    family: str, scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source, wanted = FolderSource(folders[family]), scheme_named(scheme)
    total = write_folder(source, tmp_path / "folder", wanted)
    with pickle_sink(tmp_path / "file.pt", header_of(source, wanted)) as sink:
        assert write_tensors(source, wanted, sink) == total
    actual = torch.load(tmp_path / "file.pt", weights_only=True)
    expected = load_file(tmp_path / "folder" / "model.safetensors")
    assert actual["tensors"].keys() == expected.keys()
    assert all(torch.equal(actual["tensors"][name], expected[name]) for name in expected)
    assert actual["config"] == json.loads((tmp_path / "folder" / "config.json").read_text())


def test_a_header_has_all_that_is_no_tensor(folders: dict[str, Path]) -> None:
    source = FolderSource(folders["gptj"])
    header = header_of(source, scheme_named("int8"))
    assert header.config["octavo"]["scheme"] == header.scheme == "int8"
    assert {**header.config, "octavo": None} == {**source.config, "octavo": None}
    assert header.generation_config == source.generation_config
    assert header.tokenizer.get_vocab() == source.tokenizer().get_vocab()
    assert header.origin == fingerprint(source)


def test_a_model_that_cannot_be_loaded_back_has_no_header(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="reordered at load"):
        header_of(FolderSource(folders["neox"]), scheme_named("dynamic8"))


def test_a_folder_appears_when_its_sink_closes(header: Header, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folder_sink(out, header) as sink:
        assert put_some(sink) == 4 * 8 * 4 + 3 * 2
        assert not out.exists()
    tensors = load_file(out / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"a.weight": (4, 8), "b.bias": (3,)}
    assert json.loads((out / "config.json").read_text()) == header.config
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["origin"], manifest["scheme"]) == (header.origin, "none")


@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_what_was_there(
    existing: bool, header: Header, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "SHARD_BYTES", 8)  # each tensor is on disk at once
    out = tmp_path / "out"
    if existing:
        with folder_sink(out, header) as sink:
            put_some(sink)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ZeroDivisionError), folder_sink(out, header, replace=True) as sink:
        put_some_and_fail(sink)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == ([out] if existing else [])


def test_a_folder_that_is_not_empty_is_replaced_on_request_alone(header: Header, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds"), folder_sink(tmp_path, header) as sink:
        put_some(sink)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_tensors_that_share_memory_are_written_apart(header: Header, tmp_path: Path) -> None:
    values = torch.arange(12.0)
    parts: dict[str, Any] = {"weight": values.view(3, 4), "absmax": values[:4], "code": values[4:]}
    with folder_sink(tmp_path / "out", header) as sink:
        sink.put("a", parts)
        sink.put("b", parts)
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert set(actual) == {f"{name}.{kind}" for name in "ab" for kind in parts}
    assert all(torch.equal(actual[f"{name}.{kind}"], parts[kind]) for name in "ab" for kind in parts)
