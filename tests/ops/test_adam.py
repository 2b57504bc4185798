"""Adam with moments in 8 bits: bitsandbytes' format, AdamW's arithmetic, and what a code must never do."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import Tensor, nn

from octavo.ops import adam
from octavo.ops.adam import BLOCK, Moments, Rates, adam8_, no_moments
from octavo.ops.dynamic import levels
from octavo.runtime.dispatch import KERNELS

ONE = torch.ones(())
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LR, DECAY = 0.01, 0.1


def rates(step: int) -> Rates:
    return Rates(0.9, 0.999, 1e-8, 1 - LR * DECAY, LR / (1 - 0.9**step), math.sqrt(1 - 0.999**step))


def gradients(n: int, seed: int) -> Tensor:
    """Numbers of many sizes, some of them zero, the first blocks all so."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.randn(n, generator=draw).mul(1.5).exp() * (torch.rand(n, generator=draw) > 0.1)
    size[: 2 * BLOCK] = 0
    return torch.randn(n, generator=draw) * size


def numbers(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(7))


def state_of(theirs: Any, values: nn.Parameter) -> Moments:
    """A copy of bitsandbytes' state."""
    state = theirs.state[values]
    return Moments(*(state[name].clone() for name in ("state1", "state2", "absmax1", "absmax2")))


def test_a_step_from_bitsandbytes_state_is_its_step() -> None:
    values = nn.Parameter(numbers(70_003))
    theirs = AdamW8bit([values], lr=LR, weight_decay=DECAY)
    for step in range(1, 5):
        ours = values.detach().clone()
        moments = state_of(theirs, values) if step > 1 else no_moments(ours)
        values.grad = gradients(ours.numel(), step)
        theirs.step()
        adam8_(ours, values.grad, moments, ONE, rates(step))
        after = state_of(theirs, values)
        assert torch.equal(ours, values.detach())
        assert torch.equal(moments.first_absmax, after.first_absmax)
        assert torch.equal(moments.second_absmax, after.second_absmax)


def test_it_stays_nearer_to_32_bits_than_bitsandbytes_does_on_a_cpu() -> None:
    start = numbers(40_000)
    exact, theirs, ours = (nn.Parameter(start.clone()) for _ in range(3))
    adamw = torch.optim.AdamW([exact], lr=LR, weight_decay=DECAY)
    eight = AdamW8bit([theirs], lr=LR, weight_decay=DECAY)
    moments = no_moments(start)
    for step in range(1, 31):
        exact.grad = gradients(start.numel(), step)
        theirs.grad = exact.grad.clone()
        adamw.step()
        eight.step()
        adam8_(ours.detach(), exact.grad, moments, ONE, rates(step))
    moved = (exact - start).norm()
    off = ((ours - exact).norm() / moved).item()
    assert off < 0.05
    assert off < 0.8 * ((theirs - exact).norm() / moved).item()


def test_a_step_is_bounded_if_the_gradient_shrinks() -> None:
    values, moments = torch.zeros(BLOCK), no_moments(torch.zeros(BLOCK))
    gradient = torch.full((BLOCK,), 3e-4)
    gradient[0] = 1.0  # relative to it the squares of the others round to zero
    for step in range(1, 40):
        before = values.clone()
        adam8_(values, gradient if step == 1 else torch.zeros(BLOCK), moments, ONE, rates(step))
        assert (values - before).abs().max() < 2 * LR
    assert (moments.second > 0).all()


def test_values_without_gradient_do_not_change() -> None:
    values, moments = numbers(3 * BLOCK), no_moments(numbers(3 * BLOCK))
    before = values.clone()
    for step in range(1, 4):
        adam8_(values, gradients(3 * BLOCK, 0) * 0, moments, ONE, rates(step)._replace(keep=1.0))
    assert torch.equal(values, before)
    assert not any(absmax.any() for absmax in moments[2:])


def test_the_factor_is_one_of_the_gradient() -> None:
    first, second = numbers(5000), numbers(5000)
    one, other = no_moments(first), no_moments(second)
    for step in range(1, 3):
        adam8_(first, gradients(5000, step) * 0.25, one, ONE, rates(step))
        adam8_(second, gradients(5000, step), other, torch.tensor(0.25), rates(step))
    assert torch.equal(first, second)
    assert all(map(torch.equal, one, other))


def test_updating_parts_of_a_buffer_equals_updating_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parted = numbers(3001), numbers(3001)
    one, other = no_moments(whole), no_moments(parted)
    for step in range(1, 4):
        monkeypatch.setattr(adam, "_CHUNK", 1 << 20)
        adam8_(whole, gradients(3001, step), one, ONE, rates(step))
        monkeypatch.setattr(adam, "_CHUNK", 4 * BLOCK)
        adam8_(parted, gradients(3001, step), other, ONE, rates(step))
    assert torch.equal(whole, parted)
    assert all(map(torch.equal, one, other))


def test_memory_after_the_last_value_is_not_in_its_block() -> None:
    kernel = import_module("octavo.kernels.adam").adam8_
    n = BLOCK + 7
    for step in (KERNELS["adam.adam8_"], kernel):
        values, moments = torch.zeros(n, device=DEVICE), no_moments(torch.zeros(n, device=DEVICE))
        moments.first.fill_(150)  # no code is large, so that nothing of the block is as large as its absmax was
        moments.second.fill_(90)
        for absmax in moments[2:]:
            absmax.fill_(1.0)
        largest = levels(DEVICE, signed=True).values[150] * 0.9, levels(DEVICE, signed=False).values[90] * 0.999
        step(values, torch.zeros(n, device=DEVICE), moments, ONE.to(DEVICE), rates(1))
        for absmax, expected in zip(moments[2:], largest, strict=True):
            torch.testing.assert_close(absmax, expected.expand(2), rtol=1e-6, atol=0)


def test_the_reference_chooses_the_same_quantized_values() -> None:
    kernel = import_module("octavo.kernels.adam").adam8_
    values, fast = (numbers(20_003).to(DEVICE) for _ in range(2))
    moments, kernel_moments = no_moments(values), no_moments(values)
    for step in range(1, 5):
        gradient = gradients(values.numel(), step).to(DEVICE)
        KERNELS["adam.adam8_"](values, gradient, moments, ONE.to(DEVICE), rates(step))
        kernel(fast, gradient, kernel_moments, ONE.to(DEVICE), rates(step))
        torch.testing.assert_close(fast, values, rtol=1e-5, atol=1e-5 * LR)
        for codes, expected in zip(kernel_moments[:2], moments[:2], strict=True):
            off = (codes.int() - expected.int()).abs()
            assert off.max() <= 1
            assert off.sum() <= 5  # sums that are added up in another order may stand on the other side of an edge
        torch.testing.assert_close(kernel_moments[2:], moments[2:], rtol=1e-6, atol=0)
