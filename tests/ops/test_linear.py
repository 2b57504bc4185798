"""The frozen linear: the gradients of autograd, none for W, and no saved tensor that can be recomputed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.linear import LoraSlice, Unpack, frozen_linear
from octavo.ops.quantize import SCHEMES

ROWS, OUT, IN = 5, 11, 6  # M, N, K
SPANS = [
    (0, 4, 2, 0.5),
    (4, 7, 3, 2.0),
    (9, 11, 1, -1.5),
]  # start, stop, rank, scaling: rows 7 and 8 have none


@dataclass(frozen=True)
class Case:
    """The inputs of one linear with bias, dropout and LoRA."""

    x: Tensor
    dropped: Tensor | None
    matrix: Tensor
    scale: Tensor | None
    bias: Tensor
    factors: list[Tensor]

    def lora(self, factors: list[Tensor] | None = None) -> list[LoraSlice]:
        flat = factors or self.factors
        return [
            LoraSlice(start, stop, flat[2 * i], flat[2 * i + 1], scaling)
            for i, (start, stop, _, scaling) in enumerate(SPANS)
        ]

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return self.matrix.to(dtype), self.scale


def case_of(*, scaled: bool = False, dropping: bool = False) -> Case:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    factors = [f for start, stop, rank, _ in SPANS for f in (random(rank, IN), random(stop - start, rank))]
    scale = torch.rand(OUT) + 0.5 if scaled else None
    dropped = random(ROWS, IN) if dropping else None
    return Case(random(ROWS, IN), dropped, random(OUT, IN).detach(), scale, random(4), factors)


BIAS_START = 3


def composed(case: Case) -> Tensor:
    """The same number in plain autograd."""
    weight = case.matrix if case.scale is None else case.matrix * case.scale[:, None].double()
    y = case.x @ weight.T + F.pad(case.bias, (BIAS_START, OUT - BIAS_START - len(case.bias)))
    source = case.x if case.dropped is None else case.dropped
    for start, stop, a, b, scaling in case.lora():
        y = y + F.pad(source @ a.T @ b.T * scaling, (start, OUT - stop))
    return y


def fused(case: Case, bias: Tensor | None) -> Tensor:
    return frozen_linear(case.x, case.unpack, bias=bias, bias_start=BIAS_START, lora=case.lora(), dropped=case.dropped)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "row scale"])
@pytest.mark.parametrize("dropping", [False, True], ids=["x", "dropped x"])
def test_output_and_gradients_are_those_of_the_composition(scaled: bool, dropping: bool) -> None:
    case = case_of(scaled=scaled, dropping=dropping)
    leaves = [case.x, case.bias, *case.factors] + ([] if case.dropped is None else [case.dropped])
    upstream = torch.randn(ROWS, OUT, dtype=torch.float64)
    ours, theirs = fused(case, case.bias), composed(case)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)  # the bias is summed in float32


def test_gradcheck_with_all_inputs_at_once() -> None:
    case = case_of(scaled=True, dropping=True)
    assert case.dropped is not None

    def linear(x: Tensor, dropped: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return frozen_linear(
            x,
            case.unpack,
            bias=bias,
            bias_start=BIAS_START,
            lora=case.lora(list(factors)),
            dropped=dropped,
        )

    torch.autograd.gradcheck(linear, (case.x, case.dropped, case.bias, *case.factors), eps=1e-4)


def test_leading_dimensions_and_a_strided_x_change_nothing() -> None:
    case = case_of()
    buffer = torch.randn(IN, 2, 3, dtype=torch.float64)
    x = buffer.permute(1, 2, 0).requires_grad_()
    flat = x.detach().reshape(-1, IN).requires_grad_()
    y = frozen_linear(x, case.unpack, lora=case.lora())
    reference = frozen_linear(flat, case.unpack, lora=case.lora())
    assert y.shape == (2, 3, OUT)
    assert torch.equal(y.view(-1, OUT), reference)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (dflat,) = torch.autograd.grad(reference.square().sum(), flat)
    assert torch.equal(dx.reshape(-1, IN), dflat)


def test_no_rows_at_all_go_forward_and_backward() -> None:
    case = case_of()
    x = torch.empty(0, IN, dtype=torch.float64, requires_grad=True)
    y = frozen_linear(x, case.unpack, bias=case.bias, bias_start=BIAS_START, lora=case.lora())
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert x.grad.shape == (0, IN)
    assert all(f.grad is not None and not f.grad.any() for f in case.factors)


def test_a_frozen_bias_takes_no_gradient_and_is_added_all_the_same() -> None:
    case = case_of()
    frozen = case.bias.detach()
    y = fused(case, frozen)
    torch.testing.assert_close(y, composed(case))
    torch.autograd.backward(y.sum())
    assert frozen.grad is None


def test_lora_gradients_are_the_same_if_x_needs_no_gradient() -> None:
    case = case_of()
    still = case.x.detach()
    y = frozen_linear(still, case.unpack, lora=case.lora())
    reference = composed(case)
    ours = torch.autograd.grad(y.sum(), case.factors)
    theirs = torch.autograd.grad(reference.sum(), case.factors)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert not frozen_linear(still, case.unpack).requires_grad


def test_w_takes_no_gradient() -> None:
    case = case_of()
    weight = case.matrix.clone().requires_grad_()
    y = frozen_linear(case.x, lambda dtype: (weight.to(dtype), None), lora=case.lora())
    torch.autograd.backward(y.sum())
    assert weight.grad is None


def watched(matrix: Tensor) -> tuple[Unpack, list[weakref.ref[Tensor]]]:
    """An unpack that makes a new matrix each time, and what became of them."""
    made: list[weakref.ref[Tensor]] = []

    def unpack(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        fresh = matrix.to(dtype, copy=True)
        made.append(weakref.ref(fresh))
        return fresh, None

    return unpack, made


def saved_by(case: Case, unpack: Unpack, lora: list[LoraSlice]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The output, and the shapes of the tensors that it saves for backward."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = frozen_linear(case.x, unpack, bias=case.bias, bias_start=BIAS_START, lora=lora)
    return y, shapes


def test_nothing_is_saved_for_backward_without_lora() -> None:
    case = case_of()
    unpack, made = watched(case.matrix)
    y, shapes = saved_by(case, unpack, [])
    assert y.requires_grad
    assert shapes == []
    assert not any(isinstance(value, Tensor) for value in vars(y.grad_fn).values())
    assert [matrix() for matrix in made] == [None]  # forward let its W go
    torch.autograd.backward(y.sum())
    assert [matrix() for matrix in made] == [None, None]  # and backward unpacked it once more


def test_lora_saves_its_factors_its_input_and_x_times_a() -> None:
    case = case_of()
    unpack, made = watched(case.matrix)
    _, shapes = saved_by(case, unpack, case.lora())
    ranks = sum(rank for _, _, rank, _ in SPANS)
    assert shapes == [(ROWS, IN), (ROWS, ranks), *(tuple(f.shape) for f in case.factors)]
    assert [matrix() for matrix in made] == [None]


def test_bfloat16_stays_bfloat16_and_float32_factors_get_float32_gradients() -> None:
    case = case_of()
    x = case.x.detach().bfloat16().requires_grad_()
    factors = [f.detach().float().requires_grad_() for f in case.factors]
    bias = case.bias.detach().float().requires_grad_()
    y = frozen_linear(x, case.unpack, bias=bias, bias_start=BIAS_START, lora=case.lora(factors))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), composed(case), rtol=0.05, atol=0.1)
    torch.autograd.backward(y.sum())
    assert {f.grad.dtype for f in (*factors, bias) if f.grad is not None} == {torch.float32}
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_int8_in_float16_stays_finite_where_its_result_does() -> None:
    inputs = 4096  # the codes alone would sum to 127 * 4096, eight times what float16 holds
    parts = SCHEMES["int8"].quantize(torch.full((2, inputs), 0.1))
    x = torch.ones(1, inputs, dtype=torch.float16)
    y = frozen_linear(x, lambda dtype: SCHEMES["int8"].unpack(parts, (2, inputs), dtype))
    torch.testing.assert_close(y.float(), torch.full((1, 2), 409.6), rtol=1e-3, atol=0)
