"""Which pairs stand around the last piece of a branch, so that they learn in its backward (ops/lora_backward.py).

Legend: u (M, U) is the output of the inner product, and the piece reads its last columns; C columns beside the input of
a product (layers/fused_linear.py).
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
    """Of the pairs of the inner product: what they made of their input (M, C), and whether a gradient to that is asked
    for beside the product's."""

    inner: Tensor
    to_pairs: bool


def lora_operands(
    mixer: Mixer, inner: FusedLinear, outer: FusedLinear, lora_input: LoraInput, dt: Tensor
) -> tuple[int, LoraOperands | None]:
    """(the first column of u that the piece reads, the pairs on its sides); None where one side has none.

    dt (M, C) is the gradient to what the pairs of the outer product made of their input.
    """
    start, behind = inner.parts[-1].rows - mixer.inputs, outer.parts[-1]
    front = _in_front(inner, start, mixer.lora_chunks)
    # What dropout leaves of its output is not what a pair behind it read.
    if front is None or not behind.rank or behind.dropout:
        return start, None
    after = dt[:, outer.rank - behind.rank : outer.rank]
    rank, width = len(front[0].a), mixer.outputs
    b = None
    if lora_input.to_pairs:
        b = dt.new_empty(mixer.inputs, rank)
        for own, pair in zip(b.split(width), front, strict=True):
            pack_b_into(own, [pair._replace(start=0, stop=width)])
    return start, LoraOperands(lora_input.inner[:, inner.rank - len(front) * rank : inner.rank], b, after)


def _in_front(inner: FusedLinear, start: int, count: int) -> list[LoraSlice] | None:
    """The pairs of the rows from `start` on: so many, of one rank and as many rows each; else None.

    None too where a bias is trained, whose gradient would need another pass.
    """
    if not count or any(part.bias is not None and part.bias.requires_grad for part in inner.parts):
        return None
    pairs, stop = inner.lora[-count:], inner.parts[-1].rows
    each = (stop - start) // count
    groups = [(first, first + each) for first in range(start, stop, each)]
    fits = [(pair.start, pair.stop) for pair in pairs] == groups and len({len(pair.a) for pair in pairs}) == 1
    return pairs if fits else None
