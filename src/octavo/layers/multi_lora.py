"""Adapters served side by side: each row of a batch goes through one of them, or through none.

All adapters' pairs on one layer stand in two tensors, so that one thin product serves a whole batch whatever its
rows go through, and a step over them can be one CUDA graph.

Legend: n adapters, R the largest of their ranks, J = names of the layer x R; K inputs, N outputs; B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.ops.inference import BatchedLora, shrink
from octavo.ops.tiles import Phase

Spans = dict[str, tuple[int, int]]

RANKS = 16  # values that a tensor core adds up at once


@dataclass
class ServedAdapters:
    """The adapter id of each served adapter, by name; 0 is the base.

    `changes` counts how often the banks' tensors were replaced, which invalidates CUDA graphs captured with them. An
    adapter that fits into the tensors does not replace them.
    """

    served: dict[str, int] = field(default_factory=dict)
    changes: int = 0

    def free_id(self) -> int:
        """The lowest id that no adapter has."""
        return min(set(range(1, len(self.served) + 2)) - set(self.served.values()))


class AdapterBank:
    """The pairs of all served adapters on one layer: A (n, J, K) and B (n, R, N), with their scaling in B.

    The first stands for the base and is zero.
    """

    def __init__(self, inputs: int, outputs: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
        ends = [0, *accumulate(outputs.values())]
        self.spans: Spans = {name: (ends[i], ends[i + 1]) for i, name in enumerate(outputs)}
        self.a = torch.zeros(0, 0, inputs, dtype=dtype, device=device)
        self.b = torch.zeros(0, 0, ends[-1], dtype=dtype, device=device)
        self.names = torch.empty(ends[-1], dtype=torch.int32, device=device)
        for place, (start, stop) in enumerate(self.spans.values()):
            self.names[start:stop] = place

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def put(self, adapter_id: int, name: str, a: Tensor, b: Tensor, scaling: float) -> None:
        """Adapter `number`'s pair on one name: a (r, K), b (rows, r). Makes room for it where there is none."""
        r = len(a)
        self.make_room(adapter_id + 1, r)
        first = list(self.spans).index(name) * self.rank
        start, stop = self.spans[name]
        self.a[adapter_id, first : first + r] = a
        self.b[adapter_id, :r, start:stop] = (b.float() * scaling).T

    def clear(self, adapter_id: int) -> None:
        """Takes an adapter's pairs away."""
        if adapter_id < len(self.a):
            self.a[adapter_id], self.b[adapter_id] = 0, 0

    def add_rows_(self, y: Tensor, ids: Tensor, adapter_ids: Tensor) -> None:
        """Adds to y (B, T, N) what the adapters of the rows make of an embedding's ids (B, T), its K inputs.

        One rank after another: these sums have one order, whatever B and T are.
        """
        inner, b = self.a[adapter_ids[:, None], :, ids].float(), self.b[adapter_ids].float()  # (B, T, R), (B, R, N)
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        for r in range(self.rank):
            total += inner[:, :, r, None] * b[:, r, None]
        y += total.to(y.dtype)

    def lora(self, x: Tensor, adapter_ids: Tensor, phase: Phase) -> BatchedLora:
        """What the adapters of rows x (M, K) add to a matmul."""
        return BatchedLora(
            shrink(x, self.a, adapter_ids, phase), self.b, adapter_ids, self.names, tuple(self.spans.values())
        )

    def make_room(self, count: int, rank: int = 0) -> None:
        """Room for so many adapters, up to such a rank. Those that have no pair here have zeros.

        The rank is rounded up to RANKS: so a name's factors begin at a multiple of what tensor cores add up at once,
        and an adapter of a higher rank that joins moves no sum of another one.
        """
        count, rank = max(count, len(self.a)), max(-(-rank // RANKS) * RANKS, self.rank)
        if (count, rank) == (len(self.a), self.rank):
            return
        names, old, held = len(self.spans), self.rank, len(self.a)
        a = self.a.new_zeros(count, names, rank, self.a.shape[2])
        b = self.b.new_zeros(count, rank, self.b.shape[2])
        a[:held, :, :old] = self.a.view(held, names, old, -1) if held else 0
        b[:held, :old] = self.b
        self.a, self.b = a.flatten(1, 2), b
