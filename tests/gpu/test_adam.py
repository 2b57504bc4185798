"""8-bit Adam on a GPU: parity with bitsandbytes from the same state, and no synchronization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from octavo.layers.lora import flatten_
from octavo.train.optim import STATE, Adam, OptimizerSettings

pytestmark = pytest.mark.filterwarnings("default")  # warnings of libraries are no failures
GPU = torch.device("cuda")
LR, N = 0.01, 300_007


def test_a_step_from_the_state_of_bitsandbytes_equals_its_step() -> None:
    torch.manual_seed(0)
    ours = Adam(flatten_({"a": nn.Parameter(torch.randn(1, N, device=GPU))}), OptimizerSettings(max_grad_norm=0.0))
    values = ours.groups[0].values
    theirs = nn.Parameter(values.detach().clone())
    adam8: Any = AdamW8bit([theirs], lr=LR, weight_decay=0.0)
    for step in range(5):
        assert values.grad is not None
        values.grad.normal_().mul_(torch.randn_like(values.grad).exp_())
        theirs.grad = values.grad.clone()
        if step:
            values.data.copy_(theirs.data)
            ours.load_state({f"0.{key}": torch.as_tensor(tensor) for key, tensor in adam8.state[theirs].items()})
        ours.step(LR, gradient_norm=ours.gradient_norm())
        adam8.step()
        torch.testing.assert_close(values.detach(), theirs.detach(), rtol=1e-6, atol=5e-3 * LR)
        actual, expected = ours.state(), adam8.state[theirs]
        for name in STATE[2:]:  # bitsandbytes computes 1 - 0.999 in float32, an error of 1.3e-5
            torch.testing.assert_close(actual[f"0.{name}"], expected[name].cpu(), rtol=2e-5, atol=0)
        for name in STATE[:2]:
            difference = (actual[f"0.{name}"].int() - expected[name].cpu().int()).abs()
            assert difference.max() <= 1
            assert (
                difference > 0
            ).float().mean() < 0.02  # bitsandbytes preserves signs, octavo never rounds second moments to 0


def test_a_step_does_not_synchronize() -> None:
    named = {name: nn.Parameter(torch.zeros(size, device=GPU)) for name, size in {"a": (64, 80), "b": (9,)}.items()}
    optimizer = Adam(flatten_(named), OptimizerSettings())
    optimizer.step(0.1, gradient_norm=optimizer.gradient_norm())  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_gradients()
        optimizer.step(0.1, gradient_norm=optimizer.gradient_norm())
    finally:
        torch.cuda.set_sync_debug_mode("default")
