"""The language-model head and its cross-entropy in one, in chunks of rows.

The full logits of GPT-J at 2048 tokens are 394 MiB in float32, and training would have two or three copies. Here the
logits of a chunk exist only while its loss is computed.

Legend: M rows (positions), d the width, V the vocabulary, m the rows of a chunk, C extra
columns (layers/fused_linear.py); hidden is (M, d), labels (M,), the head (V, d).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.layers.dropout import Dropout
from octavo.layers.fused_linear import FusedLinear, Seeds
from octavo.layers.gemm_input import GemmInput
from octavo.ops.loss import cross_entropy_
from octavo.runtime.dispatch import kernels_run_on

# Of one chunk's logits and their copies: chunks of hundreds of rows still fill a GPU.
CHUNK_BYTES = 96 * 2**20
TILE_ROWS = 4096  # of the head that are dequantized at a time, if it is tiled: whole blocks of every scheme


def cross_entropy_sum(
    hidden: Tensor, labels: Tensor, head: FusedLinear, dropout: Dropout, weights: Tensor | None = None,
    *, softcap: float | None = None, tiled: bool = False,
) -> Tensor:  # fmt: skip
    """Sum over the labelled positions of -weight log softmax(logits)[label], a float32 scalar.

    The logits are head(hidden), or with a `softcap` c: c tanh(head(hidden) / c). `weights` (M,) float32 are 1 by
    default. Positions with a negative label have no loss, but take part in the matmuls: a caller drops them first
    (objective.py). The head is exact, never in 8 bits.

    Gradients are computed in forward, chunk by chunk while the logits exist: two matmuls with the head instead of
    three. Saved are the gradient to `hidden` (M, d) and those of the trained tensors of the head. Without grad mode
    only the sum is computed.

    The head is dequantized once, or if `tiled` in tiles of TILE_ROWS rows, twice for each chunk: less memory by most of
    the head in the compute type, 1.9 GiB with the vocabulary of Gemma 3 12B.
    """
    grad_mode = torch.is_grad_enabled()
    total: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, labels, head, dropout, weights, softcap, tiled, grad_mode, *head.trained
    )
    return total


@torch.no_grad()
def cross_entropy_each(
    hidden: Tensor, labels: Tensor, head: FusedLinear, dropout: Dropout, *, softcap: float | None = None,
    tiled: bool = False,
) -> Tensor:  # fmt: skip
    """(M,) float32: the loss of each position, of which `cross_entropy_sum` is the sum; without gradients."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    matrix = None if tiled else head.matrix(hidden)  # (V, d + C)
    size = _chunk(hidden, head, softcap)
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        gemm_input, _ = _head_input(hidden[chunk], head, dropout)
        logits = _times_head(gemm_input.whole, head, matrix)  # (m, V)
        losses[chunk] = cross_entropy_(logits, labels[chunk], gradient=False, softcap=softcap)
        del logits  # before those of the next chunk are allocated
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: FusedLinear, dropout: Dropout, weights: Tensor | None,
        softcap: float | None, tiled: bool, grad_mode: bool, *trained: Tensor,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = grad_mode and hidden.requires_grad
        any_trained = grad_mode and any(tensor.requires_grad for tensor in trained)
        matrix = None if tiled else head.matrix(hidden)  # (V, d + C), dequantized once for all chunks
        gradient = torch.empty_like(hidden) if to_hidden else None  # (M, d)
        sums: list[Tensor | None] = [None] * len(trained)  # of the gradients of LoRA and bias over the chunks
        size, wants_gradient = _chunk(hidden, head, softcap), to_hidden or any_trained
        for start in range(0, len(hidden), size):
            gemm_input, dropout_seeds = _head_input(hidden[start : start + size], head, dropout)
            logits = _times_head(gemm_input.whole, head, matrix)  # (m, V), the gradient after the next line
            losses = cross_entropy_(
                logits, labels[start : start + size], gradient=wants_gradient, softcap=softcap
            )  # (m,)
            if weights is not None:
                losses = losses * weights[start : start + size]
                logits *= weights[start : start + size, None]  # they are the gradient now
            total += losses.sum()
            if not wants_gradient:
                continue
            joined = _times_head_transposed(logits, head, matrix) if to_hidden else None  # (m, d + C)
            dx, gradients = head.backward(logits, gemm_input, dropout_seeds, wants_dx=to_hidden, joined=joined)
            if gradient is not None:
                assert dx is not None
                gradient[start : start + size] = dx[0]
            sums = [new if old is None or new is None else old + new for old, new in zip(sums, gradients, strict=True)]
            del logits, joined, dx  # before those of the next chunk are allocated
        ctx.gradients = [gradient, *sums]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradient, *sums = (None if one is None else (one * grad).to(one.dtype) for one in ctx.gradients)
        ctx.gradients = []
        return gradient, *[None] * 7, *sums


def _head_input(rows: Tensor, head: FusedLinear, dropout: Dropout) -> tuple[GemmInput, Seeds]:
    """The input (m, d + C) of the head's matmul for `rows` (m, d), and the seeds of its dropout masks."""
    dropout_seeds = head.dropout_seeds(dropout)
    gemm_input = head.gemm_input(len(rows), rows)
    gemm_input.put(rows)
    head.complete_(gemm_input, dropout_seeds)
    return gemm_input, dropout_seeds


def _times_head(x: Tensor, head: FusedLinear, matrix: Tensor | None) -> Tensor:
    """x (m, d + C) times the head's `matrix` (V, d + C), or tile by tile: (m, V)."""
    if matrix is not None:
        return F.linear(x, matrix)
    logits = x.new_empty(len(x), head.parts[0].rows)
    for rows, tile in head.tiles(x, TILE_ROWS):
        torch.mm(x, tile.T, out=logits[:, rows])
    return logits


def _times_head_transposed(dlogits: Tensor, head: FusedLinear, matrix: Tensor | None) -> Tensor:
    """dlogits (m, V) times `matrix`, or the sum over its tiles in float32: (m, d + C)."""
    if matrix is not None:
        return dlogits @ matrix
    total = dlogits.new_zeros(len(dlogits), head.width, dtype=torch.float32)
    for rows, tile in head.tiles(dlogits, TILE_ROWS):
        total += dlogits[:, rows] @ tile
    return total.to(dlogits.dtype)


def _chunk(hidden: Tensor, head: FusedLinear, softcap: float | None) -> int:
    """Rows of a chunk: their logits fit CHUNK_BYTES. Meta counts as a GPU.

    The reference also has two float32 copies of the logits, and two more with a soft-cap.
    """
    copies = 0 if kernels_run_on(hidden) or hidden.is_meta else 2 if softcap is None else 4
    each = hidden.itemsize + 4 * copies
    return max(1, CHUNK_BYTES // (each * head.parts[0].rows))
