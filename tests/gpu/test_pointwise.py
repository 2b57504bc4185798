"""Norms in one pass with the operation next to them against separate passes, at the widths of released models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.gpu.cases import matrix
from torch import Tensor

from octavo.layers.norm import NormSpec
from octavo.ops.rotary import (
    ROTATE_HALF,
    ROTATE_INTERLEAVED,
    norm_rotate_backward_into,
    norm_rotate_into,
    rotary_table,
    rotate_into,
)

pytestmark = pytest.mark.filterwarnings("default")  # warnings of libraries are no failures
EPS = 1e-6


def columns(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The last n columns of a matrix with n + 24 columns."""
    return torch.randn(m, n + 24, device="cuda").to(dtype)[:, 24:]


def spec(n: int, *, zero_centred: bool = False, bias: bool = False) -> NormSpec:
    weight = torch.randn(n, device="cuda") + (0 if zero_centred else 1)
    return NormSpec(weight, torch.randn(n, device="cuda") if bias else None, EPS, zero_centred)


@matrix(
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    width=[3840, 5120, 2304, 8200],
    norm=["rms", "zero-centred", "layer"],
    scale=[1.0, 0.22],
    over_z=[False, True],
)(lambda dtype, width, norm, scale, over_z: dtype == torch.bfloat16 and width == 3840)
def test_a_norm_and_its_sum_in_one_pass(dtype: torch.dtype, width: int, norm: str, scale: float, over_z: bool) -> None:
    """Forward and, with the scale in the gradient, backward: as separate passes."""
    torch.manual_seed(0)
    kind = spec(width, zero_centred=norm == "zero-centred", bias=norm == "layer")
    z, residual, dy = columns(515, width, dtype), columns(515, width, dtype), columns(515, width, dtype)
    y, dz = torch.empty_like(z), torch.empty_like(z)
    kind.write(z, y)
    torch.add(residual, y, alpha=scale, out=y)
    kind.backward(z, dy * scale, None, dz)
    expected = [y, dz]
    out, dout = (z.clone(), z.clone()) if over_z else (torch.empty_like(z), torch.empty_like(z))
    kind.write_sum(out if over_z else z, residual, out, scale=scale)
    kind.backward(dout if over_z else z, dy, None, dout, scale=scale)
    assert_nearly_equal([out, dout], expected)


@matrix(
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    # Query heads, key heads, size of a head: Gemma 3 12B, Qwen3 8B, and sizes that are no powers of 2.
    heads=[(16, 8, 256), (32, 8, 128), (5, 3, 96), (3, 1, 160)],
    of_all=[False, True],  # a norm of all heads together, as in OLMo 2
    zero_centred=[False, True],
    form=[ROTATE_HALF, ROTATE_INTERLEAVED],
)(lambda dtype, heads, of_all, zero_centred, form: dtype == torch.bfloat16 and form == ROTATE_HALF and heads[2] >= 128)
def test_norms_and_rotary_positions_in_one_pass(
    dtype: torch.dtype, heads: tuple[int, int, int], of_all: bool, zero_centred: bool, form: str
) -> None:
    """Of q and of k, columns of one matrix, over which the gradients are written."""
    torch.manual_seed(0)
    *counts, size = heads
    positions = torch.arange(515, device="cuda")[None]
    table = rotary_table(positions, torch.rand(size // 2, device="cuda"))
    u = columns(1030, (sum(counts) + counts[1]) * size, dtype)
    x, out = u.clone(), torch.empty(1030, sum(counts) * size, device="cuda", dtype=dtype)
    before, start = u._base.clone(), 0  # type: ignore[union-attr]
    for count in counts:
        part = slice(start, start := start + count * size)
        kind = spec(count * size if of_all else size, zero_centred=zero_centred)
        named: dict[str, Any] = {"zero_centred_weight": zero_centred}
        two, dx = torch.empty_like(x[:, part]), torch.empty_like(x[:, part])
        dy, dn = torch.randn_like(dx), torch.empty_like(dx)
        kind.write(x[:, part], two)
        rotate_into(two, *table, size, form, two)
        rotate_into(dy, *table, size, form, dn, back=True)
        kind.backward(x[:, part], dn, None, dx)
        given = kind.weight, EPS, *table, size, form
        norm_rotate_into(u[:, part], *given, out[:, part], **named)
        norm_rotate_backward_into(u[:, part], *given, dy, u[:, part], **named)
        assert_nearly_equal([out[:, part], u[:, part]], [two, dx])
    assert torch.equal(u[:, start:], x[:, start:])  # v
    assert torch.equal(u._base[:, :24], before[:, :24])  # type: ignore[index]


def assert_nearly_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Up to the last bit of a few results: sums are in another order, and a multiply-add may be rounded once."""
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == torch.float32 or (actual != expected).float().mean() < 0.01
        eps = torch.finfo(actual.dtype).eps
        # A rotation takes differences of two rounded values, and the norm's backward differences from a mean.
        torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=32 * eps)
