"""Batch-invariant matmuls of inference: with frozen weights, and with the LoRA adapters of the rows.

With few rows a matmul is bound by reading its weight, so int8 weights are multiplied as they are stored. Bias, LoRA
terms and the residual are added before the result is rounded.

Legend: M rows (positions of prompts, or one token of each request); K inputs and N outputs; n adapters of rank R, for
J = R x names of the matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.scheme import INT8_LEVELS
from octavo.ops.tiles import Phase, matmul_in_tiles
from octavo.runtime.dispatch import kernel

PIECE = 2**20  # elements of a weight that are converted to another dtype at once, so that they stay in cache


class BatchedLora(NamedTuple):
    """The LoRA terms of a matmul with an adapter for each row: t[m, name of output] B[adapter_ids[m]]."""

    t: Tensor  # (M, J) float32, from `shrink`
    b: Tensor  # (n, R, N)
    adapter_ids: Tensor  # (M,) the adapter of each row; 0 is the base model, whose A and B are zero
    names: Tensor  # (N,) int32: the block of R columns of `t` that an output reads
    spans: tuple[tuple[int, int], ...]  # the outputs of each name


@kernel
def matmul(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None = None,
    *,
    phase: Phase,
    bias: Tensor | None = None,
    bias_start: int = 0,
    lora: BatchedLora | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + x W^T + bias + LoRA terms, (M, N) in `dtype` (default: that of x); x is (M, K).

    W is `weight` (N, K) in a float dtype, or int8 with W = weight * absmax / 127 by rows. `bias` is added to the
    outputs from `bias_start` on; `residual` is (M, N). With `dtype` float32 the float32 sums are not rounded.
    """
    dtype = dtype or x.dtype
    y = _matmul(x.to(dtype), weight, absmax, phase)
    if bias is not None:
        y[:, bias_start : bias_start + bias.numel()] += bias
    if lora is not None:
        _add_lora_(y, lora, phase)
    return y if residual is None else residual + y


@kernel
def shrink(x: Tensor, a: Tensor, adapter_ids: Tensor, phase: Phase) -> Tensor:
    """(M, J) float32: x (M, K) times A^T, A (n, J, K) of the adapter of each row."""
    t = torch.zeros(len(x), a.shape[1], dtype=torch.float32, device=x.device)
    for number, rows in _rows_by_adapter(adapter_ids):
        factor = a[number].to(x.dtype)
        t[rows] = matmul_in_tiles(x[rows], phase, lambda tile, factor=factor: F.linear(tile, factor)).float()  # type: ignore[misc]
    return t


def _add_lora_(y: Tensor, lora: BatchedLora, phase: Phase) -> None:
    rank = lora.b.shape[1]
    for number, rows in _rows_by_adapter(lora.adapter_ids):
        t = lora.t[rows].to(lora.b.dtype)
        for (start, stop), part in zip(lora.spans, t.split(rank, dim=1), strict=True):
            factor = lora.b[number, :, start:stop]
            y[rows, start:stop] += matmul_in_tiles(part, phase, lambda tile, factor=factor: tile @ factor)  # type: ignore[misc]


def _rows_by_adapter(adapter_ids: Tensor) -> list[tuple[int, Tensor]]:
    """(adapter, indices of its rows) for each adapter of the rows except the base model."""
    return [
        (number, (adapter_ids == number).nonzero()[:, 0]) for number in adapter_ids.unique().tolist() if number != 0
    ]


def _matmul(x: Tensor, weight: Tensor, absmax: Tensor | None, phase: Phase) -> Tensor:
    """x (M, K) W^T in tiles of rows, (M, N)."""
    if absmax is None:
        return _linear(x, weight, phase, scale=1.0)
    if x.dtype == torch.float16:  # sums of int8 values would overflow at 65504; a power of two rounds nothing
        return _linear(x, weight, phase, scale=2.0**-7).mul_(absmax / INT8_LEVELS * 2**7)
    if phase is not Phase.PREFILL and x.dtype == torch.bfloat16 and x.device.type == "cpu" and _aligned(weight):
        # PyTorch's kernel: with one row 4 to 17 times as fast as a dequantized copy of the weight. It computes rows one
        # after another, each in the same order of sums, so no tiles are needed.
        x = x.clone(memory_format=torch.contiguous_format)  # its loads are aligned: it crashes on unaligned rows
        return torch._weight_int8pack_mm(x, weight, x.new_ones(len(weight))).mul_(absmax / INT8_LEVELS)
    return _linear(x, weight, phase, scale=1.0).mul_(absmax / INT8_LEVELS)


def _linear(x: Tensor, weight: Tensor, phase: Phase, *, scale: float) -> Tensor:
    """x (M, K) times scale * weight^T, (M, N); a weight of another dtype is converted in pieces."""
    if weight.dtype == x.dtype and scale == 1:
        return matmul_in_tiles(x, phase, lambda rows: F.linear(rows, weight))
    pieces = []
    for piece in weight.split(max(1, PIECE // weight.shape[1])):
        factor = piece.to(x.dtype)
        if scale != 1:
            factor = factor * scale
        pieces.append(matmul_in_tiles(x, phase, lambda rows, factor=factor: F.linear(rows, factor)))  # type: ignore[misc]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _aligned(weight: Tensor) -> bool:
    """Whether the weight starts at 64 bytes, and all rows of a contiguous 2-byte matrix of its width at 32 bytes."""
    return weight.shape[1] % 16 == 0 and weight.data_ptr() % 64 == 0 and weight.is_contiguous()
