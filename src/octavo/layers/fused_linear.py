"""Frozen linears whose weights are joined into one matrix, with LoRA and bias as further columns: one matmul for all.

    y = x_1 W_1^T + x_2 W_2^T + .. + LoRA + bias
      = [x_1 | x_2 | .. | x A^T | 1] [W_1 | W_2 | .. | s B | bias]^T

If the scaling s is under 1, A is scaled instead of B: a new B is small and could underflow in float16. A GPU runs one
matmul instead of one for each weight, each adapter and the bias, and y is written once. In backward the matmul that
gives dL/dx also gives dL/dt for t = x A^T, and one low-rank matmul gives the gradients of every B and of the bias.

The joined matrix is dequantized for each use and not kept. Linears in 8 bits are multiplied without it, as they are
stored (layers/linear8.py); their LoRA activations are a low-rank term of that matmul. The residual branches of fused/
are made of these linears.

Legend: M rows of input; part i is a frozen linear with weight (N, K_i); K the sum of the K_i; one LoRA is A (r, K_i)
and B (n, r) on n of the N outputs; r_i the sum of the ranks of part i, R that of all parts; C extra columns: R, plus
one for the bias if there is one, rounded up to ALIGNMENT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.layers import linear8
from octavo.layers.dropout import Dropout, Seed, mask
from octavo.layers.gemm_input import GemmInput
from octavo.ops.linear import LoraSlice, mm_float32
from octavo.ops.linear_spec import LinearSpec, QuantErrorProbe
from octavo.ops.lora_backward import LoraGrads
from octavo.ops.lora_factors import pack_b_into, stack_a
from octavo.ops.matmul8 import LowRankTerm

X = TypeVar("X")
Seeds = Sequence[Seed | None]  # of the dropout masks of the parts; None for a part without dropout
ALIGNMENT = 8  # values; 16 bytes of a 2-byte dtype, the alignment of rows that tensor-core loads need


class EarlyGrads(NamedTuple):
    """Gradients of the LoRA on the outputs [start, N), which the next activation's backward has computed.

    Example: q, k, v and fc_in of GPT-J are stacked. The backward of the GELU after fc_in computes the gradients of
    fc_in's LoRA in its own pass (fused/lora_operands.py); `grad_extra` and `grad_trained` compute those of q, k and v.
    """

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
        """R, the sum of all LoRA ranks."""
        return sum(part.rank for part in self.parts)

    @cached_property
    def width(self) -> int:
        """K + C."""
        extra = self.rank + any(part.bias is not None for part in self.parts)
        return self.inputs + -(-extra // ALIGNMENT) * ALIGNMENT

    @cached_property
    def lora(self) -> list[LoraSlice]:
        """Of all parts, in the order of their columns."""
        return [lora for part in self.parts for lora in part.lora]

    @property
    def trained(self) -> list[Tensor]:
        """The tensors with a gradient, in the order of `backward`: A, B of each LoRA; then biases."""
        factors = [tensor for lora in self.lora for tensor in (lora.a, lora.b)]
        return factors + [part.bias for part in self.parts if part.bias is not None]

    @property
    def probe(self) -> QuantErrorProbe | None:
        """The first part's probe. Either every part has one or none, and all get the same error."""
        specs = [part.matmul8 for part in self.parts if part.matmul8 is not None]
        return specs[0].probe if len(specs) == len(self.parts) else None

    @cached_property
    def use_8bit(self) -> bool:
        """Whether the result is computed in 8 bits. With a probe it is not: the exact result is used, and compared."""
        return self.probe is None and all(part.matmul8 is not None for part in self.parts)

    @cached_property
    def backward_8bit(self) -> bool:
        """Whether backward multiplies in 8 bits, or measures the error of that."""
        return not any(part.matmul8 is None or part.matmul8.forward_only for part in self.parts)

    def matrix(self, like: Tensor) -> Tensor:
        """(N, K + C) in the dtype and on the device of `like`, dequantized anew."""
        matrix = like.new_empty(self.parts[0].rows, self.width)  # (N, K + C)
        pack_b_into(matrix[:, self.inputs :], self.lora)  # also writes zeros where there is no LoRA
        start = 0
        for part in self.parts:
            part.fill(matrix[:, start : start + part.columns])  # (N, K_i)
            start += part.columns
            if part.bias is not None:
                matrix[part.bias_start : part.bias_start + part.bias.numel(), self.inputs + self.rank] += part.bias
        return matrix

    def tiles(self, like: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the matrix, `matrix` of them (n, K + C)) one after the other, of a linear of one part.

        `rows` is a multiple of the rows of any scheme's blocks. Only one tile exists at a time.
        """
        (part,) = self.parts
        assert part.fill_rows is not None
        extra = self.extra(like)  # (N, C)
        if part.bias is not None:
            extra[part.bias_start : part.bias_start + part.bias.numel(), self.rank] += part.bias
        whole = like.new_empty(min(rows, part.rows), self.width)  # (n, K + C)
        for first in range(0, part.rows, rows):
            span = slice(first, min(first + rows, part.rows))
            tile = whole[: span.stop - span.start]
            part.fill_rows(first, tile[:, : self.inputs])
            tile[:, self.inputs :] = extra[span]
            yield span, tile

    def extra(self, like: Tensor) -> Tensor:
        """(N, C) in the dtype of `like`: the last C columns of `matrix`, without the bias."""
        b = like.new_empty(self.parts[0].rows, self.width - self.inputs)  # (N, C)
        pack_b_into(b, self.lora)
        return b

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
                t = gemm_input.extra[:, column : column + part.rank]  # (M, r_i)
                torch.mm(_dropped(part, x, seed), stack_a(part.lora, x).T, out=t)
        if gemm_input.extra.shape[1] > self.rank:  # a column of ones for the bias; without one `matrix` has zeros there
            gemm_input.extra[:, self.rank :].zero_()
            gemm_input.extra[:, self.rank].fill_(1)

    def matmul(self, gemm_input: GemmInput, *, residual: Tensor | None = None) -> Tensor:
        """(M, N) of a completed input; plus `residual` (M, N) if given, which is not changed."""
        if self.use_8bit:
            return linear8.matmul_8bit(self.parts, gemm_input.parts, self._low_rank(gemm_input), residual)
        matrix = self.matrix(gemm_input.whole)  # (N, K + C)
        if self.probe is not None:
            # Without the residual, whose size would hide the error. The result below is computed as without a probe.
            exact = F.linear(gemm_input.whole, matrix)  # (M, N)
            linear8.probe_forward(self.parts, gemm_input.parts, self._low_rank(gemm_input), exact)
        if residual is None:
            return F.linear(gemm_input.whole, matrix)  # (M, N)
        return torch.addmm(residual, gemm_input.whole, matrix.T)  # (M, N)

    def _low_rank(self, gemm_input: GemmInput) -> LowRankTerm | None:
        """The LoRA terms of all parts: t (M, R) and B (N, R)."""
        if not self.rank:
            return None
        return LowRankTerm(gemm_input.extra[:, : self.rank], self.extra(gemm_input.extra)[:, : self.rank])

    def backward(
        self,
        dy: Tensor,
        gemm_input: GemmInput,
        dropout_seeds: Seeds,
        *,
        wants_dx: bool,
        joined: Tensor | None = None,
    ) -> tuple[list[Tensor] | None, list[Tensor | None]]:
        """From dy (M, N): (with `wants_dx` the gradients to the parts of the input (M, K_i), those of `trained`).

        `joined` as for `grad_input`.
        """
        dx, dt = self.grad_input(dy, dropout_seeds, joined) if wants_dx else (None, self.grad_extra(dy))
        return dx, self.grad_trained(dy, gemm_input.parts, gemm_input.extra, dt, dropout_seeds)

    def grad_extra(self, dy: Tensor, early: EarlyGrads | None = None) -> Tensor:
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
        self, dy: Tensor, dropout_seeds: Seeds, joined: Tensor | None = None, early: EarlyGrads | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients to the parts of the input (M, K_i) and to the extra columns (M, C).

        `joined` is dy times `matrix(dy)`, (M, K + C), if the caller has it.
        """
        if self.use_8bit and self.backward_8bit:
            dt = self.grad_extra(dy, early)  # (M, C)
            return self._grad_input_8bit(dy, dt, dropout_seeds), dt
        if joined is None:
            joined = dy @ self.matrix(dy)  # (M, K + C)
        *dx, dt = joined.split([*(part.columns for part in self.parts), self.width - self.inputs], dim=1)
        for part, dx_i, column, seed in self._spans(dx, dropout_seeds):
            if part.rank:
                linear8.add_lora_gradient_(dx_i, dt[:, column : column + part.rank], part, seed)
        if self.probe is not None and self.backward_8bit:
            dx8 = self._grad_input_8bit(dy, dt, dropout_seeds)
            linear8.probe_backward(self.parts, dx8, joined[:, : self.inputs])
        return dx, dt

    def _grad_input_8bit(self, dy: Tensor, dt: Tensor, dropout_seeds: Seeds) -> list[Tensor]:
        return [
            linear8.grad_input_8bit(dy, part, dt[:, column : column + part.rank], seed)  # (M, K_i)
            for part, _, column, seed in self._spans(self.parts, dropout_seeds)
        ]

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
        outputs = dy.shape[1] if early is None else early.start  # those whose gradients are not computed yet
        d_extra = mm_float32(dy[:, :outputs].T, extra)  # (outputs, C): the gradients of every B, and of the bias
        self._scale_(d_extra)
        gradients: list[Tensor | None] = []
        for part, x_i, column, seed in self._spans(x, dropout_seeds):
            if not part.rank:
                continue
            if isinstance(x_i, LoraGrads):
                da = x_i.a  # (r_i, K_i)
            else:
                da = mm_float32(dt[:, column : column + part.rank].T, _dropped(part, x_i, seed))  # (r_i, K_i)
            for lora, da_j in zip(part.lora, da.split([len(lora.a) for lora in part.lora]), strict=True):
                gradients.append((da_j if lora.a_scaling == 1 else da_j * lora.a_scaling).to(lora.a.dtype))
                if early is not None and lora.start >= outputs:
                    db = early.grads.b[lora.start - outputs : lora.stop - outputs]  # (n, r)
                    db = db if lora.b_scaling == 1 else db * lora.b_scaling
                else:
                    db = d_extra[lora.start : lora.stop, column : column + len(da_j)]  # (n, r)
                gradients.append(db.to(lora.b.dtype))
                column += len(da_j)
        return gradients + self._bias_gradients(d_extra)

    def _bias_gradients(self, d_extra: Tensor) -> list[Tensor | None]:
        gradients: list[Tensor | None] = []
        for part in self.parts:
            if part.bias is not None:
                d_bias = d_extra[part.bias_start : part.bias_start + part.bias.numel(), self.rank]
                gradients.append(d_bias.to(part.bias.dtype) if part.bias.requires_grad else None)
        return gradients

    def _scale_(self, d_extra: Tensor) -> None:
        """Multiplies the gradients of every B (N, C) by the scaling of B."""
        column = 0  # adjacent LoRA with an equal scaling are multiplied at once
        for scaling, equal in groupby(self.lora, lambda lora: lora.b_scaling):
            width = sum(len(lora.a) for lora in equal)
            if scaling != 1:
                d_extra[:, column : column + width] *= scaling
            column += width

    def _spans(self, values: Sequence[X], dropout_seeds: Seeds) -> list[tuple[LinearSpec, X, int, Seed | None]]:
        """(part, its item of `values`, its first extra column, the seed of its dropout mask) of each part."""
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
            (dx,), dt = linear.grad_input(dy, dropout_seeds)  # (M, K), (M, C)
            dx = dx.view(x.shape)
        else:
            dt = linear.grad_extra(dy)  # (M, C)
        gradients = linear.grad_trained(dy, [x.reshape(len(dy), -1)], extra, dt, dropout_seeds)
        return dx, grad if ctx.has_residual else None, None, None, *gradients


def _dropped(part: LinearSpec, x: Tensor, seed: Seed | None) -> Tensor:
    """(M, K_i): the input of a part's LoRA, after dropout."""
    return x * mask(x, part.dropout, seed) if part.dropout else x
