"""The language-model head and its cross-entropy in one, in chunks of rows.

The full logits of GPT-J at 2048 tokens are 394 MiB in float32, and training holds two or three copies. Here a
chunk's logits exist only while its loss is taken.

Legend: hidden is (M, d), labels (M,), the head is (V, d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label of a position that is not learned, as everywhere in the field
CHUNK_LOGITS = 16 * 2**20  # numbers in one chunk of logits: 64 MiB in float32

Head = Callable[[Tensor], Tensor]


def cross_entropy_sum(hidden: Tensor, labels: Tensor, head: Head, *, vocabulary: int) -> Tensor:
    """Sum over the labelled positions of -log softmax(head(hidden))[label], a float32 scalar.

    `head` maps (m, d) to logits (m, vocabulary). Positions labelled `IGNORE` cost nothing. Each chunk's logits
    are computed again in backward, so that whatever in the head is trained receives its gradient.
    """
    kept = labels != IGNORE
    hidden, labels = hidden[kept], labels[kept]
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, targets in _chunks(hidden, labels, vocabulary):
        total = total + checkpoint(_chunk_loss, rows, targets, head, use_reentrant=False)
    return total


def frozen_cross_entropy_sum(hidden: Tensor, labels: Tensor, head: Head, *, vocabulary: int) -> Tensor:
    """The same number for a head in which nothing is trained.

    The gradient to `hidden` is taken in forward, chunk by chunk while its logits exist: two products with the
    head instead of three, and nothing kept but that gradient (M, d). Without grad mode only the sum is taken.
    """
    kept = labels != IGNORE
    total: Tensor = _FrozenCrossEntropy.apply(hidden[kept], labels[kept], head, vocabulary)  # type: ignore[no-untyped-call]
    return total


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head, vocabulary: int) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients: list[Tensor] = []
        for rows, targets in _chunks(hidden, labels, vocabulary):
            if wants_gradient:
                with torch.enable_grad():
                    leaf = rows.detach().requires_grad_()
                    loss = _chunk_loss(leaf, targets, head)
                    gradients += torch.autograd.grad(loss, leaf)
            else:
                loss = _chunk_loss(rows, targets, head)
            total += loss.detach()
        if wants_gradient:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(gradient.dtype), None, None, None


def _chunk_loss(rows: Tensor, targets: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")


def _chunks(hidden: Tensor, labels: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return list(zip(hidden.split(size), labels.split(size), strict=True))
