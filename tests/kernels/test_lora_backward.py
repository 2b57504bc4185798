"""Who takes an activation's backward with what pairs on its sides learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.kernels import lora_backward
from octavo.kernels.hopper import lora_backward as hopper_tile
from octavo.ops.lora_backward import LoraOperands, PartialSums

M, F, RANK = 5, 16, 2


def given() -> tuple[torch.Tensor, torch.Tensor, LoraOperands, PartialSums]:
    t, after = torch.randn(M, 2 * RANK), torch.randn(M, RANK)
    sums = PartialSums(torch.zeros(1, M, 2 * RANK), torch.zeros(1, 2 * F, RANK), torch.zeros(1, RANK, F))
    return torch.randn(M, 2 * F), torch.randn(M, F), LoraOperands(t, torch.randn(2 * F, RANK), after), sums


@pytest.mark.parametrize("shape", [(256, 3), None])
def test_a_program_that_does_all_is_taken_where_there_is_one(
    shape: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(lora_backward, "hopper_tile", lambda *_: shape)
    monkeypatch.setattr(hopper_tile, "lora_backward_into", lambda *call: calls.append(call))
    x, dy, sides, sums = given()
    before = x.clone()
    lora_backward.swiglu_lora_backward_into(x, dy, sides, sums)
    if shape is None:
        assert calls == []
        assert not torch.equal(x, before)
        assert all(each is not None and bool(each.any()) for each in sums)
    else:
        assert calls == [(x, dy, sides, sums, 256, 3)]
        assert torch.equal(x, before)  # which is the program's to write
