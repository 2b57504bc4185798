"""The 8-bit matmul that Turing has, by cuBLAS, on the GPU that is there: against integers, and in a training step."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from tests import devices
from torch import Tensor

from octavo.kernels import matmul8_cublas
from octavo.ops.matmul8 import LowRankTerm, matmul_8bit_into, quantize_rows

pytestmark = pytest.mark.filterwarnings("default")  # warnings of libraries are no failures
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def on_a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = import_module("octavo.kernels.matmul8")
    monkeypatch.setattr(kernels, "capabilities_of", lambda _: devices.T4)
    monkeypatch.setattr(kernels, "hopper_kernels_run_on", lambda _: False)


@pytest.mark.parametrize("piece", [2**23, 20 * 4096])
@pytest.mark.parametrize("rows", [1, 16, 17, 300, 2048])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (4096, 16384), (16384, 4096), (48, 112)])
def test_the_sums_of_cublas_are_exact(rows: int, k: int, n: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding to float16 the result is the scale times an integer, which float64 computes exactly."""
    monkeypatch.setattr(matmul8_cublas, "PIECE", piece)
    random = torch.Generator(GPU).manual_seed(0)
    quantized = torch.randint(-127, 128, (rows, k), generator=random, device=GPU, dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), generator=random, device=GPU, dtype=torch.int8)
    out = torch.full((rows, n), torch.nan, device=GPU)
    matmul_8bit_into(quantized, torch.full((rows,), 0.5, device=GPU), weight, out)
    expected = (quantized.double() @ weight.double().T) * 0.5
    # An int32 sum of 16,384 terms is below 2^29: float32 rounds it once.
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-24, atol=0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rank", [0, 16])
def test_all_operands_of_a_linear_in_float16(rank: int, residual: bool) -> None:
    """Rounded to float16 (2^-11 of a value) at most three times: low-rank term, residual added to it, result."""
    random = torch.Generator(GPU).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=GPU)

    m, k, n = 2048, 4096, 4096
    quantized, scale = quantize_rows(normal(m, k), torch.int8)
    weight, absmax = quantize_rows(normal(n, k), torch.int8)
    operands: dict[str, Any] = {"absmax": absmax * 127, "bias": normal(n // 2), "bias_start": n // 4}
    if rank:
        operands["low_rank"] = LowRankTerm(normal(m, rank).half(), normal(n, rank).half())
    if residual:
        operands["residual"] = normal(m, n).half()
    out = torch.full((m, n), torch.nan, device=GPU, dtype=torch.float16)
    matmul_8bit_into(quantized, scale, weight, out, **operands)
    expected = (quantized.double() @ weight.double().T) * scale.double()[:, None] * absmax.double()
    expected[:, n // 4 : n // 4 + n // 2] += operands["bias"]
    size = expected.abs()
    if rank:
        term = operands["low_rank"].t.double() @ operands["low_rank"].b.double().T
        expected, size = expected + term, size + term.abs()
    if residual:
        expected, size = expected + operands["residual"], size + operands["residual"].abs()
    assert bool(((out.double() - expected).abs() <= 3 * 2.0**-11 * size + 1e-3).all())
    assert float((out.double() - expected).norm() / expected.norm()) < 2.0**-11
