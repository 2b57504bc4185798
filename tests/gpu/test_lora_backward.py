"""The fused backward of an activation and its LoRA gradients against the separate kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.gpu.cases import matrix
from torch import Tensor

from octavo.kernels.lora_tiles import hopper_tile
from octavo.ops import lora_backward, pointwise
from octavo.ops.lora_backward import LoraOperands, lora_grads
from octavo.runtime.dispatch import hopper_kernels_run_on

pytestmark = pytest.mark.filterwarnings("default")  # warnings of libraries are no failures
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def columns(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The last n columns of a matrix with n + 24 columns."""
    return torch.randn(m, n + 24, device="cuda").to(dtype)[:, 24:]


@matrix(
    dtype=[torch.bfloat16, torch.float16],
    shape=[  # m, f, activation, rank, rank of the next layer
        (4096, 4096, "gelu", 16, 16),
        (4096, 4096, "swiglu", 16, 16),
        (4096, 4096, "geglu", 16, 16),
        (4096, 4096, "gelu none", 16, 16),
        (1000, 16384, "gelu", 16, 16),  # the last tile has fewer rows
        (65, 264, "gelu", 8, 24),  # and fewer columns
        (3, 520, "swiglu", 16, 16),
        (65, 520, "geglu", 16, 16),
        (65, 264, "gelu none", 16, 16),
        (333, 264, "gelu", 64, 40),
        (333, 264, "swiglu", 5, 64),  # rows of t are not aligned for TMA
        (300, 264, "gelu", 300, 16),  # the rank is too large for the fused kernel
        (70, 260, "swiglu", 16, 16),  # the second chunk is not aligned for TMA
    ],
)(lambda dtype, shape: dtype == torch.bfloat16 or shape[0] in (65, 3))
def test_the_fused_backward_equals_the_separate_kernels(
    dtype: torch.dtype, shape: tuple[int, int, str, int, int]
) -> None:
    torch.manual_seed(0)
    m, f, activation, rank, next_rank = shape
    chunks = 1 if activation.startswith("gelu") else 2
    activation, _, approximate = activation.partition(" ")
    named = {"approximate": approximate} if approximate else {}
    x, dy = columns(m, chunks * f, dtype), columns(m, f, dtype) * 0.1
    b = (torch.randn(chunks * f, rank, device="cuda") * f**-0.5).to(dtype)
    operands = LoraOperands(columns(m, chunks * rank, dtype), b, columns(m, next_rank, dtype))
    fused = hopper_kernels_run_on(x) and hopper_tile(x, dy, operands) is not None
    assert fused == (HOPPER and rank < 300 and f % 8 == 0)
    base, y = x._base.clone(), dy.clone()  # type: ignore[union-attr]
    dx = base[:, 24:]
    getattr(pointwise, f"{activation}_backward_")(dx, y, **named)
    expected = lora_grads(dx, y, operands)
    before = x._base.clone()  # type: ignore[union-attr]
    backward_ = partial(getattr(lora_backward, f"{activation}_lora_backward_"), **named)
    actual = backward_(x, dy.clone(), operands)
    assert torch.equal(x._base, base)  # type: ignore[arg-type]  # columns next to x are unchanged
    for gradient, wanted in zip(actual, expected, strict=True):
        assert gradient is not None
        assert wanted is not None
        assert torch.linalg.vector_norm(gradient - wanted) <= 1e-4 * torch.linalg.vector_norm(wanted)
    for gradient, repeated in zip(actual, backward_(before[:, 24:], dy.clone(), operands), strict=True):
        assert torch.equal(gradient, repeated)  # the order of sums does not change
