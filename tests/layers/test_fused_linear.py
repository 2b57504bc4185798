"""The fused linear: one matrix and one matmul for the sum of many linears, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.layers.dropout import Dropout, Seed
from octavo.layers.fused_linear import ALIGNMENT, FusedLinear, Seeds
from octavo.layers.gemm_input import GemmInput
from octavo.ops.linear import LoraSlice, mm_float32
from octavo.ops.linear_spec import LinearSpec

ROWS, OUT = 5, 11  # M, N
Span = tuple[int, int, int, float]  # start, stop, rank, scaling


@dataclass(frozen=True)
class Part:
    """The description of a frozen linear."""

    columns: int
    groups: tuple[Span, ...] = ()
    bias: tuple[int, int] | None = None  # its rows
    frozen_bias: bool = False


CASES = {
    "a matrix alone": [Part(6)],
    "with a bias": [Part(6, bias=(3, 7))],
    "with a frozen bias": [Part(6, bias=(0, OUT), frozen_bias=True)],
    "with LoRA on some rows": [Part(6, ((0, 4, 2, 0.5), (4, 7, 3, 2.0), (9, 11, 1, -1.5)))],
    "with LoRA and a bias": [Part(6, ((0, 4, 8, 0.5),), bias=(3, 7))],
    "two without LoRA": [Part(6), Part(9)],
    "two with LoRA, one with a bias": [Part(6, ((0, OUT, 2, 0.5),)), Part(9, ((0, OUT, 3, 2.0),), bias=(0, OUT))],
    "two, the first with LoRA, both with a bias": [Part(6, ((2, 5, 2, 0.5),), bias=(0, 4)), Part(9, bias=(2, 8))],
    "three, one without anything": [Part(3, ((0, 3, 1, 3.0),)), Part(2), Part(4, ((1, 2, 7, 1.0), (2, OUT, 2, 0.1)))],
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def fused_linear_of(
    parts: list[Part], *, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> tuple[FusedLinear, list[Tensor]]:
    """(the fused linear, the matrix of each part). Every trainable parameter is trained, in `dtype`."""
    torch.manual_seed(0)
    made, weights = [], []
    for part in parts:
        weight = random(OUT, part.columns)
        slices = []
        for start, stop, r, scaling in part.groups:
            a, b = (random(*size, dtype=dtype).requires_grad_() for size in ((r, part.columns), (stop - start, r)))
            slices.append(LoraSlice(start, stop, a, b, scaling))
        bias = None
        if part.bias is not None:
            bias = random(part.bias[1] - part.bias[0], dtype=dtype).requires_grad_(not part.frozen_bias)
        fill = _filling(weight)
        made.append(LinearSpec(OUT, part.columns, fill, bias, part.bias[0] if part.bias else 0, tuple(slices), dropout))
        weights.append(weight)
    return FusedLinear(tuple(made)), weights


def _filling(weight: Tensor) -> Any:
    def fill(out: Tensor) -> None:
        assert out.shape == weight.shape
        out.copy_(weight)

    return fill


def composed(linear: FusedLinear, weights: list[Tensor], x: Tensor) -> Tensor:
    """The reference in plain autograd: one matmul after the other."""
    y = torch.zeros(len(x), OUT, dtype=torch.float64)
    for part, weight, x_part in zip(linear.parts, weights, x.split([w.shape[1] for w in weights], dim=1), strict=True):
        y = y + x_part @ weight.T
        for lora in part.lora:
            y = y + F.pad(x_part @ lora.a.T.double() @ lora.b.T.double() * lora.scaling, (lora.start, OUT - lora.stop))
        if part.bias is not None:
            y = y + F.pad(part.bias.double(), (part.bias_start, OUT - part.bias_start - len(part.bias)))
    return y


def seeds(*numbers: int) -> list[Seed | None]:
    return [partial(_seeded, number) for number in numbers]


def _seeded(number: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(number)


def completed(linear: FusedLinear, x: Tensor, dropout_seeds: Seeds | None = None) -> GemmInput:
    gemm_input = linear.gemm_input(len(x), x)
    for part in x.split([part.columns for part in linear.parts], dim=1):
        gemm_input.put(part)
    with torch.no_grad():
        linear.complete_(gemm_input, dropout_seeds or seeds(0) * len(linear.parts))
    return gemm_input


@every_case
def test_the_matrix_is_the_parts_then_every_scaled_b_then_the_biases(name: str) -> None:
    linear, weights = fused_linear_of(CASES[name])
    with torch.no_grad():
        matrix = linear.matrix(torch.empty(0, dtype=torch.float64))
        columns = [*weights]
        for part in linear.parts:
            columns += [F.pad(lora.b_scaling * lora.b.T, (lora.start, OUT - lora.stop)).T for lora in part.lora]
        biases = [
            F.pad(part.bias, (part.bias_start, OUT - part.bias_start - len(part.bias)))
            for part in linear.parts
            if part.bias is not None
        ]
        expected = torch.cat(columns + ([sum(biases, torch.zeros(OUT))[:, None]] if biases else []), dim=1)
    added = matrix.shape[1] - linear.inputs
    assert added % ALIGNMENT == 0
    assert matrix.shape[1] - expected.shape[1] < ALIGNMENT  # and no more than that takes
    torch.testing.assert_close(matrix, F.pad(expected, (0, matrix.shape[1] - expected.shape[1])), rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("adding", [False, True], ids=["no residual", "residual"])
def test_the_output_is_the_sum_of_all_parts(name: str, adding: bool) -> None:
    linear, weights = fused_linear_of(CASES[name])
    x = random(ROWS, linear.inputs)
    residual = random(ROWS, OUT) if adding else None
    before = residual.clone() if residual is not None else torch.zeros(ROWS, OUT, dtype=torch.float64)
    with torch.no_grad():
        y = linear.matmul(completed(linear, x), residual=residual)
        torch.testing.assert_close(y, before + composed(linear, weights, x))
    if residual is not None:
        assert torch.equal(residual, before)  # which stays as it is


@every_case
@pytest.mark.parametrize("grad_input", [False, True], ids=["factors alone", "input too"])
@pytest.mark.parametrize("given", [False, True], ids=["times the matrix", "result given"])
def test_backward_gives_the_gradients_of_autograd(name: str, grad_input: bool, given: bool) -> None:
    linear, weights = fused_linear_of(CASES[name])
    x, dy = random(ROWS, linear.inputs).requires_grad_(), random(ROWS, OUT)
    with torch.no_grad():
        gemm_input = completed(linear, x)
        joined = dy @ linear.matrix(dy) if given else None
        dropout_seeds = seeds(0) * len(linear.parts)
        dx, gradients = linear.backward(dy, gemm_input, dropout_seeds, wants_dx=grad_input, joined=joined)
    leaves = [x, *(tensor for tensor in linear.trained if tensor.requires_grad)]
    theirs = torch.autograd.grad(composed(linear, weights, x), leaves, dy)
    assert (dx is not None) == grad_input
    if dx is not None:
        torch.testing.assert_close(torch.cat(dx, dim=1), theirs[0])
    ours = [gradient for tensor, gradient in zip(linear.trained, gradients, strict=True) if tensor.requires_grad]
    for mine, other in zip(ours, theirs[1:], strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)  # these are kept in float32


def test_a_frozen_bias_is_added_and_gets_no_gradient() -> None:
    linear, _ = fused_linear_of(CASES["with a frozen bias"])
    assert [tensor.requires_grad for tensor in linear.trained] == [False]
    with torch.no_grad():
        _, gradients = linear.backward(
            random(ROWS, OUT), completed(linear, random(ROWS, linear.inputs)), seeds(0), wants_dx=True
        )
    assert gradients == [None]


def test_bfloat16_is_multiplied_as_bfloat16_and_float32_factors_get_float32_gradients() -> None:
    linear, weights = fused_linear_of(CASES["two with LoRA, one with a bias"], dtype=torch.float32)
    x, dy = random(64, linear.inputs).bfloat16(), random(64, OUT).bfloat16()
    with torch.no_grad():
        gemm_input = completed(linear, x)
        y = linear.matmul(gemm_input)
        dx, gradients = linear.backward(dy, gemm_input, seeds(0, 0), wants_dx=True)
    exact = x.double().requires_grad_()
    expected = composed(linear, weights, exact)
    theirs = torch.autograd.grad(expected, [exact, *linear.trained], dy.double())
    assert y.dtype == torch.bfloat16
    assert dx is not None
    assert {gradient.dtype for gradient in dx} == {torch.bfloat16}
    assert {gradient.dtype for gradient in gradients if gradient is not None} == {torch.float32}
    for mine, other in zip([y, torch.cat(dx, dim=1), *gradients], [expected, *theirs], strict=True):
        assert mine is not None
        assert (mine.double() - other.double()).norm() < 0.02 * other.double().norm()


def test_a_low_rank_matmul_of_16_bit_types_is_float32() -> None:
    a, b = random(3, 500).bfloat16(), random(500, 2).bfloat16()
    assert mm_float32(a, b).dtype == torch.float32


# With W = 0, A = B = 1 and scaling 1 the output is the input of the adapter: x with its dropout.
def mask_linear(width: int, dropout: float) -> LinearSpec:
    lora = LoraSlice(0, width, torch.eye(width), torch.eye(width), 1.0)
    return LinearSpec(width, width, _filling(torch.zeros(width, width)), lora=(lora,), dropout=dropout)


def test_dropout_zeroes_a_share_scales_the_rest_and_backward_draws_the_same_mask() -> None:
    width, rate = 40, 0.25
    linear = FusedLinear((mask_linear(width, rate),))
    dropout_seeds = linear.dropout_seeds(Dropout())
    x, dy = torch.rand(50, width) + 1, torch.rand(50, width) + 1
    gemm_input = completed(linear, x, dropout_seeds)
    mask = linear.matmul(gemm_input) / x
    assert (mask == 0).float().mean().item() == pytest.approx(rate, abs=0.05)
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - rate)))
    dx, (da, db) = linear.backward(dy, gemm_input, dropout_seeds, wants_dx=True)
    assert dx is not None
    torch.testing.assert_close(dx[0], dy * mask)
    torch.testing.assert_close(da, dy.T @ (x * mask))
    torch.testing.assert_close(db, dy.T @ (x * mask))


def test_each_part_has_another_mask_and_one_without_dropout_has_none() -> None:
    width = 40
    linear = FusedLinear((mask_linear(width, 0.5), mask_linear(width, 0.0), mask_linear(width, 0.5)))
    x = torch.zeros(20, 3 * width)
    masks = []
    for i in range(3):
        only = x.clone()
        only[:, i * width : (i + 1) * width] = 1
        masks.append(linear.matmul(completed(linear, only, seeds(3, 0, 5))))
    assert torch.equal(masks[1], torch.ones(20, width))
    assert not torch.equal(masks[0], masks[2])
    again = linear.matmul(completed(linear, torch.cat([torch.ones(20, width), x[:, width:]], dim=1), seeds(3, 1, 1)))
    assert torch.equal(again, masks[0])  # a function of the part's seed


def test_seeds_come_from_the_global_generator_and_masks_do_not_advance_it() -> None:
    linear = FusedLinear((mask_linear(8, 0.5), mask_linear(8, 0.5)))
    torch.manual_seed(1)
    first = linear.dropout_seeds(Dropout())
    state = torch.get_rng_state()
    completed(linear, torch.ones(4, 16), first)
    assert torch.equal(torch.get_rng_state(), state)
    second = linear.dropout_seeds(Dropout())
    torch.manual_seed(1)
    assert numbers(linear.dropout_seeds(Dropout())) == numbers(first)
    assert len({*numbers(first), *numbers(second)}) == 4


def numbers(given: Seeds) -> list[int]:
    return [seed(torch.device("cpu")).initial_seed() for seed in given if seed is not None]


def test_without_dropout_no_seed_is_drawn() -> None:
    linear, _ = fused_linear_of(CASES["two without LoRA"])
    state = torch.get_rng_state()
    assert linear.dropout_seeds(Dropout()) == [None, None]
    assert torch.equal(torch.get_rng_state(), state)
