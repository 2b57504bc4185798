"""A norm and rotary positions in one operation, forward and backward. tests/ops/test_attention.py has those alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.ops.pointwise import norm, norm_backward_into
from octavo.ops.rotary import (
    ROTATE_HALF,
    ROTATE_INTERLEAVED,
    norm_rotate_backward_into,
    norm_rotate_into,
    rotary_table,
    rotate,
    rotate_into,
)

BATCH, LENGTH, HEADS, SIZE, EPS = 2, 5, 3, 8, 1e-2
FREQUENCIES = torch.tensor([0.9, 0.4, 0.2, 0.1])
POSITIONS = {"a row's": torch.tensor([[0, 1, 2, 0, 1], [3, 4, 5, 6, 7]]), "all rows'": torch.arange(LENGTH)[None]}
every_table = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
every_form = pytest.mark.parametrize("form", [ROTATE_HALF, ROTATE_INTERLEAVED])
every_norm = pytest.mark.parametrize("width", [SIZE, HEADS * SIZE], ids=["of a head", "of all heads"])
every_weight = pytest.mark.parametrize("plus_one", [False, True], ids=["w", "1 + w"])


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def columns(values: Tensor) -> Tensor:
    """The same numbers as columns of a wider matrix."""
    buffer = torch.full((len(values), values.shape[1] + 5), 9.0, dtype=values.dtype)
    buffer[:, 2:-3] = values
    return buffer[:, 2:-3]


def surroundings_are_unchanged(values: Tensor) -> bool:
    whole = values._base
    assert whole is not None
    return bool((whole[:, :2] == 9).all() and (whole[:, -3:] == 9).all())


def two_steps(x: Tensor, weight: Tensor, table: tuple[Tensor, Tensor], form: str, *, plus_one: bool) -> Tensor:
    """The norm, then the rotation, as a plain block computes them."""
    normed = norm(x.unflatten(1, (-1, len(weight))), weight, None, EPS, zero_centred_weight=plus_one)
    heads = normed.reshape(-1, table[0].shape[1], HEADS, SIZE)
    if table[0].shape[0] == BATCH:
        heads = heads.view(BATCH, LENGTH, HEADS, SIZE)
    return rotate(heads, table, form).reshape(x.shape)


@every_table
@every_form
@every_norm
@every_weight
def test_a_norm_with_its_rotation_and_their_backward(positions: Tensor, form: str, width: int, plus_one: bool) -> None:
    x, weight, dy = random(BATCH * LENGTH, HEADS * SIZE, seed=0), random(width, seed=1), random(10, 24, seed=2)
    table = rotary_table(positions, FREQUENCIES)
    leaf = x.clone().requires_grad_()
    expected = two_steps(leaf, weight, table, form, plus_one=plus_one)
    (wanted,) = torch.autograd.grad(expected, leaf, dy)
    out, dx, over = columns(torch.zeros_like(x)), columns(torch.zeros_like(x)), columns(x)
    norm_rotate_into(columns(x), weight, EPS, *table, SIZE, form, out, zero_centred_weight=plus_one)
    assert torch.equal(out, expected)
    given = weight, EPS, *table, SIZE, form, columns(dy)
    norm_rotate_backward_into(columns(x), *given, dx, zero_centred_weight=plus_one)
    torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=2e-6)  # taken in float32
    norm_rotate_backward_into(over, *given, over, zero_centred_weight=plus_one)
    assert torch.equal(over, dx)
    assert all(surroundings_are_unchanged(made) for made in (out, dx, over))


@every_form
@every_weight
def test_both_round_as_two_operations(form: str, plus_one: bool) -> None:
    """In bfloat16 the bits of a norm whose output is rotated, and of a rotated gradient that goes through the norm."""
    x, dy = (random(BATCH * LENGTH, HEADS * SIZE, seed=seed, dtype=torch.bfloat16) for seed in (0, 2))
    weight, table = random(SIZE, seed=1, dtype=torch.float32), rotary_table(POSITIONS["a row's"], FREQUENCIES)
    out, dx, dn, wanted = (torch.empty_like(x) for _ in range(4))
    norm_rotate_into(x, weight, EPS, *table, SIZE, form, out, zero_centred_weight=plus_one)
    assert torch.equal(out, two_steps(x, weight, table, form, plus_one=plus_one))
    norm_rotate_backward_into(x, weight, EPS, *table, SIZE, form, dy, dx, zero_centred_weight=plus_one)
    rotate_into(dy, *table, SIZE, form, dn, back=True)
    named: dict[str, Any] = {"centred": False, "zero_centred_weight": plus_one}
    norm_backward_into(x, weight, EPS, dn, None, wanted, **named)
    assert torch.equal(dx, wanted)
