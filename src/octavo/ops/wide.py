"""Frozen matrices side by side as one product, their low-rank pairs and bias as further columns.

    y = x_1 W_1^T + x_2 W_2^T + .. + low-rank terms + bias
      = [x_1 | x_2 | .. | s x A^T | 1] [W_1 | W_2 | .. | B | bias]^T

So a card sees one product instead of one for each matrix, each pair and the bias, and none of the passes over y
that adding them one by one would take. In backward the gradient to s x A^T comes out of the same product as the
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

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops import eight
from octavo.ops.frozen import APART, Apart, Frozen, Trial, take_apart
from octavo.ops.quantize import INT8_LEVELS

ALIGNMENT = 8  # numbers; 16 bytes of a 2-byte type, what tensor cores' loads need of a row's start


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
        """Every B into its rows and columns of the last C columns (N, C)."""
        column = 0
        for part in self.parts:
            for pair in part.pairs:
                added[pair.start : pair.stop, column : column + pair.a.shape[0]].copy_(pair.b)
                column += pair.a.shape[0]

    def room(self, rows: int, like: Tensor) -> Tensor:
        """(M, K + C) for the input: the caller writes the first K columns, then calls `complete_`."""
        return like.new_empty(rows, self.width)

    def seeds(self) -> list[int]:
        """A seed of the dropout mask of each part, drawn on the host: backward makes the same masks again."""
        return [int(torch.randint(2**62, ())) if part.dropout else 0 for part in self.parts]

    def complete_(self, wide: Tensor, seeds: Sequence[int]) -> None:
        """Writes the last C columns of an input whose first K are there."""
        for part, start, column, seed in self._spans(seeds):
            if part.rank:
                inner = wide[:, column : column + part.rank]
                torch.mm(_dropped(part, wide, start, seed), _scaled(part, wide).T, out=inner)
        if self.width > self.inputs + self.rank:
            wide[:, self.inputs + self.rank :].copy_(_one(self.width - self.inputs - self.rank, wide))

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

    def _to_input_in_eight(self, dy: Tensor, dinner: Tensor, wide: Tensor, seeds: Sequence[int]) -> Tensor:
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
            beside = eight.Beside(own, _scaled(part, dy).T.contiguous()) if joins else None
            own_dx = dx[:, start : start + part.columns]
            gradient = eight.coded(dy, kind, fold=absmax, spans=kind == torch.int8)
            eight.product_into(*gradient, turned, own_dx, beside=beside)
            if part.rank and part.dropout:
                _add_low_rank_(own_dx, own, part, wide, seed)
        return dx

    def backward(
        self, dy: Tensor, wide: Tensor, seeds: Sequence[int], *, to_input: bool, matrix: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(gradient to the input (M, K) if asked for, gradients of `trained`), from dy (M, N)."""
        dx, dinner = self._gradients(dy, wide, seeds, to_input, matrix)
        factors: list[Tensor | None] = []
        added = None
        if self.rank or any(tensor.requires_grad for tensor in self.trained):
            added = mm_float32(dy.T, wide[:, self.inputs :])  # (N, C): every B, and the bias
        for part, start, column, seed in self._spans(seeds):
            if not part.rank:
                continue
            assert added is not None
            own = dinner[:, column - self.inputs : column - self.inputs + part.rank]
            da = mm_float32(own.T, _dropped(part, wide, start, seed))  # (sum of r, K_i)
            at = 0
            for pair in part.pairs:
                r = pair.a.shape[0]
                factors.append((da[at : at + r] * pair.scaling).to(pair.a.dtype))
                inside = column - self.inputs + at
                factors.append(added[pair.start : pair.stop, inside : inside + r].to(pair.b.dtype))
                at += r
        biases: list[Tensor | None] = []
        for part in self.parts:
            if part.bias is not None:
                span = slice(part.bias_start, part.bias_start + part.bias.numel())
                biases.append(
                    added[span, self.rank].to(part.bias.dtype)
                    if added is not None and part.bias.requires_grad
                    else None
                )
        return dx, factors + biases

    def _gradients(
        self, dy: Tensor, wide: Tensor, seeds: Sequence[int], to_input: bool, matrix: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """(gradient to the input (M, K) if asked for, gradient to the last C columns of it (M, C))."""
        if not to_input:
            return None, dy @ self.beside(dy) if self.rank else dy
        if self.in_eight:
            dinner = dy @ self.beside(dy)
            dx = self._to_input_in_eight(dy, dinner, wide, seeds)
        else:
            dwide = dy @ (self.matrix(wide) if matrix is None else matrix)  # (M, K + C)
            dx, dinner = dwide[:, : self.inputs], dwide[:, self.inputs :]
            for part, start, column, seed in self._spans(seeds):
                if part.rank:
                    own = dinner[:, column - self.inputs : column - self.inputs + part.rank]
                    _add_low_rank_(dx[:, start : start + part.columns], own, part, wide, seed)
        if self.trial is not None:
            self._told("backward", self._to_input_in_eight(dy, dinner, wide, seeds), dx)
        return dx, dinner

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


def _add_low_rank_(dx: Tensor, dinner: Tensor, part: Frozen, wide: Tensor, seed: int) -> None:
    """What the pairs of a part add to the gradient to its input (M, K_i); dinner is (M, sum of r)."""
    if part.dropout:
        dx += _mask(part, wide, seed).mul_(dinner @ _scaled(part, wide))
    else:
        dx.addmm_(dinner, _scaled(part, wide))


def _scaled(part: Frozen, like: Tensor) -> Tensor:
    """(sum of r, K_i): all A of a part, times their scaling, in the compute type."""
    return torch.cat([pair.a.detach() * pair.scaling for pair in part.pairs]).to(like.dtype)


def _dropped(part: Frozen, wide: Tensor, start: int, seed: int) -> Tensor:
    """(M, K_i): what the pairs of a part read."""
    x = wide[:, start : start + part.columns]
    return x * _mask(part, wide, seed) if part.dropout else x


def _mask(part: Frozen, wide: Tensor, seed: int) -> Tensor:
    """(M, K_i): zero with the probability `dropout`, else 1 / (1 - dropout)."""
    generator = None if wide.is_meta else torch.Generator(wide.device).manual_seed(seed)
    kept = 1 - part.dropout
    return wide.new_empty(len(wide), part.columns).bernoulli_(kept, generator=generator).div_(kept)


def _one(width: int, like: Tensor) -> Tensor:
    """(width,): a one, then zeros."""
    one = like.new_zeros(width)
    one[:1].fill_(1)  # as a kernel: an item set from the host could not be in a CUDA graph
    return one
