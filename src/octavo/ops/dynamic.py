"""The dynamic data type of 8 bits (arXiv 1511.04561): its relative precision is nearly the same over 7 decades."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@cache
def dynamic_code(*, signed: bool = True) -> Tensor:
    """The 256 values of the data type, ascending, float32 on the CPU.

    Seven decades 10^-6 .. 10^0, each with twice as many linear steps as the one below it: 1, 2, .. 64 of both signs,
    or 2, 4, .. 128 without a sign; then 0 and 1.
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (0 if signed else 1)) + 1, dtype=torch.float32)
        steps = 10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*steps.tolist(), *((-steps).tolist() if signed else [])]
    return torch.tensor(sorted(values), dtype=torch.float32)


# Upper bits of a float32: exponent and 7 bits of the mantissa. Floats that agree in them have one edge between at most.
SHIFT = 16
LOWEST = int(torch.tensor(2.0**-23).view(torch.int32)) >> SHIFT  # smaller magnitudes are nearest to zero
ZERO = 127  # the index of 0 in the signed data type; it is 0 in the unsigned one


BINS = 2**16  # of bitsandbytes' CPU code


@cache
def _bins() -> Tensor:
    """(65536,) uint8: the signed quantized value that is nearest to the middle of each bin."""
    code, middles = dynamic_code(), torch.arange(BINS, dtype=torch.float32) / (BINS - 1) * 2 - 1
    return torch.bucketize(middles, (code[1:] + code[:-1]) / 2).to(torch.uint8)


def nearest_of_bins(values: Tensor) -> Tensor:
    """The signed quantized values, uint8, of float32 `values` in -1 .. 1 on the CPU, with the bytes of bitsandbytes.

    Its CPU code looks a value up in BINS even bins: about one in 500 gets the neighbor of the nearest quantized value.
    """
    bins = (values.nan_to_num(nan=-1.0).clamp_(-1, 1) + 1) * ((BINS - 1) / 2) + 0.5
    return _bins()[bins.long()]


class Levels(NamedTuple):
    """The magnitudes of the data type as levels 0, 1, .., and tables to find the nearest level of a float."""

    values: Tensor  # (256,) float32: the value of each quantized value
    edges: Tensor  # float32: level n is the nearest up to edges[n], the mean of its value and the next
    starts: Tensor  # uint8: the nearest level of the smallest float with these upper bits


@cache
def levels(device: torch.device, *, signed: bool) -> Levels:
    """The tables of the data type on a device."""
    values = dynamic_code(signed=signed)
    magnitudes = values[ZERO if signed else 0 :]
    edges = torch.cat([(magnitudes[1:] + magnitudes[:-1]) / 2, torch.tensor([torch.inf])])
    stop = int(torch.ones(()).view(torch.int32)) >> SHIFT
    least = (torch.arange(LOWEST, stop + 1, dtype=torch.int32) << SHIFT).view(torch.float32)
    starts = torch.bucketize(least, edges)
    assert (starts.diff() <= 1).all(), "more than one edge between floats with the same upper bits"
    return Levels(values.to(device), edges.to(device), starts.to(torch.uint8).to(device))


def nearest(values: Tensor, tables: Levels, *, signed: bool) -> Tensor:
    """The nearest quantized values, int32, of float32 `values` in -1 .. 1, or 0 .. 1; ties go towards zero.

    The signed data type has no -1.
    """
    magnitude = values.abs()
    upper = ((magnitude.view(torch.int32) >> SHIFT) - LOWEST).clamp_(0, len(tables.starts) - 1)
    level = tables.starts[upper].int()
    level += magnitude > tables.edges[level]
    return torch.where(values < 0, ZERO - level, ZERO + level).clamp_min_(0) if signed else level
