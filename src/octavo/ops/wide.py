"""Frozen matrices side by side as one product, their low-rank pairs and bias as further columns.

    y = x_1 W_1^T + x_2 W_2^T + .. + low-rank terms + bias
      = [x_1 | x_2 | .. | x A^T | 1] [W_1 | W_2 | .. | s B | bias]^T      (s goes to A if it is under 1)

So a card sees one product instead of one for each matrix, each pair and the bias, and none of the passes over y
that adding them one by one would take. In backward the gradient to x A^T comes out of the same product as the
gradient to x, and one thin product gives the gradients of every B and of the bias.

The wide matrix is written from the quantised parts for each use and never kept. Or nothing is written: parts that ask
for it are multiplied in 8 bits as they are stored (ops/eight.py), the further columns by a thin product beside that.

Legend: M rows of input; part i is a frozen linear (N, K_i); K the sum of the K_i; C the added columns (the ranks of
all pairs, a one for the bias), rounded up so that rows start where a card reads best; a pair is A (r, K_i), B (n, r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops import eight
from octavo.ops.frozen import APART, Apart, Frozen, Trial, take_apart
from octavo.ops.learn import Learnt
from octavo.ops.linear import LowRank, mm_float32
from octavo.ops.pairs import spread_into, stacked
from octavo.ops.quantize import INT8_LEVELS
from octavo.ops.room import Room

X = TypeVar("X")
ALIGNMENT = 8  # numbers; 16 bytes of a 2-byte type, what tensor cores' loads need of a row's start


class Known(NamedTuple):
    """What the pairs on the rows from `start` on have learnt already, in an activation's backward."""

    start: int
    learnt: Learnt


@dataclass(frozen=True)
class Wide:
    """The product of `parts`, all of the same N."""

    parts: tuple[Frozen, ...]

    @cached_property
    def inputs(self) -> int:
        """K."""
        return sum(part.columns for part in self.parts)

    @cached_property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)

    @cached_property
    def width(self) -> int:
        """K + C."""
        added = self.rank + any(part.bias is not None for part in self.parts)
        return self.inputs + -(-added // ALIGNMENT) * ALIGNMENT

    @property
    def trained(self) -> list[Tensor]:
        """What takes gradients, in the order in which `backward` gives them: A, B of each pair; then biases."""
        factors = [tensor for pair in self.pairs for tensor in (pair.a, pair.b)]
        return factors + [part.bias for part in self.parts if part.bias is not None]

    def matrix(self, like: Tensor) -> Tensor:
        """(N, K + C) in the type and on the device of `like`, written anew."""
        wide = like.new_empty(self.parts[0].rows, self.width)
        spread_into(wide[:, self.inputs :], self.pairs)
        start = 0
        for part in self.parts:
            part.fill(wide[:, start : start + part.columns])
            start += part.columns
            if part.bias is not None:
                wide[part.bias_start : part.bias_start + part.bias.numel(), self.inputs + self.rank] += part.bias
        return wide

    @cached_property
    def in_eight(self) -> bool:
        """Whether the product is in 8 bits; with a trial it is exact, and both are compared."""
        return self.trial is None and all(part.codes is not None for part in self.parts)

    @property
    def trial(self) -> Trial | None:
        return self.parts[0].trial if all(part.codes is not None for part in self.parts) else None

    def beside(self, like: Tensor) -> Tensor:
        """(N, C) in the type of `like`: the last C columns of `matrix`, without the bias."""
        b = like.new_empty(self.parts[0].rows, self.width - self.inputs)
        spread_into(b, self.pairs)
        return b

    @cached_property
    def pairs(self) -> list[LowRank]:
        """Of all parts, in the order of their columns."""
        return [pair for part in self.parts for pair in part.pairs]

    def room(self, rows: int, like: Tensor) -> Room:
        """For an input of so many rows: the caller adds the parts, then calls `complete_`."""
        columns = [part.columns for part in self.parts]
        return Room(columns, self.width - self.inputs, rows, like, joined=not self.in_eight)

    def seeds(self) -> list[int]:
        """A seed of the dropout mask of each part, drawn on the host: backward makes the same masks again."""
        return [int(torch.randint(2**62, ())) if part.dropout else 0 for part in self.parts]

    def complete_(self, room: Room, seeds: Sequence[int]) -> None:
        """Writes the columns beside the parts."""
        for part, x, column, seed in self._spans(room.parts, seeds):
            if part.rank:
                inner = room.beside[:, column : column + part.rank]
                torch.mm(_dropped(part, x, seed), stacked(part.pairs, x).T, out=inner)
        if room.beside.shape[1] > self.rank:
            room.beside[:, self.rank :].zero_()
            room.beside[:, self.rank].fill_(1)

    def product(self, room: Room, *, onto: Tensor | None = None) -> Tensor:
        """(M, N) of a completed input; added to `onto` (M, N) if given, which stays as it is."""
        if self.in_eight:
            return self._product_in_eight(room, onto)
        matrix = self.matrix(room.whole)
        if self.trial is not None:
            self._try_forward(room, F.linear(room.whole, matrix))
        return F.linear(room.whole, matrix) if onto is None else torch.addmm(onto, room.whole, matrix.T)

    def _product_in_eight(self, room: Room, onto: Tensor | None) -> Tensor:
        like = room.beside
        out = like.new_empty(len(like), self.parts[0].rows)
        beside = None
        if self.rank:
            beside = eight.Beside(room.beside[:, : self.rank], self.beside(like)[:, : self.rank])
        for part, x in zip(self.parts, room.parts, strict=True):
            assert part.codes is not None
            others, (weight, absmax) = None, part.codes(x)
            if part.apart is not None:
                beside, others = _with_channels(beside, x, weight, absmax, part.apart), part.apart.others
            coded = eight.coded(x, torch.int8, fold=others)
            eight.product_into(*coded, weight, out, absmax, part.bias, part.bias_start, beside, onto)
            onto, beside = out, None
        return out

    def backward(
        self, dy: Tensor, room: Room, seeds: Sequence[int], *, to_input: bool, matrix: Tensor | None = None
    ) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        """(gradients to the parts of the input (M, K_i) if asked for, gradients of `trained`), from dy (M, N)."""
        dx, dinner = self.to_input(dy, seeds, matrix) if to_input else (None, self.to_beside(dy))
        return dx, self.to_trained(dy, room.parts, room.beside, dinner, seeds)

    def to_beside(self, dy: Tensor, known: Known | None = None) -> Tensor:
        """The gradient to the columns beside the input (M, C)."""
        if known is None or known.learnt.t is None:
            return dy @ self.beside(dy)
        dinner = dy.new_zeros(len(dy), self.width - self.inputs)
        column = self.rank - known.learnt.t.shape[1]
        if column:
            torch.mm(dy[:, : known.start], self.beside(dy)[: known.start, :column], out=dinner[:, :column])
        dinner[:, column : self.rank] = known.learnt.t
        return dinner

    def to_input(
        self, dy: Tensor, seeds: Sequence[int], matrix: Tensor | None = None, known: Known | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients to the parts of the input (M, K_i) and to the columns beside them (M, C).

        `matrix` is the one that `matrix(dy)` would write, if it is at hand.
        """
        if self.in_eight:
            dinner = self.to_beside(dy, known)
            return self._to_input_in_eight(dy, dinner, seeds), dinner
        dwide = dy @ (self.matrix(dy) if matrix is None else matrix)  # (M, K + C)
        *dx, dinner = dwide.split([*(part.columns for part in self.parts), self.width - self.inputs], dim=1)
        for part, own, column, seed in self._spans(dx, seeds):
            if part.rank:
                _add_low_rank_(own, dinner[:, column : column + part.rank], part, seed)
        if self.trial is not None:
            found = self._to_input_in_eight(dy, dinner, seeds)
            self._told("backward", torch.cat(found, dim=1), dwide[:, : self.inputs])
        return dx, dinner

    def _to_input_in_eight(self, dy: Tensor, dinner: Tensor, seeds: Sequence[int]) -> list[Tensor]:
        dx = [dy.new_empty(len(dy), part.columns) for part in self.parts]
        kind = eight.gradient_type(dy.device)
        for part, own_dx, column, seed in self._spans(dx, seeds):
            assert part.codes is not None
            turned, absmax = part.turned or turned_codes(part.codes, dy)
            own = dinner[:, column : column + part.rank]
            joins = part.rank and not part.dropout  # a mask on what pairs read cannot join in the kernel
            beside = eight.Beside(own, stacked(part.pairs, dy, turned=True)) if joins else None
            gradient = eight.coded(dy, kind, fold=absmax, spans=kind == torch.int8)
            eight.product_into(*gradient, turned, own_dx, beside=beside)
            if part.rank and part.dropout:
                _add_low_rank_(own_dx, own, part, seed)
        return dx

    def to_trained(
        self,
        dy: Tensor,
        x: Sequence[Tensor | Learnt],
        inner: Tensor,
        dinner: Tensor,
        seeds: Sequence[int],
        known: Known | None = None,
    ) -> list[Tensor | None]:
        """Gradients of `trained`: from the parts of the input (M, K_i), or what was learnt of them, the columns beside
        these and the gradient to them, both (M, C)."""
        if not self.rank and not any(tensor.requires_grad for tensor in self.trained):
            return [None] * len(self.trained)
        rows = dy.shape[1] if known is None else known.start
        added = mm_float32(dy[:, :rows].T, inner)  # (N, C): every B, and the bias
        self._scale_(added)
        factors: list[Tensor | None] = []
        for part, own_x, column, seed in self._spans(x, seeds):
            if not part.rank:
                continue
            if isinstance(own_x, Learnt):
                da = own_x.a
            else:
                da = mm_float32(dinner[:, column : column + part.rank].T, _dropped(part, own_x, seed))
            for pair, own in zip(part.pairs, da.split([len(pair.a) for pair in part.pairs]), strict=True):
                factors.append((own if pair.on_a == 1 else own * pair.on_a).to(pair.a.dtype))
                if known is not None and pair.start >= rows:
                    db = known.learnt.b[pair.start - rows : pair.stop - rows]
                    db = db if pair.on_b == 1 else db * pair.on_b
                else:
                    db = added[pair.start : pair.stop, column : column + len(own)]
                factors.append(db.to(pair.b.dtype))
                column += len(own)
        biases: list[Tensor | None] = []
        for part in self.parts:
            if part.bias is not None:
                own = added[part.bias_start : part.bias_start + part.bias.numel(), self.rank]
                biases.append(own.to(part.bias.dtype) if part.bias.requires_grad else None)
        return factors + biases

    def _scale_(self, added: Tensor) -> None:
        """The gradients of every B (N, C) times what scales it: one pass where that is the same for all."""
        column = 0
        for scaling, run in groupby(self.pairs, lambda pair: pair.on_b):
            width = sum(len(pair.a) for pair in run)
            if scaling != 1:
                added[:, column : column + width] *= scaling
            column += width

    def _try_forward(self, room: Room, exact: Tensor) -> None:
        """Writes what 8 bits cost into the trial of each part, without and with channels apart."""
        parted = []
        for part, x in zip(self.parts, room.parts, strict=True):
            assert part.trial is not None
            part.trial.channels = x.abs().amax(dim=0).topk(min(APART, part.columns)).indices.sort().values
            parted.append(part._replace(apart=take_apart(part.trial.channels, part.columns)))
        self._told("forward", self._product_in_eight(room, None), exact)
        self._told("apart", Wide(tuple(parted))._product_in_eight(room, None), exact)

    def _told(self, what: str, found: Tensor, exact: Tensor) -> None:
        """Writes an error into the trial of each part: they are computed together."""
        exact, tiny = exact.float(), torch.finfo(torch.float32).tiny
        said = exact if what == "backward" else exact - exact.mean(dim=0)
        error = torch.linalg.vector_norm(found.float() - exact) / torch.linalg.vector_norm(said).clamp_min(tiny)
        for part in self.parts:
            setattr(part.trial, what, error)

    def _spans(self, of: Sequence[X], seeds: Sequence[int]) -> list[tuple[Frozen, X, int, int]]:
        """(part, its own of these, the first of its columns beside the input, its seed)."""
        columns = accumulate((part.rank for part in self.parts[:-1]), initial=0)
        return list(zip(self.parts, of, columns, seeds, strict=True))


def turned_codes(codes: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (K, N) as backward multiplies with them, absmax (N,)), written anew."""
    weight, absmax = codes(like)
    turned = weight.new_empty(weight.shape[::-1], dtype=eight.gradient_type(like.device))
    eight.transpose_into(weight, turned)
    return turned, absmax


def _with_channels(beside: eight.Beside | None, x: Tensor, weight: Tensor, absmax: Tensor, own: Apart) -> eight.Beside:
    """The channels that are apart as further columns of a thin product; x (M, K), weight (N, K) int8."""
    t = x.index_select(1, own.channels)
    b = (weight.index_select(1, own.channels) * (absmax / INT8_LEVELS)[:, None]).to(x.dtype)
    if beside is None:
        return eight.Beside(t, b)
    return eight.Beside(torch.cat([beside.t, t], dim=1), torch.cat([beside.b, b], dim=1))


def _add_low_rank_(dx: Tensor, dinner: Tensor, part: Frozen, seed: int) -> None:
    """What the pairs of a part add to the gradient to its input (M, K_i); dinner is (M, sum of r)."""
    if part.dropout:
        dx += _mask(dx, part.dropout, seed).mul_(dinner @ stacked(part.pairs, dx))
    else:
        dx.addmm_(dinner, stacked(part.pairs, dx))


def _dropped(part: Frozen, x: Tensor, seed: int) -> Tensor:
    """(M, K_i): what the pairs of a part read of its input."""
    return x * _mask(x, part.dropout, seed) if part.dropout else x


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Of the shape of x: zero with the probability `dropout`, else 1 / (1 - dropout)."""
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    kept = 1 - dropout
    return x.new_empty(x.shape).bernoulli_(kept, generator=generator).div_(kept)
