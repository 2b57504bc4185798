"""Where the input of a wide product (ops/wide.py) is put together.

Legend: M rows; parts are (M, K_i), K the sum of the K_i; C the columns beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.ops.eight import Coded
from octavo.ops.pointwise import copy_into


class Room:
    """The parts, one after another, and the C columns beside them.

    Of an exact product it is one matrix (M, K + C). In 8 bits each part is a matrix by itself, as each is coded by
    itself: so one that stands somewhere already is taken as it is, and those that `whole_codes` names may be coded in
    the pass that makes them, as all of their channels are coded.
    """

    def __init__(
        self,
        columns: Sequence[int],
        beside: int,
        rows: int,
        like: Tensor,
        *,
        joined: bool,
        whole_codes: Sequence[bool] = (),
    ) -> None:
        self.parts: list[Tensor] = []  # (M, K_i), those that are there
        self.codes: dict[int, Coded] = {}  # of parts that have them already
        self._columns, self._whole_codes = columns, whole_codes
        inputs = sum(columns)
        self._whole = like.new_empty(rows, inputs + beside) if joined else None
        self.beside = like.new_empty(rows, beside) if self._whole is None else self._whole[:, inputs:]

    @property
    def whole(self) -> Tensor:
        """(M, K + C)."""
        assert self._whole is not None
        return self._whole

    def add(self) -> Tensor:
        """The next part, which is to be written."""
        columns, start = self._columns[len(self.parts)], sum(self._columns[: len(self.parts)])
        if self._whole is None:
            part = self.beside.new_empty(len(self.beside), columns)
        else:
            part = self._whole[:, start : start + columns]
        self.parts.append(part)
        return part

    def put(self, x: Tensor) -> None:
        """The next part is x (M, K_i)."""
        if self._whole is None:
            self.parts.append(x)
        else:
            copy_into(x, self.add())

    def add_codes(self) -> Coded | None:
        """Where the codes of the part that was added last are to be written too; None where they are made later."""
        number = len(self.parts) - 1
        if number >= len(self._whole_codes) or not self._whole_codes[number]:
            return None
        codes = self.beside.new_empty(self.parts[-1].shape, dtype=torch.int8)
        self.codes[number] = Coded(codes, self.beside.new_empty(len(codes), dtype=torch.float32))
        return self.codes[number]

    def kept(self) -> Tensor:
        """(M, C): the columns beside the parts, without the memory of these; a hundredth of what they come from."""
        return self.beside if self._whole is None else self.beside.clone()
