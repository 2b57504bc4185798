"""Products in 8 bits, forward and backward, from one frozen copy of a weight: int8 codes, one scale a row.

    forward    y[m, n]  = a[m] s[n] sum_k Xq[m, k] Wq[n, k]        Xq = int8 codes of x's rows, scales a
    backward   dx[m, k] = g[m]      sum_n Gq[m, n] Wq[n, k]        Gq = fp8 codes of the rows of dy s, scales g

Forward both scales leave the sum. In backward the weight's scale lies on the axis that is summed, so it goes into the
gradient before that is coded: exact algebra, and no second copy of the weight that would be scaled another way. Wq is
exact as int8; for backward it is written transposed, as fp8 (e4m3, arXiv 2209.05433), into memory that is given back.

Activations take int8, whose even steps lose least on rows without far outliers; gradients take fp8: one scale a row of
int8 leaves nothing of small numbers beside large ones, and training diverges (docs/log.md).

Legend: M rows (tokens), K inputs and N outputs of a product, C low-rank columns beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.quantize import INT8_LEVELS
from octavo.ops.twins import twin

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0
ALIGNMENT = 16  # codes: rows of them start where a card's copy engine can read


class Coded(NamedTuple):
    """Rows in 8 bits: codes (M, K) times scale (M,) float32."""

    codes: Tensor
    scale: Tensor


class Beside(NamedTuple):
    """A thin product that is added to a wide one before rounding: t (M, C) b^T, b (N, C)."""

    t: Tensor
    b: Tensor


def fits(rows: int, columns: int) -> bool:
    """Whether a weight of this shape can be multiplied so."""
    return rows % ALIGNMENT == 0 and columns % ALIGNMENT == 0


def coded(x: Tensor, kind: torch.dtype, *, fold: Tensor | None = None) -> Coded:
    """The rows of x (M, K) as int8 or fp8; times fold / 127 (K,) first, if given.

    Backward folds in the absmax of a weight's rows; forward 127, and 0 for channels that are apart (ops/frozen.py).
    """
    made = Coded(x.new_empty(x.shape, dtype=kind), x.new_empty(len(x), dtype=torch.float32))
    code_rows_into(x, made.codes, made.scale, fold)
    return made


@twin
def code_rows_into(x: Tensor, codes: Tensor, scale: Tensor, fold: Tensor | None) -> None:
    """Writes the nearest codes of x (M, K) under the least scale of each row that holds its largest number.

    A row with a NaN or an infinity has no number as its scale, so that what is not finite stays so.
    """
    values = x.float() if fold is None else x.float() * (fold / INT8_LEVELS)
    largest = x.new_full((), INT8_LEVELS if codes.dtype == torch.int8 else FP8_LARGEST, dtype=torch.float32)
    top = torch.maximum(values.abs().amax(dim=1), torch.finfo(torch.float32).tiny * largest)
    values = values * (largest / top)[:, None]  # not in place: a float32 x is its own float()
    codes.copy_(values.round_() if codes.dtype == torch.int8 else values)
    scale.copy_(top / largest + 0 * top)


@twin
def transpose_into(codes: Tensor, out: Tensor) -> None:
    """out (K, N) fp8 = codes (N, K) int8; a code over 16 is rounded to four digits of its binary form."""
    out.copy_(codes.T.float())


@twin
def product_into(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    out: Tensor,
    absmax: Tensor | None = None,
    bias: Tensor | None = None,
    bias_start: int = 0,
    beside: Beside | None = None,
    onto: Tensor | None = None,
) -> None:
    """out (M, N) = codes (M, K) weight^T (N, K), each row times its scale, rounded once.

    With `absmax` column n is multiplied by absmax[n] / 127; `bias` is added to the columns from `bias_start` on, a thin
    product and `onto` (M, N), which may be `out`, to all.
    """
    work = torch.float32 if out.dtype == torch.float16 else out.dtype  # sums of whole codes would pass 65504
    y = F.linear(codes.to(work), weight.to(work)).float().mul_(scale[:, None])
    if absmax is not None:
        y *= absmax / INT8_LEVELS
    if bias is not None:
        y[:, bias_start : bias_start + bias.numel()] += bias
    if beside is not None:
        y += F.linear(beside.t.float(), beside.b.float())
    out.copy_(y if onto is None else y + onto)
