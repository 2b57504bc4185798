"""Written GGUF files are the model that was written: its tensors, its config, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tests.store import test_gguf_families as families

from octavo.errors import ModelError, UsageError
from octavo.models import parse
from octavo.ops.quantize import scheme_named
from octavo.store.gguf import GgufSource, open_gguf, shapes_of
from octavo.store.gguf_sink import TYPES, gguf_sink
from octavo.store.gguf_write_config import checked_architecture, rope_divisors
from octavo.store.hf_folder import header_of, write_tensors

NONE = scheme_named("none")


def exported(source: Any, out: Path, kind: str) -> GgufSource:
    header = header_of(source, NONE)
    with gguf_sink(out, header, shapes_of(dict(header.config)), kind, name="model") as sink:
        write_tensors(source, NONE, sink)
    return open_gguf(out)


@pytest.mark.parametrize("architecture", families.FAMILIES)
def test_what_is_read_back_is_what_was_written(architecture: str, tmp_path: Path) -> None:
    """The first file is written by the `gguf` package's own names, and the reader is tested against transformers."""
    source = families.written(tmp_path / "m.gguf", architecture)
    again = exported(source, tmp_path / "again.gguf", "f32")
    assert parse(again.config) == parse(source.config)
    assert again.names() == source.names()
    for name in source.names():
        assert torch.equal(again.tensor(name), source.tensor(name)), name
    text = "ab ba a b"
    assert again.tokenizer().encode(text) == source.tokenizer().encode(text)


@pytest.mark.parametrize("architecture", ["granite", "gemma3"])
def test_the_tensors_of_the_file_are_those_of_the_converter(architecture: str, tmp_path: Path) -> None:
    """Bit for bit: rows of q and k, norms with 1 added."""
    model = families.tiny_model(architecture)
    source = families.written(tmp_path / "m.gguf", architecture, model)
    exported(source, tmp_path / "again.gguf", "f32")
    expected = families.stored(model, architecture)
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("kind", TYPES)
def test_matrices_have_the_type_and_norms_float32(kind: str, tmp_path: Path) -> None:
    source = families.written(tmp_path / "m.gguf", "qwen3")
    exported(source, tmp_path / "again.gguf", kind)
    original = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "again.gguf").tensors:
        values = original[tensor.name]
        block, _ = gguf.GGML_QUANT_SIZES[TYPES[kind][0]]
        wanted = TYPES[kind][0] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        if values.ndim > 1 and values.shape[-1] % block:
            wanted = gguf.GGMLQuantizationType.F16
        assert tensor.tensor_type == wanted, tensor.name
        expected = dequantize(quantize(values, wanted), wanted)
        np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type), expected)


def test_llama_3s_rotary_positions_are_divisors_of_the_frequencies(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = families.written(tmp_path / "m.gguf", "olmo2")
    config = {**source.config, "rope_parameters": scaling}
    divisors = rope_divisors(config)
    assert divisors is not None
    assert divisors.max() == pytest.approx(8.0)
    assert divisors.min() == pytest.approx(1.0)
    assert rope_divisors(source.config) is None


def test_a_model_that_llama_cpp_does_not_run_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot write a gptj model") as caught:
        checked_architecture({"model_type": "gptj"})
    assert "octavo merge" in caught.value.hint
    assert "GPT-J" in caught.value.hint


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    source = families.written(tmp_path / "m.gguf", "qwen3")
    header = header_of(source, NONE)
    out = tmp_path / "again.gguf"
    with (
        pytest.raises(RuntimeError, match="stop"),
        gguf_sink(out, header, shapes_of(dict(header.config)), "f16", name="m"),
    ):
        raise RuntimeError("stop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]
    out.touch()
    with pytest.raises(UsageError, match="exists already"), gguf_sink(out, header, {}, "f16", name="m"):
        pass
