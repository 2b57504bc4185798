"""The dynamic code against bitsandbytes' map and against looking at every value."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from octavo.ops.dynamic import dynamic_code, levels, nearest

either = pytest.mark.parametrize("signed", [True, False])
CPU = torch.device("cpu")


def shares(*, signed: bool) -> Tensor:
    """Numbers of every size, each value of the code, each edge between two and the floats around both."""
    code = dynamic_code(signed=signed)
    marks = torch.cat([code, (code[1:] + code[:-1]) / 2])
    around = torch.cat([marks, *(torch.nextafter(marks, torch.full_like(marks, far)) for far in (2.0, -2.0))])
    drawn = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 10.0 ** -torch.arange(20_000).remainder(9)
    found = torch.cat([around, drawn, -drawn]).clamp(-1 if signed else 0, 1)
    return found if signed else found.abs()


@either
def test_the_code_is_bitsandbytes_map(signed: bool) -> None:
    assert torch.equal(dynamic_code(signed=signed), bnb.create_dynamic_map(signed=signed))


@either
def test_the_nearest_code_is_found(signed: bool) -> None:
    given, tables = shares(signed=signed), levels(CPU, signed=signed)
    distance = (given.double()[:, None] - tables.values.double()).abs()
    found = nearest(given, tables, signed=signed)
    chosen = distance.gather(1, found[:, None].long())[:, 0]
    # Edges are rounded to float32, so what stands within a rounding of one may go either way.
    torch.testing.assert_close(chosen, distance.min(dim=1).values, rtol=0, atol=2.0**-24)
    assert (found.unique() == torch.arange(256)).all()


@either
def test_levels_are_quantized_to_themselves_and_zero_to_zero(signed: bool) -> None:
    tables = levels(CPU, signed=signed)
    assert torch.equal(nearest(tables.values, tables, signed=signed), torch.arange(256, dtype=torch.int32))
    assert tables.values[nearest(torch.tensor([0.0, 1e-12]), tables, signed=signed)].tolist() == [0, 0]


@either
def test_of_two_levels_as_near_the_smaller_is_selected(signed: bool) -> None:
    tables = levels(CPU, signed=signed)
    edges = tables.edges[:-1]
    level = nearest(edges, tables, signed=signed) - (127 if signed else 0)
    assert torch.equal(level, torch.arange(len(edges), dtype=torch.int32))
