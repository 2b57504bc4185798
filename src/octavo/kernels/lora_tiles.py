"""Tiles and partial sums of the Hopper kernel for an activation's backward with LoRA gradients.

A program has some columns and a part of the rows, and writes its own partial sums. They are added afterwards in one
order, so a step has the same bits again. Triton is not imported: the simulation of a step (train/simulate.py) allocates
the partial sums too.

Legend as in ops/lora_backward.py; S parts of the rows, C blocks of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from octavo.ops.lora_backward import LoraGrads, LoraOperands

# Multiprocessors of an H100 SXM and an H200. A constant, so that sums have one order on every Hopper GPU.
PROGRAMS = 132
ROWS = 64  # of a tile
SHARED_BYTES = 227 * 1024 - 1024  # of a program on Hopper, without barriers


class Tile(NamedTuple):
    """Columns of a program, and stages of its ring of tiles in shared memory."""

    columns: int
    stages: int


# The fastest first: wide tiles have fewer partial sums, with three stages loads and stores overlap with computation.
TILES = (Tile(256, 3), Tile(256, 2), Tile(128, 3), Tile(128, 2))


class PartialSums(NamedTuple):
    """The partial sums of all programs, float32."""

    t: Tensor | None  # (C, M, H r)
    b: Tensor  # (S, H F, r)
    a: Tensor  # (S, q, F)


def hopper_tile(x: Tensor, dy: Tensor, operands: LoraOperands) -> Tile | None:
    """The tile with which the Hopper kernel computes a call; None if it does not support the call."""
    parts = x.shape[1] // dy.shape[1]
    aligned = x.is_meta or x.data_ptr() % 16 == dy.data_ptr() % 16 == 0  # for TMA
    aligned = aligned and all(n % 8 == 0 for n in (*dy.stride()[:1], *x.stride()[:1], dy.shape[1]))
    if x.itemsize != 2 or not aligned:
        return None
    r, q = (max(16, 1 << (n - 1).bit_length()) for n in (operands.t.shape[1] // parts, operands.after.shape[1]))
    for tile in TILES:
        stage = ROWS * ((parts + 1) * tile.columns + parts * r + q)  # elements of x, dy, t and after
        if 2 * (tile.stages * stage + parts * tile.columns * r) <= SHARED_BYTES:
            return tile
    return None


def partial_sums(x: Tensor, dy: Tensor, operands: LoraOperands, tile: Tile | None) -> PartialSums:
    """Memory for the partial sums of all programs; one program if there is no tile."""
    (m, f), parts = dy.shape, x.shape[1] // dy.shape[1]
    r, q = operands.t.shape[1] // parts, operands.after.shape[1]
    blocks = -(-f // tile.columns) if tile is not None else 1
    splits = max(1, min(PROGRAMS // blocks, m // ROWS)) if tile is not None else 1
    empty = torch.empty(0, dtype=torch.float32, device=x.device).new_empty
    t = None if operands.b is None else empty(blocks, m, parts * r)  # (C, M, H r)
    return PartialSums(t, empty(splits, parts * f, r), empty(splits, q, f))


def sum_parts(sums: PartialSums) -> LoraGrads:
    """The sums over all programs."""
    t, b, a = (None if part is None else part[0] if len(part) == 1 else part.sum(dim=0) for part in sums)
    assert b is not None
    assert a is not None
    return LoraGrads(t, b, a)
