"""Invalid GGUF headers, and headers with wrong sizes: refused at once with a clear error."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from octavo.errors import ModelError
from octavo.store import gguf_header
from octavo.store.gguf_header import read_header


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    for name, content in {"empty": b"", "text": b"Hello", "version": b"GGUF" + struct.pack("<I", 99)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            read_header(tmp_path / name)
    with pytest.raises(ModelError, match="missing"):
        read_header(tmp_path / "missing")


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HOSTILE = {
    "string longer than the file": (0, 1, struct.pack("<Q", 2**62) + b"abc"),
    "many pairs": (0, 2**60, b""),
    "many tensors": (2**60, 0, b""),
    "many numbers": (0, 1, string("k") + struct.pack("<IIQ", 9, 0, 2**50)),
    "many strings": (0, 1, string("k") + struct.pack("<IIQ", 9, 8, 2**50)),
    "arrays in arrays": (0, 1, string("k") + struct.pack("<IIQ", 9, 9, 1) * 3000),
    "unknown type": (0, 1, string("k") + struct.pack("<I", 77)),
    "zero alignment": (0, 1, string("general.alignment") + struct.pack("<II", 4, 0)),
    "same key twice": (0, 2, (string("k") + struct.pack("<II", 4, 0)) * 2),
    "huge tensor": (1, 0, string("t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "overflowing tensor": (1, 0, string("t") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0)),
    "tensor far outside": (1, 0, string("t") + struct.pack("<IQIQ", 1, 32, 0, 2**63)),
    "tensor of no rows": (1, 0, string("t") + struct.pack("<IQIQ", 1, 0, 0, 0)),
    "many dimensions": (1, 0, string("t") + struct.pack("<I", 2**31)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_with_wrong_sizes_is_refused(case: str, tmp_path: Path) -> None:
    tensor_count, pair_count, body = HOSTILE[case]
    content = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + body + bytes(64)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="broken GGUF file"):
        read_header(tmp_path / "m.gguf")


def test_an_array_beyond_the_limit_is_refused_even_if_the_file_contains_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = string("k") + struct.pack("<IIQ", 9, 0, 10) + bytes(10)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    assert read_header(tmp_path / "m.gguf").metadata == {"k": [0] * 10}
    monkeypatch.setattr(gguf_header, "MAX_ARRAY_ITEMS", 9)
    with pytest.raises(ModelError, match="10 items"):
        read_header(tmp_path / "m.gguf")
