"""The mathematics of low-rank changes s B A, from their factors: the matrix (N, K) itself is never formed.

    <X, Y> = trace(X^T Y) = s_x s_y sum((A_x A_y^T) * (B_x^T B_y))       two Gram matrices (r_x, r_y)
    ||X||_F = sqrt(<X, X>)
    X = Q_B C Q_A^T, C = s R_B R_A^T (k, l)                              QR of B and of A^T

The singular values of X are those of the small core C, so the best approximation of a rank (Eckart and Young, 1936)
needs an SVD of C alone. All of it is computed in float64.

Legend: r rank, K inputs and N outputs of a linear. Of an embedding the change is (d, V) in place of (N, K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Change = tuple[Tensor, Tensor, float]  # A (r, K), B (N, r), scaling s: the change s B A of a weight


def inner(x: Change, y: Change) -> float:
    """trace(X^T Y) of two changes of one weight, of any two ranks."""
    (a_x, b_x, s_x), (a_y, b_y, s_y) = x, y
    grams = a_x.double() @ a_y.double().T, b_x.double().T @ b_y.double()  # (r_x, r_y) each
    return s_x * s_y * float((grams[0] * grams[1]).sum())


def norm(change: Change) -> float:
    """||s B A||_F."""
    return math.sqrt(max(0.0, inner(change, change)))  # rounding may make it negative


def stacked(changes: Sequence[Change]) -> Change:
    """The sum of changes of one weight, as factors of the sum of their ranks: [A_1; A_2; ..] and [B_1, B_2, ..].

    The scaling is the one that is largest in size. The others go into their B, as a ratio of at most 1. So one change
    alone, or several of one scaling, keep their values, and each other B is rounded once. float32.
    """
    scaling = max((s for _, _, s in changes), key=abs)
    ratios = [s / scaling if scaling else 0.0 for _, _, s in changes]
    a = torch.cat([a.float() for a, _, _ in changes])  # (r, K)
    b = torch.cat(
        [
            b.float() if ratio == 1 else (b.double() * ratio).float()
            for (_, b, _), ratio in zip(changes, ratios, strict=True)
        ],
        dim=1,
    )  # (N, r)
    return a, b, scaling


def difference_norm(x: Change, y: Change) -> float:
    """||X - Y||_F. Unlike ||X||^2 - 2 <X, Y> + ||Y||^2, which cancels, it is accurate for changes that are close."""
    (a_x, b_x, s_x), (a_y, b_y, s_y) = x, y
    if s_x == s_y and torch.equal(a_x, a_y) and torch.equal(b_x, b_y):
        return 0.0
    a = torch.cat([a_x.double(), a_y.double()])  # (r_x + r_y, K)
    b = torch.cat([s_x * b_x.double(), -s_y * b_y.double()], dim=1)  # (N, r_x + r_y)
    return float(torch.linalg.matrix_norm(_core(a, b)[1]))


@dataclass(frozen=True)
class Truncated:
    """A change of a lower rank, and the squares of the norms of what was cut off and of the whole."""

    change: Change
    cut: float
    whole: float

    @property
    def error(self) -> float:
        """||X - X'||_F / ||X||_F."""
        return math.sqrt(self.cut / self.whole) if self.whole else 0.0


def truncated(change: Change, rank: int) -> Truncated:
    """The best approximation of `change` of a rank, with the scaling 1. One that has no higher rank is not changed."""
    a, b, scaling = change
    if len(a) <= rank:
        return Truncated(change, 0.0, inner(change, change))
    q_b, core, q_a = _core(a.double(), scaling * b.double())  # (N, k), (k, l), (K, l)
    u, values, vt = torch.linalg.svd(core, full_matrices=False)
    root = values[:rank].sqrt()
    new_a = root[:, None] * (vt[:rank] @ q_a.T)  # (rank, K)
    new_b = (q_b @ u[:, :rank]) * root  # (N, rank)
    squares = values.square()
    return Truncated((new_a.float(), new_b.float(), 1.0), float(squares[rank:].sum()), float(squares.sum()))


def _core(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_B (N, k), C (k, l), Q_A (K, l)) with B A = Q_B C Q_A^T, of A (r, K) and B (N, r) in float64."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    return q_b, r_b @ r_a.T, q_a
