"""Which kernel computes an 8-bit matmul on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import matmul8
from octavo.kernels.hopper import matmul8 as hopper
from octavo.ops.matmul8 import LowRankTerm, quantize_rows

M, K, N = 3, 32, 16


@pytest.mark.parametrize(
    ("dtype", "groups", "shift", "taken"),
    [
        (torch.float16, False, 0, True),
        (torch.float32, False, 0, False),  # results of 4 bytes
        (torch.float16, True, 0, False),  # a scale for each group
        (torch.float16, False, 1, False),  # results that TMA cannot store
    ],
)
def test_the_hopper_kernel_computes_what_it_supports(
    dtype: torch.dtype, groups: bool, shift: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(matmul8, "hopper_kernels_run_on", lambda _: True)
    monkeypatch.setattr(hopper, "matmul_8bit_into", lambda *call: calls.append(call))
    quantized, scale = quantize_rows(torch.randn(M, K), torch.int8, groups=groups)
    weight, out = (
        quantize_rows(torch.randn(N, K), torch.int8).values,
        torch.zeros(M, N + 8, dtype=dtype)[:, shift : N + shift],
    )
    t, b = (torch.randn(rows, 7).to(dtype)[:, 2:5] for rows in (M, N))  # rows start where TMA cannot read

    def starts_right(x: Tensor) -> bool:
        return x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0

    matmul8.matmul_8bit_into(quantized, scale, weight, out, low_rank=LowRankTerm(t, b))
    assert bool(out.any()) != taken  # else the general kernel wrote it
    assert len(calls) == taken
    for call in calls:
        assert call[0] is quantized
        assert call[3] is out
        assert all(starts_right(each) for each in call[7])
        assert all(torch.equal(*both) for both in zip(call[7], (t, b), strict=True))
