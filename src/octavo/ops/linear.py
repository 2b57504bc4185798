"""A matmul with a frozen matrix and LoRA adapters: y = x W^T + b + sum over adapters of s (x A^T) B^T.

W is dequantized for each use and not saved: once in forward, once in backward. Gradients exist for x, for the bias if
it is trained, and for A and B of each adapter; never for W.

Legend: x is (.., K); W is (N, K); an adapter has some rows of W (those of one name in a group of stacked matrices):
A is (r, K), B is (rows, r). M is the number of rows of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.hardware.capabilities import capabilities_of

Unpack = Callable[[torch.dtype], tuple[Tensor, Tensor | None]]


class LoraSlice(NamedTuple):
    """The adapter of rows [start, stop) of a matrix (LoRA, arXiv 2106.09685)."""

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def a_scaling(self) -> float:
        """The part of the scaling that is folded into A when both are cast: s if s < 1. A new B is small, and float16
        would underflow if B were scaled down."""
        return self.scaling if abs(self.scaling) < 1 else 1.0

    @property
    def b_scaling(self) -> float:
        """The part of the scaling that is folded into B: s if s >= 1."""
        return 1.0 if abs(self.scaling) < 1 else self.scaling


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 2-byte matrices with the result in float32."""
    if a.is_meta or not len(a):
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if a.dtype != torch.float32 and capabilities_of(a.device).float32_results:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def frozen_linear(
    x: Tensor,
    unpack: Unpack,
    *,
    bias: Tensor | None = None,
    bias_start: int = 0,
    lora: Sequence[LoraSlice] = (),
    dropped: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + LoRA terms, (.., N) in the dtype of x.

    `unpack(dtype)` gives (matrix (N, K), row scale (N,) or None) with W = scale[:, None] * matrix. `bias` is
    added to the rows from `bias_start` on. `dropped` is the input of the adapters instead of x (x after dropout).
    """
    spans = [(part.start, part.stop, part.scaling) for part in lora]
    factors = [tensor for part in lora for tensor in (part.a, part.b)]
    y: Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]
        x, dropped, unpack, bias, bias_start, spans, *factors
    )
    return y


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        unpack: Unpack,
        bias: Tensor | None,
        bias_start: int,
        spans: list[tuple[int, int, float]],
        *factors: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        y = _matmul(rows, unpack)
        if bias is not None:
            y[:, bias_start : bias_start + bias.numel()] += bias
        source = rows if dropped is None else dropped.reshape(rows.shape)
        t = None
        if spans:
            a, bs = _cast(factors, x.dtype)
            t = F.linear(source, a)  # (M, sum of r)
            column = 0
            for (start, stop, scaling), b in zip(spans, bs, strict=True):
                y[:, start:stop].addmm_(t[:, column : column + b.shape[1]], b.T, alpha=scaling)
                column += b.shape[1]
        ctx.unpack, ctx.spans, ctx.has_dropped = unpack, spans, dropped is not None
        ctx.bias = None if bias is None else (bias_start, bias_start + bias.numel(), bias.dtype)
        ctx.save_for_backward(*((source, t, *factors) if spans else ()))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dy = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_dropped = ctx.needs_input_grad[:2]
        dx = _matmul_backward(dy, ctx.unpack) if needs_x else None
        dbias = None
        if ctx.bias is not None and ctx.needs_input_grad[3]:
            start, stop, dtype = ctx.bias
            dbias = dy[:, start:stop].sum(dim=0, dtype=torch.float32).to(dtype)
        dsource: Tensor | None = None
        dfactors: list[Tensor] = []
        if ctx.spans:
            source, t, *factors = ctx.saved_tensors
            wanted = needs_dropped if ctx.has_dropped else needs_x
            dsource, dfactors = _lora_backward(dy, source, t, factors, spans=ctx.spans, to_source=wanted)
        ddropped = None
        if ctx.has_dropped and dsource is not None:
            ddropped = dsource.view(*grad.shape[:-1], dsource.shape[-1])
        elif dsource is not None and dx is not None:
            dx += dsource
        if dx is not None:
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
        return dx, ddropped, None, dbias, None, None, *dfactors


def _matmul(rows: Tensor, unpack: Unpack) -> Tensor:
    """rows (M, K) W^T, (M, N). The row scale is applied to the result: int8 values are exact in any float dtype."""
    matrix, scale = unpack(rows.dtype)
    y = F.linear(rows, matrix)  # (M, N); on a CPU faster than rows @ matrix.T
    return y if scale is None else y.mul_(scale)


def _matmul_backward(dy: Tensor, unpack: Unpack) -> Tensor:
    """dy (M, N) W, (M, K). The row scale is on the axis of the sum, so it is multiplied into dy first."""
    matrix, scale = unpack(dy.dtype)
    return (dy if scale is None else (dy * scale).to(dy.dtype)) @ matrix


def _cast(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """(all A stacked (sum of r, K), each B (rows, r)) in the compute dtype: one low-rank GEMM for all adapters."""
    return torch.cat([a.to(dtype) for a in factors[::2]]), [b.to(dtype) for b in factors[1::2]]


def _lora_backward(
    dy: Tensor,
    source: Tensor,
    t: Tensor,
    factors: Sequence[Tensor],
    *,
    spans: list[tuple[int, int, float]],
    to_source: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of (source (M, K), [A, B, A, B, ..]) of the LoRA terms."""
    a, bs = _cast(factors, dy.dtype)
    dt = torch.empty_like(t)  # (M, sum of r)
    dbs: list[Tensor] = []
    column = 0
    for (start, stop, scaling), b in zip(spans, bs, strict=True):
        columns = slice(column, column + b.shape[1])
        dt[:, columns] = (dy[:, start:stop] @ b).mul_(scaling)
        dbs.append((dy[:, start:stop].T @ t[:, columns]).mul_(scaling))
        column += b.shape[1]
    da = dt.T @ source  # (sum of r, K)
    dfactors: list[Tensor] = []
    for da_i, db, a_i, b_i in zip(da.split([b.shape[1] for b in bs]), dbs, factors[::2], factors[1::2], strict=True):
        dfactors += [da_i.to(a_i.dtype), db.to(b_i.dtype)]
    return (dt @ a if to_source else None), dfactors
