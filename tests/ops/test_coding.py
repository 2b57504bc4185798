"""An activation that is coded as it comes: the codes, scales and thin product of one that is written first.

Where there is a card its twin is compiled for it; else it runs in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from octavo.ops import coding, eight
from octavo.ops.frozen import Frozen, take_apart
from octavo.ops.linear import LowRank
from octavo.ops.mix import Context, Gelu, Piece, Swiglu
from octavo.ops.quantize import SCHEMES
from octavo.ops.room import Coding
from octavo.ops.wide import Wide

CARD = torch.cuda.is_available()
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CARD else [])
pytestmark = [pytest.mark.filterwarnings("default")] if CARD else []


@pytest.fixture(autouse=True)
def where_kernels_run() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda" if CARD else "cpu"), torch.no_grad():
        yield


def kernel(name: str) -> Any:
    return getattr(import_module("octavo.kernels.coding"), f"{name}_coded_into")


def room(m: int, f: int, rank: int, dtype: torch.dtype) -> Coding:
    """t is columns of a wider matrix."""
    a = (torch.randn(rank, f) * f**-0.5).to(dtype) if rank else None
    t = torch.full((m, rank + 5), 9.0).to(dtype)[:, 2 : rank + 2] if rank else None
    return Coding(torch.zeros(m, f, dtype=torch.int8), torch.zeros(m), a, t)


def given(m: int, f: int, parts: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(m, parts * f + 7) * torch.logspace(-2, 1, m)[:, None]).to(dtype)[:, 3 : parts * f + 3]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("m", "f", "rank"), [(5, 100, 5), (33, 1100, 16), (17, 520, 24), (20, 600, 0)])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_the_twin_is_the_activation_then_its_codes_and_thin_product(
    name: str, m: int, f: int, rank: int, dtype: torch.dtype
) -> None:
    x, found = given(m, f, 1 if name == "gelu" else 2, dtype), room(m, f, rank, dtype)
    y = x.new_empty(m, f)
    pointwise, codes = import_module("octavo.kernels.pointwise"), import_module("octavo.kernels.eight")
    getattr(pointwise, f"{name}_into")(x, y)
    wanted, scale = torch.empty_like(found.codes), torch.empty_like(found.scale)
    codes.code_rows_into(y, wanted, scale, None)
    kernel(name)(x, found)
    steps = (found.codes.int() - wanted.int()).abs()
    assert int(steps.max()) <= (1 if CARD else 0)  # a card may join a product and a sum in the one and not in the other
    assert float((steps > 0).float().mean()) < 1e-3
    torch.testing.assert_close(found.scale, scale, rtol=2.0**-8 if CARD else 0, atol=0)
    if found.t is not None and found.a is not None:
        near = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        exact = y.double() @ found.a.double().T
        assert float((found.t - exact).norm() / exact.norm()) < near
        beside = found.t._base
        assert beside is not None
        assert bool((beside[:, :2] == 9).all() and (beside[:, -3:] == 9).all())


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("twin", [True, False])
def test_what_is_not_finite_stays_so_and_hurts_no_other_row(what: float, twin: bool) -> None:
    x, found = given(20, 600, 2, torch.float32), room(20, 600, 3, torch.float32)
    x[3, 700] = what  # of up; gate beside it is not zero
    x[5] = 0
    with np.errstate(invalid="ignore"):
        (kernel("swiglu") if twin else coding.swiglu_coded_into)(x, found)
    assert not bool(found.scale[3].isfinite())
    others = torch.arange(20) != 3
    assert bool(found.scale[others].isfinite().all())
    assert found.t is not None
    assert bool(found.t[others].isfinite().all())
    assert bool((found.codes[5] == 0).all())
    assert bool((found.codes[others & (torch.arange(20) != 5)].abs().amax(1) == 127).all())


@pytest.mark.parametrize("piece", [Gelu(48), Swiglu(48)], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("case", ["", "no pair", "exact", "apart", "dropout"])
def test_a_product_is_the_same_whether_its_input_stood(
    piece: Piece, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it stands where channels are apart, pairs read what dropout leaves of it, or the product is exact."""
    parts = SCHEMES["int8"].quantise(torch.randn(32, 48))

    def fill(out: Tensor) -> None:
        out.copy_(parts["weight"] * (parts["absmax"] / 127)[:, None])

    pairs = () if case == "no pair" else (LowRank(0, 32, torch.randn(5, 48), torch.randn(32, 5), 2.0),)
    codes = None if case == "exact" else lambda like: (parts["weight"], parts["absmax"])
    apart = take_apart(torch.arange(16), 48) if case == "apart" else None
    dropout = 0.5 if case == "dropout" else 0
    wide = Wide((Frozen(32, 48, fill, None, 0, pairs, dropout, codes, None, apart),))
    u, context = torch.randn(9, piece.inputs), Context(1, 9, (torch.empty(0), torch.empty(0)))

    def product() -> tuple[Tensor, bool]:
        made = wide.room(9, u)
        piece.forward(u, made, context, hold=False)
        wide.complete_(made, [3])
        return wide.product(made), isinstance(made.parts[0], eight.Coded)

    found, coded = product()
    assert coded == (case in ("", "no pair"))
    monkeypatch.setattr(Wide, "_thin", lambda *_: None)
    wanted, coded = product()
    assert not coded
    assert torch.equal(found, wanted)
