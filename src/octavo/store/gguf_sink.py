"""Writes a model as a GGUF file, tensor by tensor: the counterpart of store/gguf.py.

The header with all names, shapes and types comes first in the format, so `shapes` are given before the first tensor.
Quantization is that of the `gguf` package. As in llama.cpp's converter, norms and biases are in float32, and a matrix
whose rows are not a multiple of a block is in float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor

from octavo._version import __version__
from octavo.store.files import new_file
from octavo.store.gguf_config import ROPE_FACTORS
from octavo.store.gguf_names import Architecture, gguf_name, to_gguf
from octavo.store.gguf_write_config import checked_architecture, metadata_of, rope_divisors
from octavo.store.gguf_write_tokenizer import tokenizer_metadata
from octavo.store.sinks import Header, Sink, check_new_file

# --type -> (type of a tensor, general.file_type)
TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (gguf.GGMLQuantizationType.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (gguf.GGMLQuantizationType.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (gguf.GGMLQuantizationType.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def gguf_sink(out: Path, header: Header, shapes: Shapes, kind: str, *, name: str) -> Iterator[Sink]:
    """A sink for the GGUF file `out`, which appears when the context ends; an error leaves `out` unchanged.

    `shapes` are those of all tensors by Hugging Face name, in the order in which they will come. `kind` is one of
    TYPES, `name` the model's name for people. ModelError for a model or tokenizer that GGUF has no description of.
    """
    check_new_file(out)
    _, architecture = checked_architecture(header.config)
    entries = entries_of(header, kind, name)
    with new_file(out) as temporary:
        sink = _GgufSink(temporary, header.config, architecture, entries, shapes, kind)
        try:
            yield sink
            sink.check_complete()
        finally:
            sink.writer.close()


def entries_of(header: Header, kind: str, name: str) -> dict[str, Any]:
    """All metadata of the file."""
    config = header.config
    architecture, _ = checked_architecture(config)
    ends = header.generation_config.get("eos_token_id", config.get("eos_token_id"))
    end_ids = tuple(ends) if isinstance(ends, list) else ()
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.description": f"Written by octavo {__version__}",
        "general.file_type": int(TYPES[kind][1]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{key}": value for key, value in metadata_of(config).items()},
        **tokenizer_metadata(header.tokenizer, config["vocab_size"], end_ids=end_ids),
    }


class _GgufSink:
    def __init__(
        self, path: Path, config: Mapping[str, Any], architecture: Architecture, entries: Mapping[str, Any],
        shapes: Shapes, kind: str,
    ) -> None:  # fmt: skip
        self.config, self.architecture = config, architecture
        self.expected = iter(shapes)
        self.kinds = {name: _kind_of(shape, TYPES[kind][0]) for name, shape in shapes.items()}
        self.writer = gguf.GGUFWriter(path, str(entries["general.architecture"]))
        for key, value in entries.items():
            if key != "general.architecture":  # the writer has it already
                _add(self.writer, key, value)
        self.divisors = rope_divisors(config)
        if self.divisors is not None:
            self._declare(ROPE_FACTORS, self.divisors.shape, gguf.GGMLQuantizationType.F32)
        for name, shape in shapes.items():
            self._declare(gguf_name(name, architecture), shape, self.kinds[name])
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        if self.divisors is not None:
            self.writer.write_tensor_data(self.divisors)

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> int:
        return sum(self._put(f"{name}.{kind}", tensor) for kind, tensor in tensors.items())

    def _put(self, name: str, tensor: Tensor) -> int:
        assert name == next(self.expected), f"{name} comes out of order"
        values = to_gguf(name, tensor, self.architecture, self.config).float().contiguous().numpy()
        data = quantize(values, self.kinds[name])
        self.writer.write_tensor_data(data)
        return data.nbytes

    def check_complete(self) -> None:
        assert next(self.expected, None) is None, "a tensor is missing"

    def _declare(self, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        stored, dtype = tuple(shape), _DTYPES.get(kind, np.uint8)
        if dtype is np.uint8:
            stored = quant_shape_to_byte_shape(shape, kind)
        size = int(np.prod(stored)) * np.dtype(dtype).itemsize
        self.writer.add_tensor_info(name, stored, np.dtype(dtype), size, raw_dtype=kind)


_DTYPES: dict[gguf.GGMLQuantizationType, Any] = {
    gguf.GGMLQuantizationType.F32: np.float32,
    gguf.GGMLQuantizationType.F16: np.float16,
}


def _kind_of(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Adds an entry with the type that llama.cpp's converter gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
