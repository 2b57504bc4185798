"""Who takes an activation's backward with what pairs on its sides learn: a Hopper's kernel (hopper/learn.py), or the
kernels of its steps, one after another. Definition: ops/learn.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from octavo.ops.learn import Sides, Sums, learn_by_steps, one_pass
from octavo.ops.pointwise import gelu_backward_, swiglu_backward_


def gelu_learn_into(x: Tensor, dy: Tensor, sides: Sides, sums: Sums) -> None:
    _run(x, dy, sides, sums, gelu_backward_)


def swiglu_learn_into(x: Tensor, dy: Tensor, sides: Sides, sums: Sums) -> None:
    _run(x, dy, sides, sums, swiglu_backward_)


def _run(x: Tensor, dy: Tensor, sides: Sides, sums: Sums, backward_: Callable[[Tensor, Tensor], None]) -> None:
    if (shape := one_pass(x, dy, sides)) is None:
        backward_(x, dy)
        learn_by_steps(x, dy, sides, sums)
    else:
        from octavo.kernels.hopper.learn import learn_into

        learn_into(x, dy, sides, sums, *shape)
