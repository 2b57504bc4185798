"""8-bit Adam on a card: bitsandbytes' kernel from the same state, and a host that never waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from octavo.layers.lora import flatten_
from octavo.train.optim import STATE, Adam, OptimizerSettings

pytestmark = pytest.mark.filterwarnings("default")  # what libraries say of each other is no fault of ours
CARD = torch.device("cuda")
LR, N = 0.01, 300_007


def test_a_step_from_bitsandbytes_state_is_its_step() -> None:
    torch.manual_seed(0)
    ours = Adam(flatten_({"a": nn.Parameter(torch.randn(1, N, device=CARD))}), OptimizerSettings(max_grad_norm=0.0))
    values = ours.groups[0].values
    theirs = nn.Parameter(values.detach().clone())
    eight: Any = AdamW8bit([theirs], lr=LR, weight_decay=0.0)
    for step in range(5):
        assert values.grad is not None
        values.grad.normal_().mul_(torch.randn_like(values.grad).exp_())
        theirs.grad = values.grad.clone()
        if step:
            values.data.copy_(theirs.data)
            ours.load_state({f"0.{key}": torch.as_tensor(tensor) for key, tensor in eight.state[theirs].items()})
        ours.step(LR, gradient_norm=ours.gradient_norm())
        eight.step()
        torch.testing.assert_close(values.detach(), theirs.detach(), rtol=1e-6, atol=5e-3 * LR)
        own, expected = ours.state(), eight.state[theirs]
        for name in STATE[2:]:  # theirs takes 1 - 0.999 in float32, which is 1.3e-5 off
            torch.testing.assert_close(own[f"0.{name}"], expected[name].cpu(), rtol=2e-5, atol=0)
        for name in STATE[:2]:
            off = (own[f"0.{name}"].int() - expected[name].cpu().int()).abs()
            assert off.max() <= 1
            assert (off > 0).float().mean() < 0.02  # theirs keeps signs, ours keeps second moments from zero


def test_a_step_never_waits_for_the_card() -> None:
    named = {name: nn.Parameter(torch.zeros(size, device=CARD)) for name, size in {"a": (64, 80), "b": (9,)}.items()}
    optimizer = Adam(flatten_(named), OptimizerSettings())
    optimizer.step(0.1, gradient_norm=optimizer.gradient_norm())  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_gradients()
        optimizer.step(0.1, gradient_norm=optimizer.gradient_norm())
    finally:
        torch.cuda.set_sync_debug_mode("default")
