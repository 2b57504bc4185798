"""The 8-bit matmul of forward by cuBLAS, on a Turing GPU that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import devices
from tests.kernels.cases import CASES, ON_GPU
from tests.kernels.test_parity import test_a_kernel_is_its_reference as check_parity
from torch import Tensor

from octavo.hardware import Capabilities
from octavo.kernels import matmul8, matmul8_cublas
from octavo.ops.matmul8 import FP8, LowRankTerm, quantize_rows
from octavo.runtime import dispatch

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter runs it on a GPU that is not there")
NAME = "matmul8.matmul_8bit_into"


@pytest.fixture(autouse=True)
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul8, "capabilities_of", lambda _: devices.T4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_is_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in several, the last of fewer rows than cuBLAS multiplies."""
    calls: list[int] = []
    sums = matmul8_cublas._sums

    def counted(quantized: Tensor, weight: Tensor) -> Tensor:
        calls.append(len(quantized))
        return sums(quantized, weight)

    monkeypatch.setattr(matmul8_cublas, "_sums", counted)
    check_parity(NAME, dtype)
    given: list[Any] = [case(dtype)[0] for case in CASES[NAME]]
    assert len(calls) == sum(quantized.dtype != FP8 and scale.ndim == 1 for quantized, scale, *_ in given)
    monkeypatch.setattr(matmul8_cublas, "PIECE", 20 * 144)
    calls.clear()
    check_parity(NAME, dtype)
    assert {20, 10} <= set(calls)  # 130 rows of 144 columns


def multiplied(rows: int, **named: Any) -> tuple[Tensor, Tensor]:
    """(the result for `rows` rows of an input, the input's first values)."""
    random = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, 64, generator=random) for size in (40, 32))
    quantized, weight = quantize_rows(x[:rows], torch.int8), quantize_rows(w, torch.int8)
    out = torch.zeros(rows, 32)
    matmul8.matmul_8bit_into(*quantized, weight.values, out, weight.scale * 127, **named)
    return out, x[:rows] @ w.T


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_any_number_of_rows_is_multiplied(rows: int) -> None:
    out, exact = multiplied(rows)
    assert out.shape == exact.shape
    assert (out - exact).norm() < 0.02 * exact.norm()


def test_the_residual_may_be_the_output() -> None:
    t, b = torch.randn(40, 3), torch.randn(32, 3)
    base, _ = multiplied(40)
    alone, _ = multiplied(40, low_rank=LowRankTerm(t, b), residual=torch.ones(40, 32))
    torch.testing.assert_close(alone, base + t @ b.T + 1)


@pytest.mark.parametrize(
    ("device", "groups", "taken"),
    [(devices.T4, False, True), (devices.T4, True, False), (devices.V100, False, False), (devices.P100, False, False)],
)
def test_what_cublas_does_not_compute_is_computed_by_the_reference(
    device: Capabilities, groups: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul8, "capabilities_of", lambda _: device)
    calls: list[Any] = []
    monkeypatch.setattr(matmul8_cublas, "matmul_8bit_into", lambda *given: calls.append(given))
    quantized = quantize_rows(torch.randn(20, 256), torch.int8, groups=groups)
    weight, out = quantize_rows(torch.randn(32, 256), torch.int8).values, torch.zeros(20, 32)
    matmul8.matmul_8bit_into(*quantized, weight, out)
    assert bool(calls) == taken
    expected = torch.zeros(20, 32)
    dispatch.KERNELS[NAME](*quantized, weight, expected)
    assert taken or torch.equal(out, expected)
