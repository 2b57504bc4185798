"""An activation's backward in one pass, by many programs: what its steps give one after another."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.cases import matrix
from torch import Tensor

from octavo.kernels.lora_tiles import hopper_tile
from octavo.ops.lora_backward import LoraOperands, gelu_lora_backward_, lora_grads, swiglu_lora_backward_
from octavo.ops.pointwise import gelu_backward_, swiglu_backward_
from octavo.runtime.dispatch import hopper_kernels_run_on

pytestmark = pytest.mark.filterwarnings("default")  # what libraries say of each other is no fault of ours
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def columns(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """The last n of a wider matrix's."""
    return torch.randn(m, n + 24, device="cuda").to(dtype)[:, 24:]


@matrix(
    dtype=[torch.bfloat16, torch.float16],
    shape=[  # m, f, parts, rank, behind
        (4096, 4096, 1, 16, 16),
        (4096, 4096, 2, 16, 16),
        (1000, 16384, 1, 16, 16),  # rows of the last program are fewer
        (65, 264, 1, 8, 24),  # so are columns
        (3, 520, 2, 16, 16),
        (333, 264, 1, 64, 40),
        (333, 264, 2, 5, 64),  # rows of t start where the copy engine cannot
        (300, 264, 1, 300, 16),  # too many for one pass
        (70, 260, 2, 16, 16),  # and its second part starts where that cannot read
    ],
)(lambda dtype, shape: dtype == torch.bfloat16 or shape[0] in (65, 3))
def test_one_pass_is_the_steps(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    torch.manual_seed(0)
    m, f, parts, rank, behind = shape
    x, dy = columns(m, parts * f, dtype), columns(m, f, dtype) * 0.1
    b = (torch.randn(parts * f, rank, device="cuda") * f**-0.5).to(dtype)
    operands = LoraOperands(columns(m, parts * rank, dtype), b, columns(m, behind, dtype))
    one_pass = hopper_kernels_run_on(x) and hopper_tile(x, dy, operands) is not None
    assert one_pass == (HOPPER and rank < 300 and f % 8 == 0)
    whole, y = x._base.clone(), dy.clone()  # type: ignore[union-attr]
    dx = whole[:, 24:]
    (gelu_backward_ if parts == 1 else swiglu_backward_)(dx, y)
    wanted = lora_grads(dx, y, operands)
    before = x._base.clone()  # type: ignore[union-attr]
    backward_ = gelu_lora_backward_ if parts == 1 else swiglu_lora_backward_
    found = backward_(x, dy.clone(), operands)
    assert torch.equal(x._base, whole)  # type: ignore[arg-type]  # columns next to x are unchanged
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert torch.linalg.vector_norm(one - other) <= 1e-4 * torch.linalg.vector_norm(other)
    for one, other in zip(found, backward_(before[:, 24:], dy.clone(), operands), strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]  # the order of sums does not change
