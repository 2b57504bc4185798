"""What one new token of a few requests takes: products straight from 8-bit codes, and attention over slots.

With few rows a product is bound by reading its matrix, so the codes are read as they are stored and nothing is
written out first. Bias, low-rank terms and what the product is added onto join before the result is rounded.

Legend: M rows, one of each request; K inputs and N outputs of a product; n adapters side by side, of J numbers in
between: R for each name of the matrix; slots of S positions, H query heads, G key/value heads, D the size of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.ops.quantize import INT8_LEVELS
from octavo.ops.twins import kernels_run_on, twin

FEW_ON_A_CPU = 16  # rows that PyTorch's own kernel is faster for


def few_rows(x: Tensor) -> int:
    """How many rows of x's kind are few: with more, writing the matrix out and multiplying with it is no slower."""
    return 256 if kernels_run_on(x) and x.dtype != torch.float32 else 64


class Thin(NamedTuple):
    """What the adapters of rows add to a product: inner[m, name of output] B[numbers[m]]."""

    inner: Tensor  # (M, J) float32, from `shrink`
    b: Tensor  # (n, R, N)
    numbers: Tensor  # (M,) which adapter a row goes through; the first is that of the base, and zero
    names: Tensor  # (N,) int32: which R columns of `inner` an output reads
    spans: tuple[tuple[int, int], ...]  # the outputs of each name


@twin
def int8_rows(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    *,
    bias: Tensor | None = None,
    bias_start: int = 0,
    thin: Thin | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """onto + x W^T + bias + thin, (M, N) in x's type, for few rows x (M, K); W = codes (N, K) * absmax / 127 by rows.

    `bias` is added to the outputs from `bias_start` on; `onto` is (M, N).
    """
    y = _codes_product(x, codes, absmax / INT8_LEVELS)
    if bias is not None:
        y[:, bias_start : bias_start + bias.numel()] += bias
    if thin is not None:
        b = thin.b[thin.numbers]
        for (start, stop), part in zip(thin.spans, thin.inner.to(y.dtype).split(b.shape[1], dim=1), strict=True):
            y[:, start:stop] += torch.bmm(part[:, None], b[:, :, start:stop])[:, 0]
    return y if onto is None else onto + y


@twin
def shrink(x: Tensor, a: Tensor, numbers: Tensor) -> Tensor:
    """(M, J) float32: x (M, K) through A (n, J, K) of each row's own adapter."""
    return torch.bmm(a[numbers], x[:, :, None])[:, :, 0].float()


@twin
def slot_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, longest: int
) -> Tensor:
    """Stores k and v (M, G, D) of one new token at its slot's length, and lets q (M, H, D) look at all up to it.

    keys and values are (M, S, G, D); the first lengths[m] positions of slot m are filled, `longest` of the fullest.
    A slot with the length -1 is idle: nothing is stored, its result is 0. Returns (M, H, D).
    """
    live = lengths >= 0
    rows = live.nonzero()[:, 0]
    keys[rows, lengths[rows]], values[rows, lengths[rows]] = k[rows], v[rows]
    seen = torch.arange(longest + 1, device=q.device) <= lengths[:, None].clamp_min(0)
    # Query heads that share a key head stand as its queries: nothing is repeated.
    queries = q.unflatten(1, (keys.shape[2], -1))
    k, v = (store[:, : longest + 1].transpose(1, 2) for store in (keys, values))
    # On an H100 PyTorch's own kernel for a mask ended in misaligned addresses: there the plain one is taken.
    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen[:, None, None]).flatten(1, 2)
    return out if len(rows) == len(q) else out * live[:, None, None]


def _codes_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(M, K) times codes (N, K), each output times its scale. The codes are exact in any float type."""
    if x.dtype == torch.float16:  # sums of whole codes would pass 65504; a power of two costs no digit
        return F.linear(x, codes.to(x.dtype).mul_(2.0**-7)).mul_(scale * 2**7)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) <= FEW_ON_A_CPU and _aligned(codes):
        # PyTorch's own kernel: at one row 4 to 17 times as fast as writing the codes out in bfloat16 first.
        x = x.clone(memory_format=torch.contiguous_format)  # it reads aligned, and dies where rows are not
        return torch._weight_int8pack_mm(x, codes, x.new_ones(len(codes))).mul_(scale)
    return F.linear(x, codes.to(x.dtype)).mul_(scale)


def _aligned(codes: Tensor) -> bool:
    """Whether rows of as many 2-byte numbers, one after another, all begin at a multiple of 32 bytes; and the codes."""
    return codes.shape[1] % 16 == 0 and codes.data_ptr() % 64 == 0 and codes.is_contiguous()
