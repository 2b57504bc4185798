"""Where the input of a wide product (ops/wide.py) is put together.

Legend: M rows; parts are (M, K_i), K the sum of the K_i; C the columns beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops.eight import Coded
from octavo.ops.pointwise import copy_into


class Thin(NamedTuple):
    """Pairs that read a part: their A, one under the other, and their columns beside the parts."""

    a: Callable[[], Tensor]  # (r, K_i), written when it is asked for
    start: int
    stop: int


class Coding(NamedTuple):
    """Of a part that is coded as it comes, and never stands: where its codes go, and what its pairs make of it."""

    codes: Tensor  # (M, K_i) int8
    scale: Tensor  # (M,)
    a: Tensor | None  # (r, K_i)
    t: Tensor | None  # (M, r) = the part times a^T


class Room:
    """The parts, one after another, and the C columns beside them.

    Of an exact product it is one matrix (M, K + C). In 8 bits each part is a matrix by itself, as each is coded by
    itself: so one that stands somewhere already is taken as it is, and one that is made for it alone may be coded in
    the pass that makes it, where `thins` has its pairs (() if there are none, None if it has to stand).
    """

    def __init__(
        self,
        columns: Sequence[int],
        beside: int,
        rows: int,
        like: Tensor,
        *,
        joined: bool,
        thins: Sequence[Thin | tuple[()] | None] = (),
    ) -> None:
        self.parts: list[Tensor | Coded] = []  # (M, K_i), those that are there
        self._columns, self._thins = columns, thins
        inputs = sum(columns)
        self._whole = like.new_empty(rows, inputs + beside) if joined else None
        self.beside = like.new_empty(rows, beside) if self._whole is None else self._whole[:, inputs:]

    @property
    def whole(self) -> Tensor:
        """(M, K + C)."""
        assert self._whole is not None
        return self._whole

    @property
    def standing(self) -> list[Tensor]:
        """The parts, where all of them stand."""
        found = [part for part in self.parts if not isinstance(part, Coded)]
        assert len(found) == len(self.parts)
        return found

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

    def code(self) -> Coding | None:
        """The next part, of which codes are to be written; None where it has to stand: then `add` it."""
        number = len(self.parts)
        thin = self._thins[number] if number < len(self._thins) else None
        if thin is None:
            return None
        rows = len(self.beside)
        made = Coded(
            self.beside.new_empty(rows, self._columns[number], dtype=torch.int8),
            self.beside.new_empty(rows, dtype=torch.float32),
        )
        self.parts.append(made)
        if not isinstance(thin, Thin):
            return Coding(*made, None, None)
        return Coding(*made, thin.a(), self.beside[:, thin.start : thin.stop])

    def kept(self) -> Tensor:
        """(M, C): the columns beside the parts, without the memory of these; a hundredth of what they come from."""
        return self.beside if self._whole is None else self.beside.clone()
