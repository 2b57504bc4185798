"""Which kernels compute the backward of an activation with LoRA gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import devices

from octavo.hardware import Capabilities
from octavo.kernels import lora_backward
from octavo.kernels.hopper import lora_backward as hopper
from octavo.kernels.lora_tiles import Tile
from octavo.ops.lora_backward import LoraOperands
from octavo.runtime import dispatch

M, F, RANK = 5, 16, 2


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize(
    ("device", "dtype", "taken"),
    [
        (devices.H200, torch.float16, True),
        (devices.H200, torch.float32, False),  # its tiles have 2 bytes an element
        (devices.A100, torch.float16, False),
        (devices.B200, torch.float16, False),
        (devices.MI300X, torch.float16, False),
        (devices.CPU, torch.float16, False),
    ],
)
def test_the_hopper_kernel_computes_what_it_supports(
    device: Capabilities, dtype: torch.dtype, taken: bool, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[tuple[Any, ...]] = []
    backward_ = f"{activation}_backward_"
    monkeypatch.setattr(dispatch, "capabilities_of", lambda _: device)
    monkeypatch.setattr(hopper, "lora_backward_into", lambda *call: calls.append(call))
    monkeypatch.setattr(lora_backward, backward_, dispatch.KERNELS[f"pointwise.{backward_}"])
    x, dy, t, after = (torch.randn(M, n).to(dtype) for n in (2 * F, F, 2 * RANK, RANK))
    operands, before = LoraOperands(t, torch.randn(2 * F, RANK).to(dtype), after), x.clone()
    grads = getattr(lora_backward, f"{activation}_lora_backward_")(x, dy, operands)
    assert grads.t is not None
    assert (grads.t.shape, grads.b.shape, grads.a.shape) == ((M, 2 * RANK), (2 * F, RANK), (RANK, F))
    assert torch.equal(x, before) == taken  # else separate kernels wrote it
    assert len(calls) == taken
    for call in calls:
        assert all(given is wanted for given, wanted in zip(call[:3], (x, dy, operands), strict=True))
        assert call[4:] == (Tile(256, 2), {"swiglu": "silu", "geglu": "gelu"}[activation])
