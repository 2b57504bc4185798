"""Checks a head that config.json calls tied to the embedding against the stored tensors.

As in transformers, head and embedding are tied only if their stored tensors are equal, and if only the head is stored,
it is the embedding too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.models import table_names

PARTS = ("weight", "absmax", "code")
BLOCK_ROWS = 4096


def has_own_head(config: Mapping[str, Any], names: Collection[str], tensor: Callable[[str], Tensor]) -> bool:
    """Whether `names` contain a head that differs from the embedding in a part of its stored weight."""
    embedding, head = table_names(config)
    if f"{head}.weight" not in names or f"{embedding}.weight" not in names:
        return False
    for part in PARTS:
        head_name, embedding_name = (f"{module}.{part}" for module in (head, embedding))
        if (head_name in names) != (embedding_name in names):
            return True
        if head_name in names and not _equal(tensor(head_name), tensor(embedding_name)):
            return True
    return False


def names_of_head(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Name of each embedding tensor -> the head's tensor that is stored instead; {} if the embedding is stored."""
    embedding, head = table_names(config)
    if f"{head}.weight" not in names or f"{embedding}.weight" in names:
        return {}
    return {f"{embedding}.{part}": f"{head}.{part}" for part in PARTS if f"{head}.{part}" in names}


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype or a.ndim == 0:
        return torch.equal(a, b)
    starts = range(0, a.shape[0], BLOCK_ROWS)
    return all(torch.equal(a[i : i + BLOCK_ROWS].float(), b[i : i + BLOCK_ROWS].float()) for i in starts)
