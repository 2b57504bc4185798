"""The header of a GGUF file: metadata and tensor offsets, read without trusting any value in it.

A GGUF file is untrusted input. The reader of the `gguf` package trusts the counts in the file, so a wrong one causes a
traceback or exhausts the memory. This reader parses the same layout (ggml/docs/gguf.md in llama.cpp: magic, version,
counts, key-value pairs, tensor descriptions, aligned data), never reads past the end, and checks every size before it
allocates. It is also fast: an array of numbers is read at once.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from octavo.errors import ModelError
from octavo.store.foreign import refuse_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT_BYTES = 32

# The largest headers in use (vocabularies of 262,144 tokens with their merges) take about 16 MiB.
MAX_HEADER_BYTES = 128 * 2**20
MAX_ARRAY_ITEMS = 4 * 2**20
MAX_DIMENSIONS = 4

_NUMPY_TYPES = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file `path`. `shape` is row-major (GGUF stores it reversed), `offset` is in bytes."""

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """Everything but the weights: metadata by key, tensor info by GGUF name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The verified header of the GGUF file at `path`.

    Raises ModelError if the file is missing, not GGUF, cut short or inconsistent. On return every tensor is completely
    inside the file, and of a type that can be dequantized.
    """
    refuse_pointer(path)
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _parse(_Cursor(path, buffer, min(size_bytes, MAX_HEADER_BYTES)), size_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        # mmap raises ValueError for an empty file.
        raise ModelError(f"{path}: cannot be read: {error}", hint="Check the path, or fetch the file again.") from error


class _Cursor:
    """A position in the header that only moves forward, and never past `limit` (bytes)."""

    def __init__(self, path: Path, buffer: mmap.mmap, limit: int) -> None:
        self.path = path
        self.buffer = buffer
        self.limit = limit
        self.offset = 0

    def broken(self, what: str) -> ModelError:
        return ModelError(
            f"{self.path}: broken GGUF file: {what} (near byte {self.offset:,})",
            hint="The file may be cut short or damaged: fetch it again and compare its size or checksum.",
        )

    def take(self, size_bytes: int) -> bytes:
        if size_bytes > self.limit - self.offset:
            raise self.broken("its header ends too early or is impossibly long")
        start = self.offset
        self.offset += size_bytes
        return self.buffer[start : self.offset]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        raw = self.take(self.u64())
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken("a string is not UTF-8") from error

    def kind(self) -> GGUFValueType:
        number = self.u32()
        if number not in set(GGUFValueType):
            raise self.broken(f"value type {number} does not exist")
        return GGUFValueType(number)

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self.array()
        return self.numbers(kind, 1)[0]

    def array(self) -> list[Any]:
        kind, count = self.kind(), self.u64()
        if kind == GGUFValueType.ARRAY:
            raise self.broken("an array of arrays, which no known model has")
        if count > MAX_ARRAY_ITEMS:
            raise self.broken(f"an array of {count:,} items")
        return [self.string() for _ in range(count)] if kind == GGUFValueType.STRING else self.numbers(kind, count)

    def numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_NUMPY_TYPES[kind])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).tolist()
        return values


def _parse(cursor: _Cursor, size_bytes: int) -> Header:
    if size_bytes < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
        raise ModelError(f"{cursor.path}: not a GGUF file (its first bytes are not 'GGUF').")
    version = cursor.u32()
    if version not in VERSIONS:
        raise ModelError(
            f"{cursor.path}: GGUF version {version} cannot be read; versions 2 and 3, little-endian, can.",
            hint="Convert the model again with a current llama.cpp, or give the Hugging Face folder.",
        )
    tensor_count, pair_count = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.broken(f"the key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.kind())
    raw = [_raw_tensor(cursor) for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.broken(f"the alignment {alignment!r} is not a power of two")
    data_start = math.ceil(cursor.offset / alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, kind_number, shape, offset in raw:
        if name in tensors:
            raise cursor.broken(f"the tensor {name!r} comes twice")
        kind = _checked_kind(cursor, name, kind_number)
        tensors[name] = _info(cursor, name, kind=kind, shape=shape, offset=data_start + offset, end=size_bytes)
    return Header(path=cursor.path, metadata=metadata, tensors=tensors)


def _raw_tensor(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dimensions = cursor.string(), cursor.u32()
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.broken(f"the tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))))
    return name, cursor.u32(), shape, cursor.u64()


def _checked_kind(cursor: _Cursor, name: str, number: int) -> GGMLQuantizationType:
    """The quantization type; ModelError unless the gguf package can dequantize a block of it."""
    if number not in set(GGMLQuantizationType):
        raise cursor.broken(f"the tensor {name!r} is of type {number}, which does not exist")
    kind = GGMLQuantizationType(number)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{cursor.path}: the tensor {name!r} is stored as {kind.name}, which cannot be dequantized here.",
            hint="Use a file quantized as Q8_0, Q4_K, Q4_1 or F16, or give the Hugging Face folder.",
        ) from error
    return kind


def _info(
    cursor: _Cursor, name: str, *, kind: GGMLQuantizationType, shape: tuple[int, ...], offset: int, end: int
) -> TensorInfo:
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block_elements:
        raise cursor.broken(f"the tensor {name!r} of shape {shape} does not fit blocks of {block_elements} values")
    size_bytes = math.prod(shape) // block_elements * block_bytes
    if offset + size_bytes > end:
        raise cursor.broken(f"the tensor {name!r} would end at byte {offset + size_bytes:,}, the file ends at {end:,}")
    return TensorInfo(path=cursor.path, kind=kind, shape=shape, offset=offset, size_bytes=size_bytes)
