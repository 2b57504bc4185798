"""Selects the LoRA next to the last mixer of a branch, whose gradients the mixer's backward computes in its own pass.

An activation is read and written once in backward. In the same pass, ops/lora_backward.py computes the gradients of A
of the LoRA behind it (from its output) and of B of the LoRA in front of it (from its input gradient).

Legend: u (M, U) is the output of the inner matmul, whose last columns the mixer reads; C the extra columns of the input
of a matmul (layers/fused_linear.py).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from octavo.fused.mixers import Mixer
from octavo.layers.fused_linear import FusedLinear
from octavo.ops.linear import LoraSlice
from octavo.ops.lora_backward import LoraOperands
from octavo.ops.lora_factors import pack_b_into


class LoraInput(NamedTuple):
    """The extra columns (M, C) of the inner matmul's input, and whether the gradient to them is to be computed here."""

    extra: Tensor
    wants_dt: bool


def lora_operands(
    mixer: Mixer, inner: FusedLinear, outer: FusedLinear, lora_input: LoraInput, dt: Tensor
) -> tuple[int, LoraOperands | None]:
    """(the first column of u that the mixer reads, the operands); None if one side has no LoRA.

    dt (M, C) is the gradient to the extra columns of the outer matmul's input.
    """
    start, behind = inner.parts[-1].rows - mixer.inputs, outer.parts[-1]
    front = _in_front(inner, start, mixer.lora_chunks)
    # With dropout, the LoRA behind the mixer reads something else than the mixer's output.
    if front is None or not behind.rank or behind.dropout:
        return start, None
    dt_behind = dt[:, outer.rank - behind.rank : outer.rank]  # (M, r)
    rank, width = len(front[0].a), mixer.outputs  # r, F
    b = None
    if lora_input.wants_dt:
        b = dt.new_empty(mixer.inputs, rank)  # (mixer.inputs, r)
        for chunk, lora in zip(b.split(width), front, strict=True):
            pack_b_into(chunk, [lora._replace(start=0, stop=width)])
    t = lora_input.extra[:, inner.rank - len(front) * rank : inner.rank]  # (M, chunks * r)
    return start, LoraOperands(t, b, dt_behind)


def _in_front(inner: FusedLinear, start: int, count: int) -> list[LoraSlice] | None:
    """The `count` LoRA slices of the rows from `start` on if they have one rank and equal row counts, else None.

    None too if a bias is trained, whose gradient would need a pass of its own.
    """
    if not count or any(part.bias is not None and part.bias.requires_grad for part in inner.parts):
        return None
    slices, stop = inner.lora[-count:], inner.parts[-1].rows
    size = (stop - start) // count  # rows of a chunk: F
    rows = [(first, first + size) for first in range(start, stop, size)]
    fits = [(part.start, part.stop) for part in slices] == rows and len({len(part.a) for part in slices}) == 1
    return slices if fits else None
