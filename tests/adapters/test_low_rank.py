"""The mathematics of low-rank changes, against the matrices B A themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.adapters.low_rank import Change, difference_norm, inner, norm, stacked, truncated

N, K = 7, 5
SCALINGS = st.floats(-4, 4).filter(lambda scaling: abs(scaling) > 1e-3)


def change(rank: int, scaling: float = 1.0, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Change:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, K, generator=generator), torch.randn(N, rank, generator=generator)
    return a.to(dtype), b.to(dtype), scaling


def formed(change: Change) -> Tensor:
    """s B A, (N, K)."""
    a, b, scaling = change
    return scaling * b.double() @ a.double()


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """A change of a rank up to more than the rows and columns of the matrix."""
    return change(draw(st.integers(1, 9)), draw(SCALINGS), seed=draw(st.integers(0, 99)))


@settings(max_examples=30, deadline=None)
@given(changes(), changes())
def test_norms_and_traces_are_those_of_the_matrices(x: Change, y: Change) -> None:
    assert norm(x) == pytest.approx(float(formed(x).norm()), rel=1e-9)
    assert inner(x, y) == pytest.approx(float((formed(x) * formed(y)).sum()), rel=1e-9, abs=1e-9)
    assert difference_norm(x, y) == pytest.approx(float((formed(x) - formed(y)).norm()), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(changes(), min_size=1, max_size=3))
def test_stacked_factors_are_the_sum(parts: list[Change]) -> None:
    a, b, scaling = whole = stacked(parts)
    assert len(a) == b.shape[1] == sum(len(part[0]) for part in parts)
    exact = sum(formed(part) for part in parts)
    # Each value of B is rounded to float32 once: a relative error of 2^-24 of each term at most.
    bound = 2**-24 * sum(abs(s) * b.double().abs() @ a.double().abs() for a, b, s in parts)
    assert ((formed(whole) - exact).abs() <= bound + 1e-12).all()
    assert scaling == max((part[2] for part in parts), key=abs)


def test_one_change_and_changes_of_one_scaling_keep_their_values() -> None:
    x, y = change(2, 0.3), change(3, 0.3, seed=1)
    a, b, scaling = stacked([x])
    assert (scaling, torch.equal(a, x[0]), torch.equal(b, x[1])) == (0.3, True, True)
    a, b, scaling = stacked([x, y])
    assert scaling == 0.3
    assert torch.equal(b, torch.cat([x[1], y[1]], dim=1))
    assert stacked([(*x[:2], 0.0)])[2] == 0.0  # alpha 0


@settings(max_examples=30, deadline=None)
@given(changes(), st.integers(1, 9))
def test_the_error_of_a_lower_rank_is_that_of_the_singular_values_cut_off(x: Change, rank: int) -> None:
    values = torch.linalg.svdvals(formed(x))
    result = truncated(x, rank)
    assert len(result.change[0]) <= min(rank, len(x[0]))
    tail = math.sqrt(float(values[rank:].square().sum()))
    whole = float(values.norm())
    assert result.error == pytest.approx(tail / whole, abs=1e-9)
    assert float((formed(result.change) - formed(x)).norm()) == pytest.approx(tail, abs=1e-5 * whole)


def test_a_rank_that_is_not_lower_changes_nothing() -> None:
    x = change(3, 0.5)
    result = truncated(x, 3)
    assert result.change is x
    assert result.error == 0
    assert truncated((torch.zeros(4, K), torch.zeros(N, 4), 2.0), 2).error == 0  # of nothing


def test_the_difference_of_close_changes_is_not_lost_in_rounding() -> None:
    a, b, scaling = change(4, 1.0, dtype=torch.float64)
    moved = b.clone()
    moved[0, 0] += 1e-10
    expected = 1e-10 * float(a[0].norm())
    assert difference_norm((a, b, scaling), (a, moved, scaling)) == pytest.approx(expected, rel=1e-4)
    assert difference_norm((a, b, scaling), (a.clone(), b.clone(), scaling)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_16_bits_are_computed_in_float64(dtype: torch.dtype) -> None:
    x = change(4, 3.0, dtype=dtype)
    assert norm(x) == pytest.approx(float(formed(x).norm()), rel=1e-9)
    assert stacked([x])[1].dtype == torch.float32
