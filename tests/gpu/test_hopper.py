"""A Hopper's own product in 8 bits beside the general kernel: the same numbers, with tiles of every width."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.ops import matmul8
from octavo.runtime.dispatch import hopper_kernels_run_on

pytestmark = pytest.mark.filterwarnings("default")  # what libraries say of each other is no fault of ours
CARD = torch.device("cuda")


def test_this_card_has_it() -> None:
    assert hopper_kernels_run_on(torch.empty(1, device=CARD)) == (torch.cuda.get_device_capability()[0] == 9)


@pytest.mark.parametrize("kind", [torch.int8, matmul8.FP8], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n", "rank", "residual"),
    [
        (2050, 400, 4128, 64, False),  # tiles of 256 columns; none of the sizes is a multiple of a tile's
        (2050, 4096, 4096, 16, True),
        (500, 528, 4096, 100, True),  # 128
        (100, 16384, 4096, 16, False),  # 64
        (3, 32, 16, 0, True),
    ],
)
def test_its_product_is_that_of_the_general_kernel(
    m: int, k: int, n: int, rank: int, residual: bool, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=CARD)

    codes, scale = matmul8.quantize_rows(random(m, k), kind)
    weight, absmax = matmul8.quantize_rows(random(n, k), torch.int8)
    if kind == matmul8.FP8:
        weight = weight.float().to(kind)
    named: dict[str, Any] = {"absmax": absmax * 127, "bias": random(n // 2), "bias_start": n // 4}
    if rank:
        named["low_rank"] = matmul8.LowRankTerm(random(m, rank).bfloat16(), random(n, rank).bfloat16())
    if residual:
        named["residual"] = random(m, n).bfloat16()
    found, wanted = (torch.full((m, n), torch.nan, device=CARD, dtype=torch.bfloat16) for _ in range(2))
    matmul8.matmul_8bit_into(codes, scale, weight, found, **named)
    monkeypatch.setattr(import_module("octavo.kernels.matmul8"), "hopper_kernels_run_on", lambda _: False)
    matmul8.matmul_8bit_into(codes, scale, weight, wanted, **named)
    assert bool(found.isfinite().all())  # and so all are written
    # The same sums, of which the tensor cores hold 14 digits (binary) for fp8, rounded to 8 digits at the end.
    difference = (found.float() - wanted.float()).abs()
    assert bool((difference <= 2.0**-7 * wanted.float().abs().amax(dim=1, keepdim=True)).all())
    assert float(difference.norm() / wanted.float().norm()) < 1e-3
