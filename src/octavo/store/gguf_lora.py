"""A LoRA adapter as a GGUF file, which llama.cpp applies to a GGUF file of its base (`--lora FILE`).

llama.cpp adds scale * alpha / r * B (A x) to a linear, with one alpha of the file and r the rows of A. So B has the
ratio of a module's scaling to alpha / r. The rows of B are in the order of the base's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from octavo._version import __version__
from octavo.errors import UsageError
from octavo.store.files import new_file
from octavo.store.gguf_names import gguf_name, to_gguf
from octavo.store.gguf_write_config import checked_architecture
from octavo.store.peft import Adapter
from octavo.store.sinks import check_new_file

MERGED = "Export the merged model instead: --to gguf."


def write_lora(out: Path, adapter: Adapter, config: Mapping[str, Any], *, name: str, dtype: torch.dtype) -> int:
    """Writes the adapter for a base with this config.json; returns the bytes of its tensors.

    UsageError if `out` exists, and if the adapter has more than LoRA on linears: llama.cpp has no place for it.
    """
    check_new_file(out)
    more = [what for what, has in (
        ("weights or biases that are trained in full", adapter.full), ("LoRA on an embedding", adapter.embeddings),
        ("trained tokens", adapter.tokens),
    ) if has]  # fmt: skip
    if more:
        raise UsageError(f"An adapter with {' and '.join(more)} cannot be a GGUF adapter.", hint=MERGED)
    architecture, kinds = checked_architecture(config)
    rank = max(a.shape[0] for a, _, _ in adapter.lora.values())
    alpha = float(rank) * next(scaling for _, _, scaling in adapter.lora.values())
    total = 0
    with new_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_description(f"Written by octavo {__version__}")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for module, (a, b, scaling) in adapter.lora.items():
            ratio = scaling * a.shape[0] / alpha if alpha else 0.0
            rows = to_gguf(f"{module}.weight", b.float() * ratio, kinds, config)
            for kind, tensor in (("lora_a", a.float()), ("lora_b", rows)):
                values = _numpy(tensor, dtype)
                writer.add_tensor(f"{gguf_name(f'{module}.weight', kinds)}.{kind}", values)
                total += values.nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return total


def _numpy(tensor: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.to(dtype).numpy())
