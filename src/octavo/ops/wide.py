"""Frozen matrices side by side as one product, their low-rank pairs and bias as further columns.

    y = x_1 W_1^T + x_2 W_2^T + .. + low-rank terms + bias
      = [x_1 | x_2 | .. | x A^T | 1] [W_1 | W_2 | .. | s B | bias]^T

So a card sees one product instead of one for each matrix, each pair and the bias, and none of the passes over y
that adding them one by one would take. In backward the gradient to x A^T comes out of the same product as the
gradient to x, and one thin product gives the gradients of every B and of the bias.

The wide matrix is written from the quantised parts for each use and never kept. Or nothing is written: parts that ask
for it are multiplied in 8 bits as they are stored (ops/eight.py), the further columns by a thin product beside that.

Legend: M rows of input; part i is a frozen linear (N, K_i); K the sum of the K_i; C the added columns (the ranks of
all pairs, a one for the bias), rounded up so that rows start where a card reads best; a pair is A (r, K_i), B (n, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops import eight
from octavo.ops.frozen import APART, Apart, Frozen, Trial, take_apart
from octavo.ops.quantize import INT8_LEVELS

ALIGNMENT = 8  # numbers; 16 bytes of a 2-byte type, what tensor cores' loads need of a row's start
PITCH = 64  # numbers from row to row of an input on a card: a multiple of these, so that none begins within 128 bytes


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
        factors = [tensor for part in self.parts for pair in part.pairs for tensor in (pair.a, pair.b)]
        return factors + [part.bias for part in self.parts if part.bias is not None]

    def matrix(self, like: Tensor) -> Tensor:
        """(N, K + C) in the type and on the device of `like`, written anew."""
        wide = like.new_empty(self.parts[0].rows, self.width)
        if self.width > self.inputs:
            wide[:, self.inputs :].zero_()
        self._write_pairs_(wide[:, self.inputs :])
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
        b = like.new_zeros(self.parts[0].rows, self.width - self.inputs)
        self._write_pairs_(b)
        return b

    def _write_pairs_(self, added: Tensor) -> None:
        """Every B times its scaling into its rows and columns of the last C columns (N, C)."""
        column = 0
        for part in self.parts:
            for pair in part.pairs:
                own = added[pair.start : pair.stop, column : column + pair.a.shape[0]]
                torch.mul(pair.b, pair.scaling, out=own)
                column += pair.a.shape[0]

    def room(self, rows: int, like: Tensor) -> Tensor:
        """(M, K + C) for the input: the caller writes the first K columns, then calls `complete_`."""
        pitch = self.width if like.is_cpu else -(-self.width // PITCH) * PITCH
        return like.new_empty(rows, pitch)[:, : self.width]

    def seeds(self) -> list[int]:
        """A seed of the dropout mask of each part, drawn on the host: backward makes the same masks again."""
        return [int(torch.randint(2**62, ())) if part.dropout else 0 for part in self.parts]

    def complete_(self, wide: Tensor, seeds: Sequence[int]) -> None:
        """Writes the last C columns of an input whose first K are there."""
        for part, start, column, seed in self._spans(seeds):
            if part.rank:
                inner = wide[:, column : column + part.rank]
                torch.mm(_dropped(part, wide[:, start : start + part.columns], seed), _stacked(part, wide).T, out=inner)
        if self.width > self.inputs + self.rank:
            wide[:, self.inputs + self.rank :].zero_()
            wide[:, self.inputs + self.rank].fill_(1)

    def inner(self, wide: Tensor) -> Tensor:
        """(M, C): a copy of what `complete_` wrote, a hundredth of what it was computed from."""
        return wide[:, self.inputs :].clone()

    def product(self, wide: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """(M, N) of a completed input (M, K + C); added to `onto` (M, N) if given, which stays as it is."""
        if self.in_eight:
            return self._product_in_eight(wide, onto)
        matrix = self.matrix(wide)
        if self.trial is not None:
            self._try_forward(wide, F.linear(wide, matrix))
        return F.linear(wide, matrix) if onto is None else torch.addmm(onto, wide, matrix.T)

    def _product_in_eight(self, wide: Tensor, onto: Tensor | None) -> Tensor:
        out = wide.new_empty(len(wide), self.parts[0].rows)
        beside = None
        if self.rank:
            beside = eight.Beside(wide[:, self.inputs : self.inputs + self.rank], self.beside(wide)[:, : self.rank])
        for part, start, _, _ in self._spans((0,) * len(self.parts)):
            assert part.codes is not None
            own, (weight, absmax) = wide[:, start : start + part.columns], part.codes(wide)
            others = None
            if part.apart is not None:
                beside, others = _with_channels(beside, own, weight, absmax, part.apart), part.apart.others
            coded = eight.coded(own, torch.int8, fold=others)
            eight.product_into(*coded, weight, out, absmax, part.bias, part.bias_start, beside, onto)
            onto, beside = out, None
        return out

    def backward(
        self, dy: Tensor, wide: Tensor, seeds: Sequence[int], *, to_input: bool, matrix: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(gradient to the input (M, K) if asked for, gradients of `trained`), from dy (M, N)."""
        dx, dinner = self.to_input(dy, seeds, matrix) if to_input else (None, self.to_added(dy))
        return dx, self.to_trained(dy, wide[:, : self.inputs], wide[:, self.inputs :], dinner, seeds)

    def to_added(self, dy: Tensor) -> Tensor:
        """The gradient to the last C columns of the input (M, C)."""
        return dy @ self.beside(dy)

    def to_input(self, dy: Tensor, seeds: Sequence[int], matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradients to the input (M, K) and to its last C columns (M, C); `matrix` is that of `dy` if given."""
        if self.in_eight:
            dinner = self.to_added(dy)
            return self._to_input_in_eight(dy, dinner, seeds), dinner
        dwide = dy @ (self.matrix(dy) if matrix is None else matrix)  # (M, K + C)
        dx, dinner = dwide[:, : self.inputs], dwide[:, self.inputs :]
        for part, start, column, seed in self._spans(seeds):
            if part.rank:
                own = dinner[:, column - self.inputs : column - self.inputs + part.rank]
                _add_low_rank_(dx[:, start : start + part.columns], own, part, seed)
        if self.trial is not None:
            self._told("backward", self._to_input_in_eight(dy, dinner, seeds), dx)
        return dx, dinner

    def _to_input_in_eight(self, dy: Tensor, dinner: Tensor, seeds: Sequence[int]) -> Tensor:
        """The gradient to the input (M, K)."""
        dx = dy.new_empty(len(dy), self.inputs)
        kind = eight.gradient_type(dy.device)
        for part, start, column, seed in self._spans(seeds):
            assert part.codes is not None
            weight, absmax = part.codes(dy)
            turned = dy.new_empty(part.columns, part.rows, dtype=kind)
            eight.transpose_into(weight, turned)
            del weight
            own = dinner[:, column - self.inputs : column - self.inputs + part.rank]
            joins = part.rank and not part.dropout  # a mask on what pairs read cannot join in the kernel
            beside = eight.Beside(own, _stacked(part, dy, turned=True)) if joins else None
            own_dx = dx[:, start : start + part.columns]
            gradient = eight.coded(dy, kind, fold=absmax, spans=kind == torch.int8)
            eight.product_into(*gradient, turned, own_dx, beside=beside)
            if part.rank and part.dropout:
                _add_low_rank_(own_dx, own, part, seed)
        return dx

    def to_trained(
        self, dy: Tensor, x: Tensor, inner: Tensor, dinner: Tensor, seeds: Sequence[int]
    ) -> list[Tensor | None]:
        """Gradients of `trained`: from the input x (M, K), its last C columns, and the gradient to these (M, C)."""
        if not self.rank and not any(tensor.requires_grad for tensor in self.trained):
            return [None] * len(self.trained)
        added = mm_float32(dy.T, inner)  # (N, C): every B, and the bias
        self._scale_(added)
        factors: list[Tensor | None] = []
        for part, start, column, seed in self._spans(seeds):
            if not part.rank:
                continue
            at = column - self.inputs
            da = mm_float32(dinner[:, at : at + part.rank].T, _dropped(part, x[:, start : start + part.columns], seed))
            for pair, own in zip(part.pairs, da.split([len(pair.a) for pair in part.pairs]), strict=True):
                factors.append(own.to(pair.a.dtype))
                factors.append(added[pair.start : pair.stop, at : at + len(own)].to(pair.b.dtype))
                at += len(own)
        biases: list[Tensor | None] = []
        for part in self.parts:
            if part.bias is not None:
                own = added[part.bias_start : part.bias_start + part.bias.numel(), self.rank]
                biases.append(own.to(part.bias.dtype) if part.bias.requires_grad else None)
        return factors + biases

    def _scale_(self, added: Tensor) -> None:
        """The gradients of every B (N, C) times its scaling: one pass where all have the same."""
        column = 0
        for scaling, run in groupby((pair for part in self.parts for pair in part.pairs), lambda pair: pair.scaling):
            width = sum(len(pair.a) for pair in run)
            added[:, column : column + width] *= scaling
            column += width

    def _try_forward(self, wide: Tensor, exact: Tensor) -> None:
        """Writes what 8 bits cost into the trial of each part, without and with channels apart."""
        parted = []
        for part, start, _, _ in self._spans((0,) * len(self.parts)):
            assert part.trial is not None
            own = wide[:, start : start + part.columns]
            part.trial.channels = own.abs().amax(dim=0).topk(min(APART, part.columns)).indices.sort().values
            parted.append(part._replace(apart=take_apart(part.trial.channels, part.columns)))
        self._told("forward", self._product_in_eight(wide, None), exact)
        self._told("apart", Wide(tuple(parted))._product_in_eight(wide, None), exact)

    def _told(self, what: str, found: Tensor, exact: Tensor) -> None:
        """Writes an error into the trial of each part: they are computed together."""
        exact, tiny = exact.float(), torch.finfo(torch.float32).tiny
        said = exact if what == "backward" else exact - exact.mean(dim=0)
        error = torch.linalg.vector_norm(found.float() - exact) / torch.linalg.vector_norm(said).clamp_min(tiny)
        for part in self.parts:
            setattr(part.trial, what, error)

    def _spans(self, seeds: Sequence[int]) -> list[tuple[Frozen, int, int, int]]:
        """(part, its first column, the first of its added columns, its seed)."""
        found, start, column = [], 0, self.inputs
        for part, seed in zip(self.parts, seeds, strict=True):
            found.append((part, start, column, seed))
            start, column = start + part.columns, column + part.rank
        return found


def _with_channels(beside: eight.Beside | None, x: Tensor, weight: Tensor, absmax: Tensor, own: Apart) -> eight.Beside:
    """The channels that are apart as further columns of a thin product; x (M, K), weight (N, K) int8."""
    t = x.index_select(1, own.channels)
    b = (weight.index_select(1, own.channels) * (absmax / INT8_LEVELS)[:, None]).to(x.dtype)
    if beside is None:
        return eight.Beside(t, b)
    return eight.Beside(torch.cat([beside.t, t], dim=1), torch.cat([beside.b, b], dim=1))


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two short types, kept in float32."""
    if a.is_meta:
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def _add_low_rank_(dx: Tensor, dinner: Tensor, part: Frozen, seed: int) -> None:
    """What the pairs of a part add to the gradient to its input (M, K_i); dinner is (M, sum of r)."""
    if part.dropout:
        dx += _mask(dx, part.dropout, seed).mul_(dinner @ _stacked(part, dx))
    else:
        dx.addmm_(dinner, _stacked(part, dx))


def _stacked(part: Frozen, like: Tensor, *, turned: bool = False) -> Tensor:
    """(sum of r, K_i): all A of a part in the compute type; `turned` is (K_i, sum of r)."""
    each = [pair.a.detach() for pair in part.pairs]
    a = each[0] if len(each) == 1 else torch.cat(each)
    return (a.T if turned else a).to(like.dtype, memory_format=torch.contiguous_format)


def _dropped(part: Frozen, x: Tensor, seed: int) -> Tensor:
    """(M, K_i): what the pairs of a part read of its input."""
    return x * _mask(x, part.dropout, seed) if part.dropout else x


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Of the shape of x: zero with the probability `dropout`, else 1 / (1 - dropout)."""
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    kept = 1 - dropout
    return x.new_empty(x.shape).bernoulli_(kept, generator=generator).div_(kept)
