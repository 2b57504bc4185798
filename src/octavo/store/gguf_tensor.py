"""Reads one tensor of a GGUF file and dequantizes it."""

from __future__ import annotations

import numpy as np
import torch
from gguf.quants import dequantize

from octavo.errors import ModelError
from octavo.store.gguf_header import TensorInfo


def read_tensor(info: TensorInfo, name: str) -> torch.Tensor:
    """The tensor `name` in float32, in the row order of the file.

    Raises ModelError if the file is shorter than when its header was read.
    """
    with info.path.open("rb") as file:
        file.seek(info.offset)
        raw = file.read(info.size_bytes)
    if len(raw) != info.size_bytes:
        raise ModelError(f"{info.path}: the file changed while it was read ({name} is cut short).")
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(*info.shape[:-1], -1)
    # Copied into writable memory of its own: an unquantized type is returned as a view of `raw`.
    return torch.from_numpy(np.array(dequantize(rows, info.kind), dtype=np.float32)).reshape(info.shape)
