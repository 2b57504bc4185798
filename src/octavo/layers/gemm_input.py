"""Where the input of a wide product (layers/fused_linear.py) is put together.

Legend: M rows; parts are (M, K_i), K the sum of the K_i; C the columns beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.ops.pointwise import copy_into


class GemmInput:
    """The parts, one after another, and the C columns beside them.

    Of an exact product it is one matrix (M, K + C). In 8 bits each part is a matrix by itself, as each is coded by
    itself: so one that stands somewhere already is taken as it is.
    """

    def __init__(self, columns: Sequence[int], extra: int, rows: int, like: Tensor, *, joined: bool) -> None:
        self.parts: list[Tensor] = []  # (M, K_i), those that are there
        self._columns = columns
        inputs = sum(columns)
        self._whole = like.new_empty(rows, inputs + extra) if joined else None
        self.extra = like.new_empty(rows, extra) if self._whole is None else self._whole[:, inputs:]

    @property
    def whole(self) -> Tensor:
        """(M, K + C)."""
        assert self._whole is not None
        return self._whole

    def add(self) -> Tensor:
        """The next part, which is to be written."""
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
        """(M, C): the columns beside the parts, without the memory of these; a hundredth of what they come from."""
        return self.extra if self._whole is None else self.extra.clone()
