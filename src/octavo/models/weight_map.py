"""How the modules of a checkpoint map to a decoder's layers.

A family's `weight_map(config)` gives a `WeightPath` for each name: the layer that holds it, and the order of its rows
where that differs. Several names of one layer are stacked rows (layers/frozen.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from octavo.layers.frozen import FrozenEmbedding, FrozenLinear
from octavo.layers.frozen_matrix import FrozenMatrix


def layer_of(name: str) -> int | None:
    """The index of the block that a checkpoint name belongs to, or None."""
    match = re.search(r"\.([0-9]{1,9})\.", name)  # names of adapters are untrusted: int() refuses 5,000 digits
    return int(match[1]) if match else None


class RowOrder(NamedTuple):
    """An order of rows: the rows of a checkpoint, as an array of `shape`, have their axes permuted to `axes`.

    It is the one description of layouts that interleave rows, for weights, biases, LoRA's B and quantized values:

        GPT-NeoX's query_key_value: [q|k|v] of one head after the other, (H, 3, D), become (3, H, D): axes (1, 0, 2)
        q and k of a llama in GGUF: rotary pairs (0, 1), (2, 3), .. of a head, (H, D/2, 2), become pairs (0, D/2),
            (1, D/2 + 1), ..: axes (0, 2, 1)

    Legend: H heads, D the size of a head, N rows, K values of a row.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def run(self) -> int:
        """The number of rows that stay next to each other: those of the last axes that keep their places."""
        return prod(self.shape[self._moved :])

    @property
    def of_runs(self) -> RowOrder:
        """The same order of runs in place of rows."""
        return RowOrder(self.shape[: self._moved], self.axes[: self._moved])

    @property
    def _moved(self) -> int:
        """The number of axes up to the last one that changes its place."""
        return max((axis + 1 for axis, source in enumerate(self.axes) if axis != source), default=0)

    def from_checkpoint(self, rows: Tensor) -> Tensor:
        """rows (N, ..) of the checkpoint in the decoder's order."""
        return self._permuted(rows, self.shape, self.axes)

    def to_checkpoint(self, rows: Tensor) -> Tensor:
        """rows (N, ..) of the decoder in the checkpoint's order."""
        inverse = tuple(self.axes.index(axis) for axis in range(len(self.axes)))
        return self._permuted(rows, tuple(self.shape[axis] for axis in self.axes), inverse)

    @staticmethod
    def _permuted(rows: Tensor, shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
        rest = rows.shape[1:]  # () for a bias, (K,) for a weight
        last = range(len(axes), len(axes) + len(rest))
        return rows.reshape(*shape, *rest).permute(*axes, *last).reshape(rows.shape)


class WeightPath(NamedTuple):
    """The path of the layer that holds a module of the checkpoint, and the order of the module's rows there.

    `module` is the name of the module in transformers, and so in PEFT's files, if it differs from the checkpoint's.
    `transposed`: its weight is stored (K, N) where a linear's is (N, K), as in Conv1D of transformers.
    """

    path: str
    order: RowOrder | None = None
    module: str = ""
    transposed: bool = False


@dataclass(frozen=True)
class WeightEntry:
    """One module of a checkpoint in a built decoder: its `layer`, and in a frozen layer the `key` of its rows."""

    name: str  # in the checkpoint, e.g. model.layers.3.self_attn.q_proj
    layer: nn.Module
    module: str  # in transformers and in PEFT's files
    key: str  # the last part of the name, q_proj
    order: RowOrder | None = None
    is_head: bool = False
    transposed: bool = False  # an unquantized weight is (K, N) in the checkpoint; a quantized one is always (N, K)

    @property
    def matrix(self) -> FrozenMatrix | None:
        """The matrix that holds the module's rows, or None for a norm."""
        return self.layer.matrix if isinstance(self.layer, FrozenLinear | FrozenEmbedding) else None

    @property
    def rows_key(self) -> str:
        """The key of the rows in the matrix: the embedding's for a tied head."""
        assert self.matrix is not None
        if self.is_head and self.key not in self.matrix.outputs:
            return next(iter(self.matrix.outputs))
        return self.key

    @property
    def is_linear(self) -> bool:
        return isinstance(self.layer, FrozenLinear)

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding or the head, which have a row for each token."""
        return isinstance(self.layer, FrozenEmbedding) or self.is_head

    def parameter(self, kind: str) -> Tensor | None:
        """The full-precision "weight" or "bias" of this module, a view; None if it has none (or a frozen one)."""
        if isinstance(self.layer, FrozenLinear):
            if kind == "bias" and self.rows_key in self.layer.bias_names:
                return self.layer.bias_of(self.rows_key)
            return None
        if isinstance(self.layer, FrozenEmbedding):
            return None
        parameter = getattr(self.layer, kind, None)
        return parameter.detach() if isinstance(parameter, nn.Parameter) else None
