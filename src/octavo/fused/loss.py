"""The language-model head and its cross-entropy in one, in chunks of rows.

The full logits of GPT-J at 2048 tokens are 394 MiB in float32, and training holds two or three copies. Here a
chunk's logits exist only while its loss is taken.

Legend: hidden is (M, d), labels (M,), the head is (V, d).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from octavo.layers.fused_linear import FusedLinear
from octavo.ops.loss import cross_entropy_
from octavo.runtime.dispatch import kernels_run_on

CHUNK_BYTES = 96 * 2**20  # of one chunk's logits with all that is made of them


def cross_entropy_sum(hidden: Tensor, labels: Tensor, head: FusedLinear) -> Tensor:
    """Sum over the labelled positions of -log softmax(head(hidden))[label], a float32 scalar.

    A position with a negative label costs only its share of the matmuls: leave such positions out where that is free.

    Gradients are taken in forward, chunk by chunk while the logits exist: two matmuls with the head instead of
    three, and nothing kept but the gradient (M, d) and those of what the head trains. Without grad mode only the
    sum is taken.
    """
    wants = torch.is_grad_enabled()
    total: Tensor = _CrossEntropy.apply(hidden, labels, head, wants, *head.trained)  # type: ignore[no-untyped-call]
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: FusedLinear, wants: bool, *trained: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = wants and hidden.requires_grad
        any_trained = wants and any(tensor.requires_grad for tensor in trained)
        matrix = head.matrix(hidden)
        gradient = torch.empty_like(hidden) if to_hidden else None
        factors: list[Tensor | None] = [None] * len(trained)
        size = _chunk(hidden, head)
        for start in range(0, len(hidden), size):
            rows, dropout_seeds = hidden[start : start + size], head.dropout_seeds()
            gemm_input = head.gemm_input(len(rows), hidden)
            gemm_input.put(rows)
            head.complete_(gemm_input, dropout_seeds)
            logits = F.linear(gemm_input.whole, matrix)
            total += cross_entropy_(logits, labels[start : start + size], gradient=to_hidden or any_trained).sum()
            if not (to_hidden or any_trained):
                continue
            dx, found = head.backward(logits, gemm_input, dropout_seeds, grad_input=to_hidden, matrix=matrix)
            if gradient is not None:
                assert dx is not None
                gradient[start : start + size] = dx[0]
            factors = [
                new if old is None or new is None else old + new for old, new in zip(factors, found, strict=True)
            ]
        ctx.gradients = [gradient, *factors]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradient, *factors = (None if one is None else (one * grad).to(one.dtype) for one in ctx.gradients)
        ctx.gradients = []
        return gradient, None, None, None, *factors


def _chunk(hidden: Tensor, head: FusedLinear) -> int:
    """Rows whose logits fit CHUNK_BYTES; the definition has a float32 copy beside them."""
    each = hidden.itemsize + (0 if kernels_run_on(hidden) or hidden.is_meta else 8)
    return max(1, CHUNK_BYTES // (each * head.parts[0].rows))
