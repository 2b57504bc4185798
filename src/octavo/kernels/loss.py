"""Cross-entropy; its gradient is written over the logits. Reference: ops/loss.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.pointwise import as_float32, slow_float16

WIDTH = 8192  # logits of a row that a program loads at once


def cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool, softcap: float | None = None) -> Tensor:
    m, v = logits.shape
    losses = torch.empty(m, dtype=torch.float32, device=logits.device)
    _cross_entropy[(m,)](
        logits, labels, losses, v, logits.stride(0), gradient, softcap or 0.0, slow_float16(logits), WIDTH, num_warps=16
    )
    return losses


@triton.jit
def _cross_entropy(
    logits, labels, losses, V: tl.constexpr, stride, GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOW_FLOAT16: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    label = tl.load(labels + row)
    counts = label >= 0  # a negative label is ignored
    largest = tl.full((WIDTH,), float("-inf"), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, V, WIDTH):
        column = start + tl.arange(0, WIDTH)
        value = _load(row_logits, column, V, SOFTCAP, SLOW_FLOAT16)
        new = tl.maximum(largest, value)
        # Online softmax (arXiv 1805.02867), one maximum and sum a lane. In a lane without a finite logit so far both
        # are -inf, and exp(-inf + inf) would be NaN.
        total = total * tl.where(largest == new, 1.0, tl.exp(largest - new)) + tl.where(
            value == float("-inf"), 0.0, tl.exp(value - new)
        )
        largest = new
    top = tl.max(largest)
    whole = tl.sum(total * tl.exp(largest - top))
    log_sum = top + tl.log(whole)
    loss = log_sum - _load(row_logits, tl.maximum(label, 0), V, SOFTCAP, SLOW_FLOAT16)
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        for start in range(0, V, WIDTH):
            column = start + tl.arange(0, WIDTH)
            value = _load(row_logits, column, V, SOFTCAP, SLOW_FLOAT16)
            slope = tl.exp(value - log_sum) - tl.where(column == label, 1.0, 0.0)
            slope = tl.where(counts, slope, 0.0)
            if SOFTCAP > 0:
                share = tl.where(column < V, value, 0.0) / SOFTCAP
                slope *= 1 - share * share
            tl.store(row_logits + column, slope.to(logits.dtype.element_ty), mask=column < V)


@triton.jit
def _load(row_logits, column, V: tl.constexpr, SOFTCAP: tl.constexpr, SLOW_FLOAT16: tl.constexpr):
    """The logits of some columns in float32, -inf beyond the last; c tanh(logit / c) if SOFTCAP is c and not 0."""
    value = as_float32(tl.load(row_logits + column, mask=column < V, other=float("-inf")), SLOW_FLOAT16)
    if SOFTCAP > 0:
        # tanh(z) = 2 sigmoid(2 z) - 1, which is -1 where exp overflows
        capped = SOFTCAP * (2 / (1 + tl.exp(-2 * value / SOFTCAP)) - 1)
        value = tl.where(column < V, capped, float("-inf"))
    return value
