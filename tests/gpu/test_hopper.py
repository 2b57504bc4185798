"""The 8-bit matmul kernel for Hopper against the general kernel, with tiles of all widths."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.ops import matmul8
from octavo.runtime.dispatch import hopper_kernels_run_on

pytestmark = pytest.mark.filterwarnings("default")  # warnings of libraries are no failures
GPU = torch.device("cuda")


def test_hopper_kernels_run_on_compute_capability_9() -> None:
    assert hopper_kernels_run_on(torch.empty(1, device=GPU)) == (torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.parametrize("kind", [torch.int8, matmul8.FP8], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n", "rank", "residual"),
    [
        (2050, 400, 4128, 64, False),  # tiles of 256 columns; no size is a multiple of the tile
        (2050, 4096, 4096, 16, True),
        (500, 528, 4096, 100, True),  # tiles of 128 columns
        (100, 16384, 4096, 16, False),  # tiles of 64 columns
        (3, 32, 16, 0, True),
    ],
)
def test_the_hopper_matmul_equals_the_general_kernel(
    m: int, k: int, n: int, rank: int, residual: bool, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=GPU)

    quantized, scale = matmul8.quantize_rows(random(m, k), kind)
    weight, absmax = matmul8.quantize_rows(random(n, k), torch.int8)
    if kind == matmul8.FP8:
        weight = weight.float().to(kind)
    operands: dict[str, Any] = {"absmax": absmax * 127, "bias": random(n // 2), "bias_start": n // 4}
    if rank:
        operands["low_rank"] = matmul8.LowRankTerm(random(m, rank).bfloat16(), random(n, rank).bfloat16())
    if residual:
        operands["residual"] = random(m, n).bfloat16()
    actual, expected = (torch.full((m, n), torch.nan, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    matmul8.matmul_8bit_into(quantized, scale, weight, actual, **operands)
    monkeypatch.setattr(import_module("octavo.kernels.matmul8"), "hopper_kernels_run_on", lambda _: False)
    matmul8.matmul_8bit_into(quantized, scale, weight, expected, **operands)
    assert bool(actual.isfinite().all())  # all elements are written
    # Tensor cores accumulate fp8 with 14 bits of precision; the result is rounded to 8 bits.
    difference = (actual.float() - expected.float()).abs()
    assert bool((difference <= 2.0**-7 * expected.float().abs().amax(dim=1, keepdim=True)).all())
    assert float(difference.norm() / expected.float().norm()) < 1e-3
