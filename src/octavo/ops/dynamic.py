"""The dynamic code of 8 bits (arXiv 1511.04561), which resolves small numbers as finely as large ones, relatively."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@cache
def dynamic_code(*, signed: bool = True) -> Tensor:
    """The 256 values of the code, ascending, float32 on the CPU.

    Seven decades 10^-6 .. 10^0, each with twice as many linear steps as the one below it: 1, 2, .. 64 of both signs, or
    without a sign 2, 4, .. 128; then 0 and 1.
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1, dtype=torch.float32)
        steps = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*steps.tolist(), *((-steps).tolist() if signed else [])]
    return torch.tensor(sorted(values), dtype=torch.float32)


SHIFT = 16  # of a float32: its exponent and 7 bits are left, and numbers alike in those straddle one edge at most
LOWEST = int(torch.tensor(2.0**-23).view(torch.int32)) >> SHIFT  # below it everything is nearest to zero
ZERO = 127  # the place of 0 in the signed code; in the other one it is 0


class Ladder(NamedTuple):
    """The magnitudes of a code as levels 0, 1, .., and what finds the level nearest to a number at once."""

    values: Tensor  # (256,) float32: of each code
    edges: Tensor  # float32: level n is nearest up to edges[n], the mean of its value and the next
    starts: Tensor  # uint8: the level nearest to the least of all numbers that begin alike


@cache
def ladder(device: torch.device, *, signed: bool) -> Ladder:
    """The tables of a code on a device."""
    values = dynamic_code(signed=signed)
    levels = values[ZERO if signed else 0 :]
    edges = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])])
    stop = int(torch.ones(()).view(torch.int32)) >> SHIFT
    least = (torch.arange(LOWEST, stop + 1, dtype=torch.int32) << SHIFT).view(torch.float32)
    starts = torch.bucketize(least, edges)
    assert (starts.diff() <= 1).all(), "an edge would be passed over"
    return Ladder(values.to(device), edges.to(device), starts.to(torch.uint8).to(device))


def nearest(shares: Tensor, codes: Ladder, *, signed: bool) -> Tensor:
    """The code nearest to each of `shares`, float32 in -1 .. 1 or 0 .. 1; of two as near the one nearer to zero. int32.

    The signed code has no -1.
    """
    magnitude = shares.abs()
    alike = ((magnitude.view(torch.int32) >> SHIFT) - LOWEST).clamp_(0, len(codes.starts) - 1)
    level = codes.starts[alike].int()
    level += magnitude > codes.edges[level]
    return torch.where(shares < 0, ZERO - level, ZERO + level).clamp_min_(0) if signed else level
