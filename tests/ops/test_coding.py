"""What is coded as it comes: the very output, codes and scales of what is written first and coded then.

Where there is a card the twins are compiled for it; else they run in Triton's interpreter.
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

from octavo.ops import coding
from octavo.ops.eight import Coded
from octavo.ops.frozen import Frozen, take_apart
from octavo.ops.linear import LowRank
from octavo.ops.mix import Context, Gelu, Piece, Swiglu
from octavo.ops.quantize import SCHEMES
from octavo.ops.wide import Wide

CARD = torch.cuda.is_available()
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CARD else [])
pytestmark = [pytest.mark.filterwarnings("default")] if CARD else []


@pytest.fixture(autouse=True)
def where_kernels_run() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda" if CARD else "cpu"), torch.no_grad():
        yield


def columns(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes."""
    return (torch.randn(m, n + 7) * torch.logspace(-2, 1, m)[:, None]).to(dtype)[:, 3 : n + 3]


def empty(m: int, n: int) -> Coded:
    return Coded(torch.zeros(m, n, dtype=torch.int8), torch.zeros(m))


def given(name: str, m: int, n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What goes in."""
    if "norm" in name:
        return columns(m, n, dtype), torch.rand(n) + 0.5, torch.randn(n) if name == "layer norm" else None, 1e-5
    return (columns(m, n if name == "gelu" else 2 * n, dtype),)


NAMES = {"gelu": "gelu", "swiglu": "swiglu", "layer norm": "norm", "RMS norm": "norm"}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(3, 100), (2, 2100), (1, 16400)])
@pytest.mark.parametrize("name", NAMES)
def test_a_twin_is_what_is_written_and_then_coded(name: str, m: int, n: int, dtype: torch.dtype) -> None:
    pointwise, eight, own = (import_module(f"octavo.kernels.{room}") for room in ("pointwise", "eight", "coding"))
    inputs, found, wanted = given(name, m, n, dtype), empty(m, n), empty(m, n)
    out, y = columns(m, n, dtype), torch.empty(m, n, dtype=dtype)
    whole = out._base
    assert whole is not None
    before = whole.clone()
    getattr(pointwise, f"{NAMES[name]}_into")(*inputs, y)
    getattr(own, f"{NAMES[name]}_coded_into")(*inputs, out, found)
    eight.code_rows_into(out, *wanted, None)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scale, wanted.scale)
    # A card may join a product and a sum into one rounding in the one and not in the other.
    near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype] if CARD else 0
    torch.testing.assert_close(out, y, rtol=near, atol=near)
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, n + 3 :], before[:, n + 3 :])


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("twin", [True, False])
def test_what_is_not_finite_stays_so_and_hurts_no_other_row(what: float, twin: bool) -> None:
    (x,), found, out = given("swiglu", 9, 600, torch.float32), empty(9, 600), torch.empty(9, 600)
    x[3, 700] = what  # of up; gate beside it is not zero
    x[5] = 0
    with np.errstate(invalid="ignore"):
        (import_module("octavo.kernels.coding") if twin else coding).swiglu_coded_into(x, out, found)
    others = torch.arange(9) != 3
    assert not bool(found.scale[3].isfinite())
    assert bool(found.scale[others].isfinite().all())
    assert bool((found.codes[5] == 0).all())
    assert bool((found.codes[others & (torch.arange(9) != 5)].abs().amax(1) == 127).all())


@pytest.mark.parametrize("piece", [Gelu(48), Swiglu(48)], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("case", ["", "exact", "apart", "dropout"])
def test_a_product_is_the_same_however_its_input_was_coded(piece: Piece, case: str) -> None:
    """And its input is coded later where channels are apart, and never where the product is exact."""
    parts = SCHEMES["int8"].quantise(torch.randn(32, 48))

    def fill(out: Tensor) -> None:
        out.copy_(parts["weight"] * (parts["absmax"] / 127)[:, None])

    pairs = (LowRank(0, 32, torch.randn(5, 48), torch.randn(32, 5), 2.0),)
    codes = None if case == "exact" else lambda like: (parts["weight"], parts["absmax"])
    apart = take_apart(torch.arange(16), 48) if case == "apart" else None
    wide = Wide((Frozen(32, 48, fill, None, 0, pairs, 0.5 if case == "dropout" else 0, codes, None, apart),))
    u, context = torch.randn(9, piece.inputs), Context(1, 9, (torch.empty(0), torch.empty(0)))

    def product(*, at_once: bool) -> Tensor:
        made = wide.room(9, u)
        if not at_once:
            made.add_codes = lambda: None  # type: ignore[method-assign]
        piece.forward(u, made, context, hold=False)
        assert bool(made.codes) == (at_once and case in ("", "dropout"))
        wide.complete_(made, [3])
        return wide.product(made)

    torch.testing.assert_close(product(at_once=True), product(at_once=False), rtol=1e-4 if CARD else 0, atol=1e-4)
