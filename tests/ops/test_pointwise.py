"""Norms and activations against torch's own functions and their autograd; results in columns; out over its input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.pointwise import (
    add_norm_into,
    geglu_backward_,
    geglu_into,
    gelu_backward_,
    gelu_into,
    norm,
    norm_backward_into,
    norm_into,
    norm_parameters_backward,
    swiglu_backward_,
    swiglu_into,
)

ROWS, WIDTH, EPS = 7, 30, 1e-2  # an eps that shows
KINDS = {"LayerNorm": (True, False), "RMSNorm": (False, False), "RMSNorm with 1 + w": (False, True)}
every_norm = pytest.mark.parametrize(("centred", "plus_one"), KINDS.values(), ids=KINDS)
heads = pytest.mark.parametrize("heads", [1, 3], ids=["rows", "heads"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def columns(values: Tensor) -> Tensor:
    """The same numbers as columns of a wider matrix."""
    buffer = torch.full((len(values), values.shape[1] + 5), 9.0, dtype=values.dtype)
    buffer[:, 2 : values.shape[1] + 2] = values
    return buffer[:, 2 : values.shape[1] + 2]


def surroundings(columns: Tensor) -> Tensor:
    """The elements to the left and right of `columns`."""
    whole = columns._base
    assert whole is not None
    return torch.cat([whole[:, :2], whole[:, -3:]], dim=1)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Written out, so that no library's eps or mean is trusted. Each group of len(weight) columns is normalized."""
    x = x.unflatten(1, (-1, len(weight)))
    if bias is not None:
        x = x - x.mean(dim=2, keepdim=True)
    standard = x / (x.square().mean(dim=2, keepdim=True) + EPS).sqrt()
    return (standard * weight + (0 if bias is None else bias)).flatten(1)


def norm_case(centred: bool, heads: int) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, bias = random(ROWS, heads * WIDTH) + 0.5, random(WIDTH, seed=1) + 1, random(WIDTH, seed=2)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    return leaves[0], leaves[1], leaves[2] if centred else None


@every_norm
@heads
def test_a_norm_is_its_formula(centred: bool, plus_one: bool, heads: int) -> None:
    x, weight, bias = norm_case(centred, heads)
    out = columns(torch.zeros(ROWS, heads * WIDTH, dtype=torch.float64))
    with torch.no_grad():
        norm_into(columns(x), weight, bias, EPS, out, zero_centred_weight=plus_one)
        expected = plain_norm(x, weight + plus_one, bias)
        torch.testing.assert_close(out, expected)
        assert (surroundings(out) == 9).all()
        norm_into(x, weight, bias, EPS, x, zero_centred_weight=plus_one)  # over its own input
        torch.testing.assert_close(x, expected)


@every_norm
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_sum_of_a_residual_and_a_norm_is_its_formula(centred: bool, plus_one: bool, scale: float) -> None:
    x, weight, bias = norm_case(centred, 1)
    out, residual = columns(torch.zeros(ROWS, WIDTH, dtype=torch.float64)), random(ROWS, WIDTH, seed=4)
    named: dict[str, Any] = {"scale": scale, "zero_centred_weight": plus_one}
    with torch.no_grad():
        expected = residual + scale * plain_norm(x, weight + plus_one, bias)
        add_norm_into(columns(x), weight, bias, EPS, columns(residual), out, **named)
        torch.testing.assert_close(out, expected)
        assert (surroundings(out) == 9).all()
        for over in (residual, x):
            given = residual.clone()
            add_norm_into(x, weight, bias, EPS, given, x if over is x else given, **named)
            torch.testing.assert_close(x if over is x else given, expected)


@pytest.mark.parametrize("plus_one", [False, True])
def test_a_norm_is_rounded_before_it_is_added(plus_one: bool) -> None:
    """And its gradient, scale * dy, before the norm's backward: the bits of a block under autograd."""
    x, residual, dy = (random(ROWS, WIDTH, seed=seed, dtype=torch.bfloat16) for seed in (0, 3, 4))
    weight, out, dx, scaled = random(WIDTH, seed=1, dtype=torch.float32), *(torch.empty_like(x) for _ in range(3))
    add_norm_into(x, weight, None, EPS, residual, out, scale=0.3, zero_centred_weight=plus_one)
    normed = norm(x, weight, None, EPS, zero_centred_weight=plus_one)
    assert torch.equal(out, torch.add(residual, normed, alpha=0.3))
    named = {"centred": False, "zero_centred_weight": plus_one}
    norm_backward_into(x, weight, EPS, dy, None, dx, scale=0.3, **named)
    norm_backward_into(x, weight, EPS, dy * 0.3, None, scaled, **named)
    assert torch.equal(dx, scaled)


@every_norm
@heads
def test_a_norms_backward_is_that_of_autograd_on_top_of_the_residuals(
    centred: bool, plus_one: bool, heads: int
) -> None:
    x, weight, bias = norm_case(centred, heads)
    dy, residual = random(ROWS, heads * WIDTH, seed=3), random(ROWS, heads * WIDTH, seed=4)
    leaves = [x, weight] + ([bias] if bias is not None else [])
    theirs = torch.autograd.grad(plain_norm(x, weight + plus_one, bias), leaves, dy)
    out, own = (columns(torch.zeros(ROWS, heads * WIDTH, dtype=torch.float64)) for _ in range(2))
    kind = {"centred": centred, "zero_centred_weight": plus_one}
    with torch.no_grad():
        norm_backward_into(columns(x), weight, EPS, columns(dy), residual, out, **kind)
        torch.testing.assert_close(out, residual + theirs[0], rtol=1e-5, atol=2e-6)  # taken in float32
        assert (surroundings(out) == 9).all()
        norm_backward_into(x, weight, EPS, dy, residual, residual, **kind)  # over the residual
        assert torch.equal(residual, out)
        grouped, dy_grouped = (tensor.unflatten(1, (heads, WIDTH)) for tensor in (x, columns(dy)))
        dweight, dbias = norm_parameters_backward(grouped, EPS, dy_grouped, centred=centred)
        norm_backward_into(x, weight, EPS, dy, None, own, **kind)
        torch.testing.assert_close(own, theirs[0], rtol=1e-5, atol=2e-6)
        norm_backward_into(x, weight, EPS, dy, None, x, **kind)  # over its input
        assert torch.equal(x, own)
    torch.testing.assert_close(dweight, theirs[1].float(), rtol=1e-5, atol=1e-5)
    assert (dbias is not None) == centred
    if dbias is not None:
        torch.testing.assert_close(dbias, theirs[2].float(), rtol=1e-5, atol=1e-5)
    assert dweight.dtype == torch.float32


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_a_norms_weights_are_converted_to_the_dtype_of_x(centred: bool) -> None:
    x = random(ROWS, WIDTH, dtype=torch.bfloat16)
    weight, bias = (random(WIDTH, seed=seed, dtype=torch.float32) for seed in (1, 2))
    out = torch.empty_like(x)
    norm_into(x, weight, bias if centred else None, EPS, out)
    if centred:
        expected = F.layer_norm(x, (WIDTH,), weight.bfloat16(), bias.bfloat16(), EPS)
    else:
        expected = F.rms_norm(x, (WIDTH,), weight.bfloat16(), EPS)
    assert torch.equal(out, expected)
    dy, residual = random(ROWS, WIDTH, seed=3, dtype=torch.bfloat16), torch.zeros_like(x)
    near, rounded = (torch.empty_like(x) for _ in range(2))
    norm_backward_into(x, weight, EPS, dy, residual, near, centred=centred)
    norm_backward_into(x, weight.bfloat16().float(), EPS, dy, residual, rounded, centred=centred)
    assert torch.equal(near, rounded)


def test_a_zero_centred_weight_is_not_rounded() -> None:
    """In a 2-byte dtype only the result is rounded; under autograd too."""
    x, dy = (random(ROWS, WIDTH, seed=seed, dtype=torch.bfloat16) for seed in (0, 3))
    weight, out, dx = random(WIDTH, seed=1, dtype=torch.float32) / 3, torch.empty_like(x), torch.empty_like(x)
    norm_into(x, weight, None, EPS, out, zero_centred_weight=True)
    exact = x.double().requires_grad_()
    expected = plain_norm(exact, 1 + weight.double(), None)
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(out, norm(x, weight, None, EPS, zero_centred_weight=True))
    assert not torch.equal(out, plain_norm(exact, (1 + weight).bfloat16().double(), None).bfloat16())
    (wanted,) = torch.autograd.grad(expected, exact, dy.double())
    norm_backward_into(x, weight, EPS, dy, None, dx, centred=False, zero_centred_weight=True)
    torch.testing.assert_close(dx.double(), wanted, rtol=2.0**-8, atol=1e-6)


def plain_gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def plain_gelu_erf(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / 2**0.5))


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


def plain_geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=1)
    return plain_gelu(gate) * up


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Any], Callable[..., Any], int]] = {
    "geglu": (plain_geglu, geglu_into, geglu_backward_, 2),
    "gelu with erf": (
        plain_gelu_erf, partial(gelu_into, approximate="none"), partial(gelu_backward_, approximate="none"), 1,
    ),
    "gelu": (plain_gelu, gelu_into, gelu_backward_, 1),
    "swiglu": (plain_swiglu, swiglu_into, swiglu_backward_, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_and_its_backward_are_those_of_the_formula(name: str) -> None:
    plain, into, backward_, share = ACTIVATIONS[name]
    x, dy = (3 * random(ROWS, share * WIDTH)).requires_grad_(), random(ROWS, WIDTH, seed=1)
    y = plain(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    over, out, gradient = columns(x.detach()), columns(torch.zeros_like(dy)), columns(dy)
    into(over, out)
    torch.testing.assert_close(out, y.detach())
    assert torch.equal(over, x)
    backward_(over, gradient)
    torch.testing.assert_close(over, dx)
    torch.testing.assert_close(gradient, y.detach())
    assert all((surroundings(made) == 9).all() for made in (over, out, gradient))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_from_zero_an_activation_is_flat_or_straight_and_never_lost(name: str) -> None:
    _, into, backward_, share = ACTIVATIONS[name]
    x = torch.tensor([[-1e4], [-100.0], [100.0], [1e4]]).repeat(1, share)
    if share == 2:
        x[:, 1] = 1
    out, gradient = torch.empty(4, 1), torch.ones(4, 1)
    expected = x[:, 0].clamp_min(0)
    into(x, out)
    backward_(x, gradient)
    torch.testing.assert_close(out[:, 0], expected)
    torch.testing.assert_close(gradient[:, 0], expected)
    torch.testing.assert_close(x[:, 0], torch.tensor([0.0, 0, 1, 1]))
