"""The norm before the head, whose backward is written by hand, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.fused.norm import fused_norm
from octavo.layers.norm import NormSpec
from octavo.ops import pointwise

WIDTH = 6
NORMS = {"LayerNorm": (True, False), "RMSNorm": (False, False), "zero-centred RMSNorm": (False, True)}


def norm_of(kind: str, *, trained: bool) -> NormSpec:
    has_bias, zero_centred = NORMS[kind]
    weight, bias = (torch.randn(WIDTH, requires_grad=trained) for _ in range(2))
    return NormSpec(weight, bias if has_bias else None, 1e-5, zero_centred)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("kind", NORMS)
def test_it_has_the_output_and_the_gradients_of_autograd(kind: str, trained: bool) -> None:
    x, dy = torch.randn(2, 5, WIDTH, requires_grad=True), torch.randn(2, 5, WIDTH)
    norm = norm_of(kind, trained=trained)
    inputs = [x, *(norm.trained if trained else [])]
    plain = pointwise.norm(x, norm.weight, norm.bias, norm.eps, zero_centred_weight=norm.zero_centred_weight)
    expected = torch.autograd.grad(plain, inputs, dy)
    fused = fused_norm(x, norm)
    torch.testing.assert_close(fused, plain)
    for actual, wanted in zip(torch.autograd.grad(fused, inputs, dy), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_it_saves_its_input_alone() -> None:
    x, saved = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16, requires_grad=True), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        fused_norm(x, norm_of("zero-centred RMSNorm", trained=False))
    assert [tensor.data_ptr() for tensor in saved] == [x.data_ptr()]


def test_only_the_parameters_may_need_a_gradient() -> None:
    x, norm = torch.randn(2, 5, WIDTH), norm_of("RMSNorm", trained=True)
    (gradient,) = torch.autograd.grad(fused_norm(x, norm).sum(), [norm.weight])
    torch.testing.assert_close(gradient, (x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-5)).sum((0, 1)))
