"""Who takes an activation's backward with what pairs on its sides learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.kernels import learn
from octavo.kernels.hopper import learn as one_pass
from octavo.ops.learn import Sides, Sums

M, F, RANK = 5, 16, 2


def given() -> tuple[torch.Tensor, torch.Tensor, Sides, Sums]:
    t, after = torch.randn(M, 2 * RANK), torch.randn(M, RANK)
    sums = Sums(torch.zeros(1, M, 2 * RANK), torch.zeros(1, 2 * F, RANK), torch.zeros(1, RANK, F))
    return torch.randn(M, 2 * F), torch.randn(M, F), Sides(t, torch.randn(2 * F, RANK), after), sums


@pytest.mark.parametrize("shape", [(256, 3), None])
def test_a_program_that_does_all_is_taken_where_there_is_one(
    shape: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(learn, "one_pass", lambda *_: shape)
    monkeypatch.setattr(one_pass, "learn_into", lambda *call: calls.append(call))
    x, dy, sides, sums = given()
    before = x.clone()
    learn.swiglu_learn_into(x, dy, sides, sums)
    if shape is None:
        assert calls == []
        assert not torch.equal(x, before)
        assert all(each is not None and bool(each.any()) for each in sums)
    else:
        assert calls == [(x, dy, sides, sums, 256, 3)]
        assert torch.equal(x, before)  # which is the program's to write
