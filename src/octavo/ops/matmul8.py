"""8-bit matmuls, forward and backward, with one frozen copy of a weight: int8, one scale a row.

    forward    y[m, n]  = a[m] s[n] sum_k Xq[m, k] Wq[n, k]        Xq = rows of x in int8, scales a
    backward   dx[m, k] = g[m]      sum_n Gq[m, n] Wq[n, k]        Gq = rows of dy s in fp8, scales g

In forward both scales are applied to the sum. In backward the scale of the weight is on the axis of the sum, so the
gradient is multiplied by it before quantization: exact algebra, without a second copy of the weight with other scales.
Wq is exact as int8. For backward it is written transposed as fp8 (e4m3, arXiv 2209.05433) into a temporary, or is kept
if memory allows.

Activations are int8, whose even steps have the least error on rows without outliers. Gradients are fp8: with int8 and
one scale a row, small values next to large ones become zero, and training diverges (docs/log.md). GPUs without fp8 use
int8 with a scale for each group of a row, which the matmul applies while it sums: more precise, and slower than fp8.

Legend: M rows (tokens), K inputs and N outputs of a matmul, C columns of the low-rank term, S groups of the K elements
of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.hardware.capabilities import NVIDIA, Capabilities, capabilities_of
from octavo.ops.scheme import INT8_LEVELS
from octavo.runtime.dispatch import kernel

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
GROUP_SIZE = 128  # elements of a row with one scale, if a row has several
ALIGNMENT = 16  # bytes of a row start: of the copy engine (TMA) of a GPU, and of the reference too


class Quantized(NamedTuple):
    """Quantized rows: the values of x are values * scale, by rows or by groups."""

    values: Tensor  # (M, K) int8 or fp8
    scale: Tensor  # (M,) float32, or (M, S) with groups


class LowRankTerm(NamedTuple):
    """A low-rank GEMM that is added to a matmul before rounding: t b^T."""

    t: Tensor  # (M, C)
    b: Tensor  # (N, C)


def fits(rows: int, columns: int) -> bool:
    """Whether 8-bit matmuls support a weight of this shape: the same on every device, and so is the precision."""
    return rows % ALIGNMENT == 0 and columns % ALIGNMENT == 0


def gradient_type(device: torch.device) -> torch.dtype:
    """The 8-bit type of gradients on a device."""
    return gradient_type_for(capabilities_of(device))


def gradient_type_for(capabilities: Capabilities) -> torch.dtype:
    """fp8; int8 in groups on an NVIDIA GPU whose tensor cores do not multiply fp8."""
    return torch.int8 if capabilities.vendor == NVIDIA and not capabilities.fp8 else FP8


def quantize_rows(x: Tensor, kind: torch.dtype, *, prescale: Tensor | None = None, groups: bool = False) -> Quantized:
    """The rows of x (M, K) as int8 or fp8; times prescale / 127 (K,) first, if given.

    Backward passes the absmax of the weight's rows as `prescale`; forward passes 127, and 0 for outlier channels
    (ops/linear_spec.py).
    """
    shape = (len(x), -(-x.shape[1] // GROUP_SIZE)) if groups else (len(x),)
    quantized = Quantized(x.new_empty(x.shape, dtype=kind), x.new_empty(shape, dtype=torch.float32))
    quantize_rows_into(x, quantized.values, quantized.scale, prescale)
    return quantized


@kernel
def quantize_rows_into(x: Tensor, quantized: Tensor, scale: Tensor, prescale: Tensor | None) -> None:
    """Writes x (M, K) quantized to the nearest values, with the scale that maps the absmax of a row, or of a group, to
    the largest one.

    The scale of a row with a NaN or an infinity is NaN, so the result of its matmul is not finite.
    """
    values = x.float() if prescale is None else x.float() * (prescale / INT8_LEVELS)
    largest = x.new_full((), INT8_LEVELS if quantized.dtype == torch.int8 else FP8_LARGEST, dtype=torch.float32)
    parts = _groups(values) if scale.ndim == 2 else values[:, None]  # (M, S, elements with one scale)
    top = torch.maximum(parts.abs().amax(dim=2), torch.finfo(torch.float32).tiny * largest)
    values = (parts * (largest / top)[:, :, None]).flatten(1)[:, : x.shape[1]]
    quantized.copy_(values.round() if quantized.dtype == torch.int8 else values)
    scale.copy_((top / largest + 0 * top).view(scale.shape))


def _groups(values: Tensor) -> Tensor:
    """(M, S, GROUP_SIZE): the last group is padded with zeros."""
    return F.pad(values, (0, -values.shape[1] % GROUP_SIZE)).view(len(values), -1, GROUP_SIZE)


@kernel
def transpose_into(weight: Tensor, out: Tensor) -> None:
    """out (K, N), int8 or fp8, = weight^T, weight (N, K) int8; fp8 rounds magnitudes above 16 to 4 binary digits."""
    out.copy_(weight.T.float())


@kernel
def matmul_8bit_into(
    quantized: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None = None,
    bias: Tensor | None = None,
    bias_start: int = 0,
    low_rank: LowRankTerm | None = None,
    residual: Tensor | None = None,
) -> None:
    """out (M, N) = quantized (M, K) weight (N, K)^T, each row, or group of a row, times its scale, rounded once.

    With `absmax` column n is multiplied by absmax[n] / 127. `bias` is added to the columns from `bias_start` on, the
    low-rank term and `residual` (M, N), which may be `out`, to all.
    """
    work = torch.float32 if out.dtype == torch.float16 else out.dtype  # sums of int8 values would overflow at 65504
    if scale.ndim == 2:
        parts = zip(_groups(quantized.float()).unbind(1), _groups(weight.float()).unbind(1), scale.T, strict=True)
        y = sum((F.linear(x, w) * size[:, None] for x, w, size in parts), torch.zeros(()).to(scale))  # (M, N)
    else:
        y = F.linear(quantized.to(work), weight.to(work)).float().mul_(scale[:, None])  # (M, N)
    if absmax is not None:
        y *= absmax / INT8_LEVELS
    if bias is not None:
        y[:, bias_start : bias_start + bias.numel()] += bias
    if low_rank is not None:
        y += F.linear(low_rank.t.float(), low_rank.b.float())
    out.copy_(y if residual is None else y + residual)
