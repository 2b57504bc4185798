"""Dispatch of an activation's backward with the LoRA gradients of the layers before and after it.

The Hopper kernel (hopper/lora_backward.py) if it fits into shared memory, else separate kernels.
Reference: ops/lora_backward.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from octavo.ops.lora_backward import LoraOperands, PartialSums, hopper_tile, lora_backward_by_steps
from octavo.ops.pointwise import gelu_backward_, swiglu_backward_


def gelu_lora_backward_into(x: Tensor, dy: Tensor, sides: LoraOperands, sums: PartialSums) -> None:
    _run(x, dy, sides, sums, gelu_backward_)


def swiglu_lora_backward_into(x: Tensor, dy: Tensor, sides: LoraOperands, sums: PartialSums) -> None:
    _run(x, dy, sides, sums, swiglu_backward_)


def _run(
    x: Tensor, dy: Tensor, sides: LoraOperands, sums: PartialSums, backward_: Callable[[Tensor, Tensor], None]
) -> None:
    if (shape := hopper_tile(x, dy, sides)) is None:
        backward_(x, dy)
        lora_backward_by_steps(x, dy, sides, sums)
    else:
        from octavo.kernels.hopper.lora_backward import lora_backward_into

        lora_backward_into(x, dy, sides, sums, *shape)
