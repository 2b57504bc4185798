"""An activation's backward in one pass with what low-rank pairs on both of its sides learn (LoRA, arXiv 2106.09685).

x, the input of an activation y = f(x), came out of pairs in front of it, and y went into one behind. These need

    dB = dx^T t      and dt = dx B, the gradient to t        of a pair in front, which added t B^T to x
    dA = after^T y                                           of the pair behind, whose A y^T has the gradient after

Taken one by one that is three more passes over the widest matrices of a model, and y a matrix of its own. Here x and dy
are read once, dx is written over x, and what is added up stays in registers: each program has some columns and a part
of the rows, so there are several sums of everything, which are added in an order that does not change.

Legend: M rows; x is (M, H F), H parts of F columns: GELU has one, SwiGLU two (gate, up), and each a pair of its own, of
rank r; the pair behind has rank q. S parts of the rows, C blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops.linear import mm_float32
from octavo.ops.pointwise import gelu_backward_, swiglu_backward_
from octavo.runtime.dispatch import hopper_kernels_run_on, kernel

PROGRAMS = 132  # one for each multiprocessor of an H100
ROWS = 64  # that a program takes at a time
# (columns, stages) of a program, the best first: wide ones make fewer sums, three stages let copies overlap both ways.
SHAPES = ((256, 3), (256, 2), (128, 3), (128, 2))
SHARED_BYTES = 227 * 1024 - 1024  # of a program's memory on an H100, without barriers


class LoraOperands(NamedTuple):
    """What an activation meets on its sides. `b` is None where nobody asks for the gradient to t."""

    t: Tensor  # (M, H r)
    b: Tensor | None  # (H F, r): B of each part, one under the other
    after: Tensor  # (M, q)


class PartialSums(NamedTuple):
    """Where all programs write theirs, float32."""

    t: Tensor | None  # (C, M, H r)
    b: Tensor  # (S, H F, r)
    a: Tensor  # (S, q, F)


class LoraGrads(NamedTuple):
    """Gradients: to t (M, H r), of B (H F, r) and of A (q, F), float32."""

    t: Tensor | None
    b: Tensor
    a: Tensor


def gelu_lora_backward_(x: Tensor, dy: Tensor, sides: LoraOperands) -> LoraGrads:
    """Writes dy gelu'(x) over x, both (M, F); dy is used up."""
    sums = _sums(x, dy, sides)
    gelu_lora_backward_into(x, dy, sides, sums)
    return _added(sums)


def swiglu_lora_backward_(x: Tensor, dy: Tensor, sides: LoraOperands) -> LoraGrads:
    """Writes the gradients of [gate | up], x (M, 2F), over these; dy (M, F) is used up."""
    sums = _sums(x, dy, sides)
    swiglu_lora_backward_into(x, dy, sides, sums)
    return _added(sums)


@kernel
def gelu_lora_backward_into(x: Tensor, dy: Tensor, sides: LoraOperands, sums: PartialSums) -> None:
    """`gelu_lora_backward_` into sums; where these are of one program, so by steps."""
    gelu_backward_(x, dy)
    lora_backward_by_steps(x, dy, sides, sums)


@kernel
def swiglu_lora_backward_into(x: Tensor, dy: Tensor, sides: LoraOperands, sums: PartialSums) -> None:
    """`swiglu_lora_backward_` into sums; where these are of one program, so by steps."""
    swiglu_backward_(x, dy)
    lora_backward_by_steps(x, dy, sides, sums)


def lora_backward_by_steps(dx: Tensor, y: Tensor, sides: LoraOperands, sums: PartialSums) -> None:
    """What pairs learn of dx (M, H F) and y (M, F), once these are written."""
    f, parts = y.shape[1], dx.shape[1] // y.shape[1]
    ranks = sides.t.split(sides.t.shape[1] // parts, dim=1)
    for part, (own, t) in enumerate(zip(dx.split(f, dim=1), ranks, strict=True)):
        sums.b[0, part * f : (part + 1) * f] = mm_float32(own.T, t)
        if sums.t is not None and sides.b is not None:
            columns = slice(part * t.shape[1], (part + 1) * t.shape[1])
            sums.t[0, :, columns] = mm_float32(own, sides.b[part * f : (part + 1) * f])
    sums.a[0] = mm_float32(sides.after.T, y)


def hopper_tile(x: Tensor, dy: Tensor, sides: LoraOperands) -> tuple[int, int] | None:
    """(columns, stages) of a program, where there is one that does all of it in one pass: on a Hopper."""
    parts = x.shape[1] // dy.shape[1]
    aligned = x.is_meta or x.data_ptr() % 16 == dy.data_ptr() % 16 == 0
    aligned = aligned and all(n % 8 == 0 for n in (*dy.stride()[:1], *x.stride()[:1], dy.shape[1]))
    there = x.is_meta or hopper_kernels_run_on(x)
    if x.itemsize != 2 or not aligned or not there:
        return None
    r, q = (max(16, 1 << (n - 1).bit_length()) for n in (sides.t.shape[1] // parts, sides.after.shape[1]))
    for columns, stages in SHAPES:
        numbers = stages * ROWS * ((parts + 1) * columns + parts * r + q) + parts * columns * r
        if 2 * numbers <= SHARED_BYTES:
            return columns, stages
    return None


def _sums(x: Tensor, dy: Tensor, sides: LoraOperands) -> PartialSums:
    """Room for the sums of all programs of a card that takes one pass; elsewhere there is one program."""
    (m, f), parts = dy.shape, x.shape[1] // dy.shape[1]
    rank, behind = sides.t.shape[1] // parts, sides.after.shape[1]
    blocks = splits = 1
    if (shape := hopper_tile(x, dy, sides)) is not None:
        blocks = -(-f // shape[0])
        splits = max(1, min(PROGRAMS // blocks, m // ROWS))
    empty = torch.empty(0, dtype=torch.float32, device=x.device).new_empty
    to_t = None if sides.b is None else empty(blocks, m, parts * rank)
    return PartialSums(to_t, empty(splits, parts * f, rank), empty(splits, behind, f))


def _added(sums: PartialSums) -> LoraGrads:
    """The sums of all programs."""
    t, b, a = (None if each is None else each[0] if len(each) == 1 else each.sum(dim=0) for each in sums)
    assert b is not None
    assert a is not None
    return LoraGrads(t, b, a)
