"""The backward of an activation with LoRA gradients: the Hopper kernel if it supports the call, else separate kernels.

The Hopper kernel (hopper/lora_backward.py) computes everything in one pass if it fits into shared memory. Reference:
ops/lora_backward.py. On the meta device memory is allocated as on a Hopper GPU, and nothing is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from octavo.kernels.lora_tiles import hopper_tile, partial_sums, sum_parts
from octavo.ops.lora_backward import LoraGrads, LoraOperands, lora_grads
from octavo.ops.pointwise import geglu_backward_, gelu_backward_, swiglu_backward_
from octavo.runtime.dispatch import hopper_kernels_run_on, observe


def gelu_lora_backward_(x: Tensor, dy: Tensor, operands: LoraOperands, *, approximate: str = "tanh") -> LoraGrads:
    function = {"tanh": "gelu", "none": "gelu_erf"}[approximate]
    return _run(x, dy, operands, partial(gelu_backward_, approximate=approximate), function)


def swiglu_lora_backward_(x: Tensor, dy: Tensor, operands: LoraOperands) -> LoraGrads:
    return _run(x, dy, operands, swiglu_backward_, "silu")


def geglu_lora_backward_(x: Tensor, dy: Tensor, operands: LoraOperands) -> LoraGrads:
    return _run(x, dy, operands, geglu_backward_, "gelu")


def _run(
    x: Tensor, dy: Tensor, operands: LoraOperands, backward_: Callable[[Tensor, Tensor], None], function: str
) -> LoraGrads:
    """`backward_` is the separate kernel of an activation with f = `function` (kernels/pointwise.py)."""
    tile = hopper_tile(x, dy, operands) if x.is_meta or hopper_kernels_run_on(x) else None
    if x.is_meta:
        sums = partial_sums(x, dy, operands, tile)
        observe("lora_backward", [tensor for tensor in (x, dy, *operands, *sums) if tensor is not None])
        return sum_parts(sums)
    if tile is None:
        backward_(x, dy)
        return lora_grads(x, dy, operands)
    from octavo.kernels.hopper.lora_backward import lora_backward_into

    sums = partial_sums(x, dy, operands, tile)
    lora_backward_into(x, dy, operands, sums, tile, function)
    return sum_parts(sums)
