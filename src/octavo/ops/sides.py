"""Which pairs stand around the last piece of a branch, so that they learn in its backward (ops/learn.py).

Legend: u (M, U) is the output of the inner product, and the piece reads its last columns; C columns beside the input of
a product (ops/wide.py).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from octavo.ops.learn import Sides
from octavo.ops.linear import LowRank
from octavo.ops.mix import Piece
from octavo.ops.pairs import spread_into
from octavo.ops.wide import Wide


class Told(NamedTuple):
    """Of the pairs of the inner product: what they made of their input (M, C), and whether a gradient to that is asked
    for beside the product's."""

    inner: Tensor
    to_pairs: bool


def sides_of(piece: Piece, inner: Wide, outer: Wide, told: Told, dinner: Tensor) -> tuple[int, Sides | None]:
    """(the first column of u that the piece reads, the pairs on its sides); None where one side has none.

    dinner (M, C) is the gradient to what the pairs of the outer product made of their input.
    """
    start, behind = inner.parts[-1].rows - piece.inputs, outer.parts[-1]
    front = _in_front(inner, start, piece.learns)
    # What dropout leaves of its output is not what a pair behind it read.
    if front is None or not behind.rank or behind.dropout:
        return start, None
    after = dinner[:, outer.rank - behind.rank : outer.rank]
    rank, width = len(front[0].a), piece.outputs
    b = None
    if told.to_pairs:
        b = dinner.new_empty(piece.inputs, rank)
        for own, pair in zip(b.split(width), front, strict=True):
            spread_into(own, [pair._replace(start=0, stop=width)])
    return start, Sides(told.inner[:, inner.rank - len(front) * rank : inner.rank], b, after)


def _in_front(inner: Wide, start: int, count: int) -> list[LowRank] | None:
    """The pairs of the rows from `start` on: so many, of one rank and as many rows each; else None.

    None too where a bias is trained, whose gradient would need another pass.
    """
    if not count or any(part.bias is not None and part.bias.requires_grad for part in inner.parts):
        return None
    pairs, stop = inner.pairs[-count:], inner.parts[-1].rows
    each = (stop - start) // count
    spans = [(first, first + each) for first in range(start, stop, each)]
    fits = [(pair.start, pair.stop) for pair in pairs] == spans and len({len(pair.a) for pair in pairs}) == 1
    return pairs if fits else None
