"""Frozen matrices side by side as one product, their low-rank pairs and bias as further columns.

    y = x_1 W_1^T + x_2 W_2^T + .. + low-rank terms + bias
      = [x_1 | x_2 | .. | x A^T | 1] [W_1 | W_2 | .. | s B | bias]^T      (s goes to A if it is under 1)

So a card sees one product instead of one for each matrix, each pair and the bias, and none of the passes over y
that adding them one by one would take. In backward the gradient to x A^T comes out of the same product as the
gradient to x, and one thin product gives the gradients of every B and of the bias.

The wide matrix is written from the quantised parts for each use and never kept. Or nothing is written: parts that ask
for it are multiplied in 8 bits as they are stored (ops/matmul8.py), the further columns by a thin product beside that.

Legend: M rows of input; part i is a frozen linear (N, K_i); K the sum of the K_i; C the added columns (the ranks of
all pairs, a one for the bias), rounded up so that rows start where a card reads best; a pair is A (r, K_i), B (n, r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.layers.gemm_input import GemmInput
from octavo.ops import matmul8
from octavo.ops.linear import LoraSlice, mm_float32
from octavo.ops.linear_spec import OUTLIERS, LinearSpec, Outliers, QuantErrorProbe, split_outliers
from octavo.ops.lora_backward import LoraGrads
from octavo.ops.lora_factors import pack_b_into, stack_a
from octavo.ops.quantize import INT8_LEVELS

X = TypeVar("X")
ALIGNMENT = 8  # numbers; 16 bytes of a 2-byte type, what tensor cores' loads need of a row's start


class EarlyGrads(NamedTuple):
    """What the pairs on the rows from `start` on have learnt already, in an activation's backward."""

    start: int
    learnt: LoraGrads


@dataclass(frozen=True)
class FusedLinear:
    """The product of `parts`, all of the same N."""

    parts: tuple[LinearSpec, ...]

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
        factors = [tensor for pair in self.lora for tensor in (pair.a, pair.b)]
        return factors + [part.bias for part in self.parts if part.bias is not None]

    def matrix(self, like: Tensor) -> Tensor:
        """(N, K + C) in the type and on the device of `like`, written anew."""
        wide = like.new_empty(self.parts[0].rows, self.width)
        pack_b_into(wide[:, self.inputs :], self.lora)
        start = 0
        for part in self.parts:
            part.fill(wide[:, start : start + part.columns])
            start += part.columns
            if part.bias is not None:
                wide[part.bias_start : part.bias_start + part.bias.numel(), self.inputs + self.rank] += part.bias
        return wide

    @cached_property
    def use_8bit(self) -> bool:
        """Whether the product is in 8 bits; with a trial it is exact, and both are compared."""
        return self.probe is None and all(part.int8_weight is not None for part in self.parts)

    @property
    def probe(self) -> QuantErrorProbe | None:
        return self.parts[0].probe if all(part.int8_weight is not None for part in self.parts) else None

    def extra(self, like: Tensor) -> Tensor:
        """(N, C) in the type of `like`: the last C columns of `matrix`, without the bias."""
        b = like.new_empty(self.parts[0].rows, self.width - self.inputs)
        pack_b_into(b, self.lora)
        return b

    @cached_property
    def lora(self) -> list[LoraSlice]:
        """Of all parts, in the order of their columns."""
        return [pair for part in self.parts for pair in part.lora]

    def gemm_input(self, rows: int, like: Tensor) -> GemmInput:
        """For an input of so many rows: the caller adds the parts, then calls `complete_`."""
        columns = [part.columns for part in self.parts]
        return GemmInput(columns, self.width - self.inputs, rows, like, joined=not self.use_8bit)

    def dropout_seeds(self) -> list[int]:
        """A seed of the dropout mask of each part, drawn on the host: backward makes the same masks again."""
        return [int(torch.randint(2**62, ())) if part.dropout else 0 for part in self.parts]

    def complete_(self, gemm_input: GemmInput, dropout_seeds: Sequence[int]) -> None:
        """Writes the columns beside the parts."""
        for part, x, column, seed in self._spans(gemm_input.parts, dropout_seeds):
            if part.rank:
                inner = gemm_input.extra[:, column : column + part.rank]
                torch.mm(_dropped(part, x, seed), stack_a(part.lora, x).T, out=inner)
        if gemm_input.extra.shape[1] > self.rank:
            gemm_input.extra[:, self.rank :].zero_()
            gemm_input.extra[:, self.rank].fill_(1)

    def product(self, gemm_input: GemmInput, *, residual: Tensor | None = None) -> Tensor:
        """(M, N) of a completed input; added to `residual` (M, N) if given, which stays as it is."""
        if self.use_8bit:
            return self._matmul_8bit(gemm_input, residual)
        matrix = self.matrix(gemm_input.whole)
        if self.probe is not None:
            self._try_forward(gemm_input, F.linear(gemm_input.whole, matrix))
        return (
            F.linear(gemm_input.whole, matrix)
            if residual is None
            else torch.addmm(residual, gemm_input.whole, matrix.T)
        )

    def _matmul_8bit(self, gemm_input: GemmInput, residual: Tensor | None) -> Tensor:
        like = gemm_input.extra
        out = like.new_empty(len(like), self.parts[0].rows)
        extra = None
        if self.rank:
            extra = matmul8.LowRankTerm(gemm_input.extra[:, : self.rank], self.extra(like)[:, : self.rank])
        for part, x in zip(self.parts, gemm_input.parts, strict=True):
            assert part.int8_weight is not None
            others, (weight, absmax) = None, part.int8_weight(x)
            if part.outliers is not None:
                extra, others = _with_channels(extra, x, weight, absmax, part.outliers), part.outliers.others
            quantized = matmul8.quantize_rows(x, torch.int8, prescale=others)
            matmul8.matmul_8bit_into(*quantized, weight, out, absmax, part.bias, part.bias_start, extra, residual)
            residual, extra = out, None
        return out

    def backward(
        self,
        dy: Tensor,
        gemm_input: GemmInput,
        dropout_seeds: Sequence[int],
        *,
        grad_input: bool,
        matrix: Tensor | None = None,
    ) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        """(gradients to the parts of the input (M, K_i) if asked for, gradients of `trained`), from dy (M, N)."""
        dx, dt = self.grad_input(dy, dropout_seeds, matrix) if grad_input else (None, self.grad_t(dy))
        return dx, self.grad_trained(dy, gemm_input.parts, gemm_input.extra, dt, dropout_seeds)

    def grad_t(self, dy: Tensor, known: EarlyGrads | None = None) -> Tensor:
        """The gradient to the columns beside the input (M, C)."""
        if known is None or known.learnt.t is None:
            return dy @ self.extra(dy)
        dt = dy.new_zeros(len(dy), self.width - self.inputs)
        column = self.rank - known.learnt.t.shape[1]
        if column:
            torch.mm(dy[:, : known.start], self.extra(dy)[: known.start, :column], out=dt[:, :column])
        dt[:, column : self.rank] = known.learnt.t
        return dt

    def grad_input(
        self, dy: Tensor, dropout_seeds: Sequence[int], matrix: Tensor | None = None, known: EarlyGrads | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients to the parts of the input (M, K_i) and to the columns beside them (M, C).

        `matrix` is the one that `matrix(dy)` would write, if it is at hand.
        """
        if self.use_8bit:
            dt = self.grad_t(dy, known)
            return self._grad_input_8bit(dy, dt, dropout_seeds), dt
        dwide = dy @ (self.matrix(dy) if matrix is None else matrix)  # (M, K + C)
        *dx, dt = dwide.split([*(part.columns for part in self.parts), self.width - self.inputs], dim=1)
        for part, own, column, seed in self._spans(dx, dropout_seeds):
            if part.rank:
                _add_low_rank_(own, dt[:, column : column + part.rank], part, seed)
        if self.probe is not None:
            found = self._grad_input_8bit(dy, dt, dropout_seeds)
            self._told("backward", torch.cat(found, dim=1), dwide[:, : self.inputs])
        return dx, dt

    def _grad_input_8bit(self, dy: Tensor, dt: Tensor, dropout_seeds: Sequence[int]) -> list[Tensor]:
        dx = [dy.new_empty(len(dy), part.columns) for part in self.parts]
        kind = matmul8.gradient_type(dy.device)
        for part, own_dx, column, seed in self._spans(dx, dropout_seeds):
            assert part.int8_weight is not None
            transposed, absmax = part.transposed or transposed_weight(part.int8_weight, dy)
            own = dt[:, column : column + part.rank]
            joins = part.rank and not part.dropout  # a mask on what pairs read cannot join in the kernel
            extra = matmul8.LowRankTerm(own, stack_a(part.lora, dy, transposed=True)) if joins else None
            gradient = matmul8.quantize_rows(dy, kind, prescale=absmax, groups=kind == torch.int8)
            matmul8.matmul_8bit_into(*gradient, transposed, own_dx, low_rank=extra)
            if part.rank and part.dropout:
                _add_low_rank_(own_dx, own, part, seed)
        return dx

    def grad_trained(
        self,
        dy: Tensor,
        x: Sequence[Tensor | LoraGrads],
        inner: Tensor,
        dt: Tensor,
        dropout_seeds: Sequence[int],
        known: EarlyGrads | None = None,
    ) -> list[Tensor | None]:
        """Gradients of `trained`: from the parts of the input (M, K_i), or what was learnt of them, the columns beside
        these and the gradient to them, both (M, C)."""
        if not self.rank and not any(tensor.requires_grad for tensor in self.trained):
            return [None] * len(self.trained)
        rows = dy.shape[1] if known is None else known.start
        added = mm_float32(dy[:, :rows].T, inner)  # (N, C): every B, and the bias
        self._scale_(added)
        factors: list[Tensor | None] = []
        for part, own_x, column, seed in self._spans(x, dropout_seeds):
            if not part.rank:
                continue
            if isinstance(own_x, LoraGrads):
                da = own_x.a
            else:
                da = mm_float32(dt[:, column : column + part.rank].T, _dropped(part, own_x, seed))
            for pair, own in zip(part.lora, da.split([len(pair.a) for pair in part.lora]), strict=True):
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
        for scaling, run in groupby(self.lora, lambda pair: pair.on_b):
            width = sum(len(pair.a) for pair in run)
            if scaling != 1:
                added[:, column : column + width] *= scaling
            column += width

    def _try_forward(self, gemm_input: GemmInput, exact: Tensor) -> None:
        """Writes what 8 bits cost into the trial of each part, without and with channels apart."""
        parted = []
        for part, x in zip(self.parts, gemm_input.parts, strict=True):
            assert part.probe is not None
            part.probe.channels = x.abs().amax(dim=0).topk(min(OUTLIERS, part.columns)).indices.sort().values
            parted.append(part._replace(outliers=split_outliers(part.probe.channels, part.columns)))
        self._told("forward", self._matmul_8bit(gemm_input, None), exact)
        self._told("outliers", FusedLinear(tuple(parted))._matmul_8bit(gemm_input, None), exact)

    def _told(self, what: str, found: Tensor, exact: Tensor) -> None:
        """Writes an error into the trial of each part: they are computed together."""
        exact, tiny = exact.float(), torch.finfo(torch.float32).tiny
        said = exact if what == "backward" else exact - exact.mean(dim=0)
        error = torch.linalg.vector_norm(found.float() - exact) / torch.linalg.vector_norm(said).clamp_min(tiny)
        for part in self.parts:
            setattr(part.probe, what, error)

    def _spans(self, of: Sequence[X], dropout_seeds: Sequence[int]) -> list[tuple[LinearSpec, X, int, int]]:
        """(part, its own of these, the first of its columns beside the input, its seed)."""
        columns = accumulate((part.rank for part in self.parts[:-1]), initial=0)
        return list(zip(self.parts, of, columns, dropout_seeds, strict=True))


def fused_linear(x: Tensor, linear: FusedLinear, residual: Tensor | None = None) -> Tensor:
    """x (.., K) through a linear of one part, plus `residual` (.., N) if given: (.., N). Saves x and x A^T."""
    y: Tensor = _FusedLinear.apply(x, residual, linear, *linear.trained)  # type: ignore[no-untyped-call]
    return y


class _FusedLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T + bias + residual; with t = x A^T and dt = s dy B:

    dx = dy W + dt A        dA = dt^T x        dB = s dy^T t        dbias = sum of dy        dresidual = dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, linear: FusedLinear, *trained: Tensor) -> Tensor:
        rows, dropout_seeds = x.reshape(-1, x.shape[-1]), linear.dropout_seeds()  # (M, K)
        gemm_input = linear.gemm_input(len(rows), rows)
        gemm_input.put(rows)
        linear.complete_(gemm_input, dropout_seeds)
        y = linear.product(gemm_input, residual=None if residual is None else residual.reshape(len(rows), -1))  # (M, N)
        ctx.save_for_backward(x, gemm_input.detach_extra())
        ctx.linear, ctx.dropout_seeds, ctx.has_residual = linear, dropout_seeds, residual is not None
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        linear, dropout_seeds, (x, extra) = ctx.linear, ctx.dropout_seeds, ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])  # (M, N)
        dx = None
        if ctx.needs_input_grad[0]:
            (dx,), dt = linear.grad_input(dy, dropout_seeds)
            dx = dx.view(x.shape)
        else:
            dt = linear.grad_t(dy)
        gradients = linear.grad_trained(dy, [x.reshape(len(dy), -1)], extra, dt, dropout_seeds)
        return dx, grad if ctx.has_residual else None, None, *gradients


def transposed_weight(int8_weight: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (K, N) as backward multiplies with them, absmax (N,)), written anew."""
    weight, absmax = int8_weight(like)
    transposed = weight.new_empty(weight.shape[::-1], dtype=matmul8.gradient_type(like.device))
    matmul8.transpose_into(weight, transposed)
    return transposed, absmax


def _with_channels(
    extra: matmul8.LowRankTerm | None, x: Tensor, weight: Tensor, absmax: Tensor, own: Outliers
) -> matmul8.LowRankTerm:
    """The channels that are apart as further columns of a thin product; x (M, K), weight (N, K) int8."""
    t = x.index_select(1, own.channels)
    b = (weight.index_select(1, own.channels) * (absmax / INT8_LEVELS)[:, None]).to(x.dtype)
    if extra is None:
        return matmul8.LowRankTerm(t, b)
    return matmul8.LowRankTerm(torch.cat([extra.t, t], dim=1), torch.cat([extra.b, b], dim=1))


def _add_low_rank_(dx: Tensor, dt: Tensor, part: LinearSpec, seed: int) -> None:
    """What the pairs of a part add to the gradient to its input (M, K_i); dt is (M, sum of r)."""
    if part.dropout:
        dx += _mask(dx, part.dropout, seed).mul_(dt @ stack_a(part.lora, dx))
    else:
        dx.addmm_(dt, stack_a(part.lora, dx))


def _dropped(part: LinearSpec, x: Tensor, seed: int) -> Tensor:
    """(M, K_i): what the pairs of a part read of its input."""
    return x * _mask(x, part.dropout, seed) if part.dropout else x


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Of the shape of x: zero with the probability `dropout`, else 1 / (1 - dropout)."""
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    kept = 1 - dropout
    return x.new_empty(x.shape).bernoulli_(kept, generator=generator).div_(kept)
