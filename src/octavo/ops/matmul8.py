"""Products in 8 bits, forward and backward, from one frozen copy of a weight: int8 codes, one scale a row.

    forward    y[m, n]  = a[m] s[n] sum_k Xq[m, k] Wq[n, k]        Xq = int8 codes of x's rows, scales a
    backward   dx[m, k] = g[m]      sum_n Gq[m, n] Wq[n, k]        Gq = fp8 codes of the rows of dy s, scales g

Forward both scales leave the sum. In backward the weight's scale lies on the axis that is summed, so it goes into the
gradient before that is coded: exact algebra, and no second copy of the weight that would be scaled another way. Wq is
exact as int8; for backward it is written transposed, as fp8 (e4m3, arXiv 2209.05433), into memory that is given back,
or kept where there is room.

Activations take int8, whose even steps lose least on rows without far outliers. Gradients take fp8: one scale a row of
int8 leaves nothing of small numbers beside large ones, and training diverges (docs/log.md). Cards before fp8 take int8
with a scale for each span of a row, which the product applies as it adds up: nearer to exact, and slower than fp8.

Legend: M rows (tokens), K inputs and N outputs of a product, C low-rank columns beside it, S spans of a row's K.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.hardware.capabilities import NVIDIA, Capabilities, capabilities_of
from octavo.ops.quantize import INT8_LEVELS
from octavo.runtime.dispatch import kernel

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
GROUP_SIZE = 128  # numbers of a row that share a scale, where rows have several
ALIGNMENT = 16  # codes: rows of them start where a card's copy engine can read


class Quantized(NamedTuple):
    """Rows in 8 bits: codes (M, K) times scale (M,) float32, or (M, S) of spans."""

    codes: Tensor
    scale: Tensor


class LowRankTerm(NamedTuple):
    """A thin product that is added to a wide one before rounding: t (M, C) b^T, b (N, C)."""

    t: Tensor
    b: Tensor


def fits(rows: int, columns: int) -> bool:
    """Whether a weight of this shape can be multiplied so."""
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
    made = Quantized(x.new_empty(x.shape, dtype=kind), x.new_empty(shape, dtype=torch.float32))
    quantize_rows_into(x, made.codes, made.scale, prescale)
    return made


@kernel
def quantize_rows_into(x: Tensor, codes: Tensor, scale: Tensor, prescale: Tensor | None) -> None:
    """Writes the nearest codes of x (M, K) under the least scale of each row, or span, that holds its largest number.

    A row with a NaN or an infinity has no number as its scale, so that what is not finite stays so.
    """
    values = x.float() if prescale is None else x.float() * (prescale / INT8_LEVELS)
    largest = x.new_full((), INT8_LEVELS if codes.dtype == torch.int8 else FP8_LARGEST, dtype=torch.float32)
    parts = _groups(values) if scale.ndim == 2 else values[:, None]  # (M, S, numbers that share a scale)
    top = torch.maximum(parts.abs().amax(dim=2), torch.finfo(torch.float32).tiny * largest)
    values = (parts * (largest / top)[:, :, None]).flatten(1)[:, : x.shape[1]]
    codes.copy_(values.round() if codes.dtype == torch.int8 else values)
    scale.copy_((top / largest + 0 * top).view(scale.shape))


def _groups(values: Tensor) -> Tensor:
    """(M, S, GROUP_SIZE): the last span is filled up with zeros."""
    return F.pad(values, (0, -values.shape[1] % GROUP_SIZE)).view(len(values), -1, GROUP_SIZE)


@kernel
def transpose_into(codes: Tensor, out: Tensor) -> None:
    """out (K, N), int8 or fp8, = codes (N, K) int8; in fp8 one over 16 is rounded to four digits of its binary form."""
    out.copy_(codes.T.float())


@kernel
def matmul_8bit_into(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None = None,
    bias: Tensor | None = None,
    bias_start: int = 0,
    low_rank: LowRankTerm | None = None,
    residual: Tensor | None = None,
) -> None:
    """out (M, N) = codes (M, K) weight^T (N, K), each row, or span of a row, times its scale, rounded once.

    With `absmax` column n is multiplied by absmax[n] / 127; `bias` is added to the columns from `bias_start` on, a thin
    product and `residual` (M, N), which may be `out`, to all.
    """
    work = torch.float32 if out.dtype == torch.float16 else out.dtype  # sums of whole codes would pass 65504
    if scale.ndim == 2:
        parts = zip(_groups(codes.float()).unbind(1), _groups(weight.float()).unbind(1), scale.T, strict=True)
        y = sum((F.linear(own, other) * size[:, None] for own, other, size in parts), torch.zeros(()).to(scale))
    else:
        y = F.linear(codes.to(work), weight.to(work)).float().mul_(scale[:, None])
    if absmax is not None:
        y *= absmax / INT8_LEVELS
    if bias is not None:
        y[:, bias_start : bias_start + bias.numel()] += bias
    if low_rank is not None:
        y += F.linear(low_rank.t.float(), low_rank.b.float())
    out.copy_(y if residual is None else y + residual)
