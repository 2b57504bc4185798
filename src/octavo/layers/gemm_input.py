"""The buffer in which the input of a matmul of several parts (layers/fused_linear.py) is assembled.

Legend: M rows; parts are (M, K_i), K the sum of the K_i; C the extra columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.ops.pointwise import copy_into


class GemmInput:
    """The parts and the extra columns.

    For an exact matmul they are one matrix (M, K + C). For 8 bits each part is a matrix of its own, since each is
    quantized by itself: an existing tensor is used without a copy.
    """

    def __init__(self, columns: Sequence[int], extra: int, rows: int, like: Tensor, *, joined: bool) -> None:
        self.parts: list[Tensor] = []  # (M, K_i), those added so far
        self._columns = columns
        inputs = sum(columns)
        self._whole = like.new_empty(rows, inputs + extra) if joined else None
        self.extra = like.new_empty(rows, extra) if self._whole is None else self._whole[:, inputs:]
        if self._whole is not None and like.device.type == "cpu":
            # A bfloat16 matmul of a CPU may read up to 31 values after the K_i columns of a row and multiply them by 0
            # (oneDNN, K_i not a multiple of 32). Uninitialized memory may hold NaN there, and 0 * NaN is NaN.
            self.extra.zero_()

    @property
    def whole(self) -> Tensor:
        """(M, K + C)."""
        assert self._whole is not None
        return self._whole

    def add(self) -> Tensor:
        """The next part, for the caller to write."""
        columns, start = self._columns[len(self.parts)], sum(self._columns[: len(self.parts)])
        if self._whole is None:
            self.parts.append(self.extra.new_empty(len(self.extra), columns))
        else:
            self.parts.append(self._whole[:, start : start + columns])
        return self.parts[-1]

    def put(self, x: Tensor) -> None:
        """The next part is x (M, K_i)."""
        if self._whole is None:
            self.parts.append(x)
        else:
            copy_into(x, self.add())

    def detach_extra(self) -> Tensor:
        """(M, C): the extra columns in memory of their own, so that the parts can be freed."""
        return self.extra if self._whole is None else self.extra.clone()
