"""Frozen linears whose weights stand next to each other as one matmul, with LoRA and bias as further columns.

    y = x_1 W_1^T + x_2 W_2^T + .. + LoRA + bias
      = [x_1 | x_2 | .. | x A^T | 1] [W_1 | W_2 | .. | s B | bias]^T      (if s < 1, A is scaled instead of B)

A GPU runs one matmul instead of one for each weight, each adapter and the bias, and y is written once. In backward the
matmul that gives dL/dx also gives dL/dt for t = x A^T, and one low-rank matmul gives the gradients of every B and of
the bias.

The joined matrix is dequantized for each use and not kept. Linears in 8 bits are multiplied without it, as they are
stored (ops/matmul8.py); their LoRA activations are a low-rank term of that matmul.

Legend: M rows of input; part i is a frozen linear with weight (N, K_i); K the sum of the K_i; C the extra columns (the
ranks of all LoRA, a one for the bias), rounded up to ALIGNMENT; LoRA of a part is A (r, K_i), B (n, r).
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

from octavo.layers.dropout import Dropout, Seed, mask
from octavo.layers.gemm_input import GemmInput
from octavo.ops import matmul8
from octavo.ops.linear import LoraSlice, mm_float32
from octavo.ops.linear_spec import OUTLIERS, LinearSpec, Matmul8, Outliers, QuantErrorProbe, split_outliers
from octavo.ops.lora_backward import LoraGrads
from octavo.ops.lora_factors import pack_b_into, stack_a
from octavo.ops.quantize import INT8_LEVELS

X = TypeVar("X")
Seeds = Sequence[Seed | None]  # of the dropout masks of the parts; None for a part without dropout
ALIGNMENT = 8  # values; 16 bytes of a 2-byte dtype, the alignment of rows that tensor-core loads need


class EarlyGrads(NamedTuple):
    """The LoRA gradients of the rows from `start` on, which an activation's backward has computed already."""

    start: int
    grads: LoraGrads


@dataclass(frozen=True)
class FusedLinear:
    """The matmul of `parts`, all of the same N."""

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
        extra = self.rank + any(part.bias is not None for part in self.parts)
        return self.inputs + -(-extra // ALIGNMENT) * ALIGNMENT

    @property
    def trained(self) -> list[Tensor]:
        """The tensors with a gradient, in the order of `backward`: A, B of each LoRA; then biases."""
        factors = [tensor for pair in self.lora for tensor in (pair.a, pair.b)]
        return factors + [part.bias for part in self.parts if part.bias is not None]

    def matrix(self, like: Tensor) -> Tensor:
        """(N, K + C) in the dtype and on the device of `like`, dequantized anew."""
        matrix = like.new_empty(self.parts[0].rows, self.width)  # (N, K + C)
        pack_b_into(matrix[:, self.inputs :], self.lora)
        start = 0
        for part in self.parts:
            part.fill(matrix[:, start : start + part.columns])
            start += part.columns
            if part.bias is not None:
                matrix[part.bias_start : part.bias_start + part.bias.numel(), self.inputs + self.rank] += part.bias
        return matrix

    @cached_property
    def use_8bit(self) -> bool:
        """Whether the matmul is in 8 bits. With a probe it is exact, and both are compared."""
        return self.probe is None and all(part.matmul8 is not None for part in self.parts)

    @property
    def probe(self) -> QuantErrorProbe | None:
        """That of the first part, if every part may be in 8 bits: they are computed together."""
        specs = [part.matmul8 for part in self.parts if part.matmul8 is not None]
        return specs[0].probe if len(specs) == len(self.parts) else None

    def extra(self, like: Tensor) -> Tensor:
        """(N, C) in the dtype of `like`: the last C columns of `matrix`, without the bias."""
        b = like.new_empty(self.parts[0].rows, self.width - self.inputs)  # (N, C)
        pack_b_into(b, self.lora)
        return b

    @cached_property
    def lora(self) -> list[LoraSlice]:
        """Of all parts, in the order of their columns."""
        return [pair for part in self.parts for pair in part.lora]

    def gemm_input(self, rows: int, like: Tensor) -> GemmInput:
        """The input of M = `rows` rows: the caller adds the parts, then calls `complete_`."""
        columns = [part.columns for part in self.parts]
        return GemmInput(columns, self.width - self.inputs, rows, like, joined=not self.use_8bit)

    def dropout_seeds(self, source: Dropout) -> list[Seed | None]:
        """The seed of each part's dropout mask: backward makes the same masks again."""
        return [source.seed() if part.dropout else None for part in self.parts]

    def complete_(self, gemm_input: GemmInput, dropout_seeds: Seeds) -> None:
        """Writes the extra columns: x A^T of each LoRA, and a one for the bias."""
        for part, x, column, seed in self._spans(gemm_input.parts, dropout_seeds):
            if part.rank:
                t = gemm_input.extra[:, column : column + part.rank]  # (M, r)
                torch.mm(_dropped(part, x, seed), stack_a(part.lora, x).T, out=t)
        if gemm_input.extra.shape[1] > self.rank:
            gemm_input.extra[:, self.rank :].zero_()
            gemm_input.extra[:, self.rank].fill_(1)

    def matmul(self, gemm_input: GemmInput, *, residual: Tensor | None = None) -> Tensor:
        """(M, N) of a completed input; plus `residual` (M, N) if given, which is not changed."""
        if self.use_8bit:
            return self._matmul_8bit(gemm_input, residual)
        matrix = self.matrix(gemm_input.whole)
        if self.probe is not None:
            self._probe_forward(gemm_input, F.linear(gemm_input.whole, matrix))
        if residual is None:
            return F.linear(gemm_input.whole, matrix)  # (M, N)
        return torch.addmm(residual, gemm_input.whole, matrix.T)  # (M, N)

    def _matmul_8bit(self, gemm_input: GemmInput, residual: Tensor | None) -> Tensor:
        like = gemm_input.extra
        out = like.new_empty(len(like), self.parts[0].rows)  # (M, N)
        low_rank = None
        if self.rank:
            low_rank = matmul8.LowRankTerm(gemm_input.extra[:, : self.rank], self.extra(like)[:, : self.rank])
        for part, x in zip(self.parts, gemm_input.parts, strict=True):
            assert part.int8_weight is not None
            assert part.matmul8 is not None
            prescale, (weight, absmax), outliers = None, part.int8_weight(x), part.matmul8.outliers
            if outliers is not None:
                low_rank, prescale = _with_outliers(low_rank, x, weight, absmax, outliers), outliers.prescale
            quantized = matmul8.quantize_rows(x, torch.int8, prescale=prescale)
            matmul8.matmul_8bit_into(*quantized, weight, out, absmax, part.bias, part.bias_start, low_rank, residual)
            residual, low_rank = out, None
        return out

    def backward(
        self,
        dy: Tensor,
        gemm_input: GemmInput,
        dropout_seeds: Seeds,
        *,
        grad_input: bool,
        matrix: Tensor | None = None,
    ) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        """(gradients to the parts of the input (M, K_i) with `grad_input`, gradients of `trained`), from dy (M, N)."""
        dx, dt = self.grad_input(dy, dropout_seeds, matrix) if grad_input else (None, self.grad_t(dy))
        return dx, self.grad_trained(dy, gemm_input.parts, gemm_input.extra, dt, dropout_seeds)

    def grad_t(self, dy: Tensor, early: EarlyGrads | None = None) -> Tensor:
        """The gradient to the extra columns (M, C)."""
        if early is None or early.grads.t is None:
            return dy @ self.extra(dy)  # (M, C)
        dt = dy.new_zeros(len(dy), self.width - self.inputs)  # (M, C)
        column = self.rank - early.grads.t.shape[1]
        if column:
            torch.mm(dy[:, : early.start], self.extra(dy)[: early.start, :column], out=dt[:, :column])
        dt[:, column : self.rank] = early.grads.t
        return dt

    def grad_input(
        self, dy: Tensor, dropout_seeds: Seeds, matrix: Tensor | None = None, early: EarlyGrads | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients to the parts of the input (M, K_i) and to the extra columns (M, C).

        `matrix` is the result of `matrix(dy)` if the caller has it.
        """
        if self.use_8bit:
            dt = self.grad_t(dy, early)
            return self._grad_input_8bit(dy, dt, dropout_seeds), dt
        joined = dy @ (self.matrix(dy) if matrix is None else matrix)  # (M, K + C)
        *dx, dt = joined.split([*(part.columns for part in self.parts), self.width - self.inputs], dim=1)
        for part, dx_i, column, seed in self._spans(dx, dropout_seeds):
            if part.rank:
                _add_low_rank_(dx_i, dt[:, column : column + part.rank], part, seed)
        if self.probe is not None:
            dx8 = self._grad_input_8bit(dy, dt, dropout_seeds)
            self._write_error("backward", torch.cat(dx8, dim=1), joined[:, : self.inputs])
        return dx, dt

    def _grad_input_8bit(self, dy: Tensor, dt: Tensor, dropout_seeds: Seeds) -> list[Tensor]:
        dx = [dy.new_empty(len(dy), part.columns) for part in self.parts]  # (M, K_i) each
        kind = matmul8.gradient_type(dy.device)
        for part, dx_i, column, seed in self._spans(dx, dropout_seeds):
            assert part.int8_weight is not None
            assert part.matmul8 is not None
            transposed, absmax = part.matmul8.transposed or transposed_weight(part.int8_weight, dy)
            dt_i = dt[:, column : column + part.rank]  # (M, r)
            fused = part.rank and not part.dropout  # the kernel adds the low-rank term without a dropout mask
            low_rank = matmul8.LowRankTerm(dt_i, stack_a(part.lora, dy, transposed=True)) if fused else None
            gradient = matmul8.quantize_rows(dy, kind, prescale=absmax, groups=kind == torch.int8)
            matmul8.matmul_8bit_into(*gradient, transposed, dx_i, low_rank=low_rank)
            if part.rank and part.dropout:
                _add_low_rank_(dx_i, dt_i, part, seed)
        return dx

    def grad_trained(
        self,
        dy: Tensor,
        x: Sequence[Tensor | LoraGrads],
        extra: Tensor,
        dt: Tensor,
        dropout_seeds: Seeds,
        early: EarlyGrads | None = None,
    ) -> list[Tensor | None]:
        """Gradients of `trained`.

        `x` has the parts of the input (M, K_i), or their LoRA gradients if an activation's backward computed them;
        `extra` (M, C) the extra columns of the input, `dt` (M, C) the gradient to these.
        """
        if not self.rank and not any(tensor.requires_grad for tensor in self.trained):
            return [None] * len(self.trained)
        rows = dy.shape[1] if early is None else early.start
        d_extra = mm_float32(dy[:, :rows].T, extra)  # (N, C): the gradients of every B, and of the bias
        self._scale_(d_extra)
        factors: list[Tensor | None] = []
        for part, x_i, column, seed in self._spans(x, dropout_seeds):
            if not part.rank:
                continue
            if isinstance(x_i, LoraGrads):
                da = x_i.a  # (r, K_i)
            else:
                da = mm_float32(dt[:, column : column + part.rank].T, _dropped(part, x_i, seed))  # (r, K_i)
            for pair, da_j in zip(part.lora, da.split([len(pair.a) for pair in part.lora]), strict=True):
                factors.append((da_j if pair.on_a == 1 else da_j * pair.on_a).to(pair.a.dtype))
                if early is not None and pair.start >= rows:
                    db = early.grads.b[pair.start - rows : pair.stop - rows]
                    db = db if pair.on_b == 1 else db * pair.on_b
                else:
                    db = d_extra[pair.start : pair.stop, column : column + len(da_j)]
                factors.append(db.to(pair.b.dtype))
                column += len(da_j)
        biases: list[Tensor | None] = []
        for part in self.parts:
            if part.bias is not None:
                d_bias = d_extra[part.bias_start : part.bias_start + part.bias.numel(), self.rank]
                biases.append(d_bias.to(part.bias.dtype) if part.bias.requires_grad else None)
        return factors + biases

    def _scale_(self, d_extra: Tensor) -> None:
        """Multiplies the gradients of every B (N, C) by the scaling of B; one pass over LoRA with the same scaling."""
        column = 0
        for scaling, run in groupby(self.lora, lambda pair: pair.on_b):
            width = sum(len(pair.a) for pair in run)
            if scaling != 1:
                d_extra[:, column : column + width] *= scaling
            column += width

    def _probe_forward(self, gemm_input: GemmInput, exact: Tensor) -> None:
        """Writes the errors of the output in 8 bits into the probes, without and with outlier channels kept exact."""
        with_outliers = []
        for part, x in zip(self.parts, gemm_input.parts, strict=True):
            assert part.matmul8 is not None
            assert part.matmul8.probe is not None
            channels = x.abs().amax(dim=0).topk(min(OUTLIERS, part.columns)).indices.sort().values  # (C,)
            part.matmul8.probe.channels = channels
            with_outliers.append(part._replace(matmul8=Matmul8(split_outliers(channels, part.columns))))
        self._write_error("forward", self._matmul_8bit(gemm_input, None), exact)
        self._write_error("outliers", FusedLinear(tuple(with_outliers))._matmul_8bit(gemm_input, None), exact)

    def _write_error(self, name: str, result: Tensor, exact: Tensor) -> None:
        """Writes a relative error into the probe of every part: the parts are computed together."""
        exact, tiny = exact.float(), torch.finfo(torch.float32).tiny
        signal = exact if name == "backward" else exact - exact.mean(dim=0)
        error = torch.linalg.vector_norm(result.float() - exact) / torch.linalg.vector_norm(signal).clamp_min(tiny)
        for part in self.parts:
            assert part.matmul8 is not None
            setattr(part.matmul8.probe, name, error)

    def _spans(self, values: Sequence[X], dropout_seeds: Seeds) -> list[tuple[LinearSpec, X, int, Seed | None]]:
        """(part, its value, the first of its extra columns, the seed of its dropout mask) of each part."""
        columns = accumulate((part.rank for part in self.parts[:-1]), initial=0)
        return list(zip(self.parts, values, columns, dropout_seeds, strict=True))


def fused_linear(x: Tensor, linear: FusedLinear, dropout: Dropout, residual: Tensor | None = None) -> Tensor:
    """x (.., K) through a linear of one part, plus `residual` (.., N) if given: (.., N). Saves x and x A^T."""
    y: Tensor = _FusedLinear.apply(x, residual, linear, dropout, *linear.trained)  # type: ignore[no-untyped-call]
    return y


class _FusedLinear(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T + bias + residual; with t = x A^T and dt = s dy B:

    dx = dy W + dt A        dA = dt^T x        dB = s dy^T t        dbias = sum of dy        dresidual = dy
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, linear: FusedLinear, dropout: Dropout, *trained: Tensor
    ) -> Tensor:
        rows, dropout_seeds = x.reshape(-1, x.shape[-1]), linear.dropout_seeds(dropout)  # (M, K)
        gemm_input = linear.gemm_input(len(rows), rows)
        gemm_input.put(rows)
        linear.complete_(gemm_input, dropout_seeds)
        y = linear.matmul(gemm_input, residual=None if residual is None else residual.reshape(len(rows), -1))  # (M, N)
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
        return dx, grad if ctx.has_residual else None, None, None, *gradients


def transposed_weight(int8_weight: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (K, N) as backward multiplies with it, absmax (N,)), written anew."""
    weight, absmax = int8_weight(like)
    transposed = weight.new_empty(weight.shape[::-1], dtype=matmul8.gradient_type(like.device))  # (K, N)
    matmul8.transpose_into(weight, transposed)
    return transposed, absmax


def _with_outliers(
    low_rank: matmul8.LowRankTerm | None, x: Tensor, weight: Tensor, absmax: Tensor, outliers: Outliers
) -> matmul8.LowRankTerm:
    """The outlier channels as further columns of the low-rank term; x (M, K), weight (N, K) int8."""
    t = x.index_select(1, outliers.channels)  # (M, C)
    b = (weight.index_select(1, outliers.channels) * (absmax / INT8_LEVELS)[:, None]).to(x.dtype)  # (N, C)
    if low_rank is None:
        return matmul8.LowRankTerm(t, b)
    return matmul8.LowRankTerm(torch.cat([low_rank.t, t], dim=1), torch.cat([low_rank.b, b], dim=1))


def _add_low_rank_(dx: Tensor, dt: Tensor, part: LinearSpec, seed: Seed | None) -> None:
    """dx (M, K_i) += dt (M, sum of r) A, through the dropout mask."""
    if part.dropout:
        dx += mask(dx, part.dropout, seed).mul_(dt @ stack_a(part.lora, dx))
    else:
        dx.addmm_(dt, stack_a(part.lora, dx))


def _dropped(part: LinearSpec, x: Tensor, seed: Seed | None) -> Tensor:
    """(M, K_i): the input of a part's LoRA, after dropout."""
    return x * mask(x, part.dropout, seed) if part.dropout else x
