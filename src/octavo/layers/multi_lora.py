"""Multi-LoRA inference: each row of a batch uses one of several adapters, or none.

The A and B of all adapters on one layer are stacked in two tensors, so that one batched low-rank matmul serves all rows
of a batch, and a step with any mix of adapters can be one CUDA graph.

Legend: n adapter ids, R the largest rank, J = names of the layer * R; K inputs, N outputs of the layer; B rows, T
positions, M = B T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.ops.inference import BatchedLora, shrink
from octavo.ops.tiles import Phase

RANK_MULTIPLE = 16  # values of K that a tensor core sums at once


@dataclass
class ServedAdapters:
    """`ids` are the adapter ids by name; id 0 is the base.

    `changes` counts how often the banks' tensors were replaced, which invalidates CUDA graphs captured with them. An
    adapter that fits into the tensors does not replace them.
    """

    ids: dict[str, int] = field(default_factory=dict)
    changes: int = 0

    def free_id(self) -> int:
        """The lowest id that no adapter has."""
        return min(set(range(1, len(self.ids) + 2)) - set(self.ids.values()))


class AdapterBank:
    """The LoRA of all served adapters on one layer: A (n, J, K) and B (n, R, N), with the scaling folded into B.

    Id 0 is the base: its A and B are zero.
    """

    def __init__(self, inputs: int, outputs: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
        ends = [0, *accumulate(outputs.values())]
        self.spans = {name: (ends[i], ends[i + 1]) for i, name in enumerate(outputs)}  # rows of each name
        self.a = torch.zeros(0, 0, inputs, dtype=dtype, device=device)
        self.b = torch.zeros(0, 0, ends[-1], dtype=dtype, device=device)
        self.names = torch.empty(ends[-1], dtype=torch.int32, device=device)
        for index, (start, stop) in enumerate(self.spans.values()):
            self.names[start:stop] = index

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def put(self, adapter_id: int, name: str, a: Tensor, b: Tensor, scaling: float) -> None:
        """Stores an adapter's a (r, K) and b (rows, r) of one name; grows the tensors if they are too small."""
        r = len(a)
        self.reserve(adapter_id + 1, r)
        first = list(self.spans).index(name) * self.rank
        start, stop = self.spans[name]
        self.a[adapter_id, first : first + r] = a
        self.b[adapter_id, :r, start:stop] = (b.float() * scaling).T

    def clear(self, adapter_id: int) -> None:
        """Removes an adapter."""
        if adapter_id < len(self.a):
            self.a[adapter_id], self.b[adapter_id] = 0, 0

    def add_rows_(self, y: Tensor, ids: Tensor, adapter_ids: Tensor) -> None:
        """Adds the adapters' rows of an embedding to y (B, T, N): A[:, ids] and B of `adapter_ids` (B,); ids (B, T).

        Ranks are added one after the other: the order of a sum does not depend on B and T.
        """
        t, b = self.a[adapter_ids[:, None], :, ids].float(), self.b[adapter_ids].float()  # (B, T, R), (B, R, N)
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)  # (B, T, N)
        for r in range(self.rank):
            total += t[:, :, r, None] * b[:, r, None]
        y += total.to(y.dtype)

    def lora(self, x: Tensor, adapter_ids: Tensor, phase: Phase) -> BatchedLora:
        """The low-rank term of a matmul of x (M, K), whose rows use `adapter_ids` (M,)."""
        return BatchedLora(
            shrink(x, self.a, adapter_ids, phase), self.b, adapter_ids, self.names, tuple(self.spans.values())
        )

    def reserve(self, count: int, rank: int = 0) -> None:
        """Grows the tensors to `count` ids and to `rank`, if they are smaller; new entries are zero.

        The rank is rounded up to RANK_MULTIPLE. The rows of every name then start at a multiple of the values that a
        tensor core sums at once, and loading an adapter of a higher rank changes no bit of another one.
        """
        count, rank = max(count, len(self.a)), max(-(-rank // RANK_MULTIPLE) * RANK_MULTIPLE, self.rank)
        if (count, rank) == (len(self.a), self.rank):
            return
        names, old_rank, old_count = len(self.spans), self.rank, len(self.a)
        a = self.a.new_zeros(count, names, rank, self.a.shape[2])
        b = self.b.new_zeros(count, rank, self.b.shape[2])
        a[:old_count, :, :old_rank] = self.a.view(old_count, names, old_rank, -1) if old_count else 0
        b[:old_count, :old_rank] = self.b
        self.a, self.b = a.flatten(1, 2), b
