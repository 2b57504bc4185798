"""An activation whose output is coded in the pass that makes it, and never stands anywhere.

In 8 bits a product reads codes of its input's rows, and the low-rank pairs beside it the input itself. An activation's
output is a model's widest matrix; written once and read twice for that it costs more than the activation. Here a few
rows at a time are computed twice, once for their largest numbers and what the pairs make of them, once for the codes.

Legend: M rows; x is (M, F) for GELU, (M, 2F) for SwiGLU ([gate | up]); r the rank of the pairs that read the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.ops.eight import code_rows_into
from octavo.ops.pointwise import gelu_into, swiglu_into
from octavo.ops.room import Coding
from octavo.ops.twins import twin


@twin
def gelu_coded_into(x: Tensor, to: Coding) -> None:
    """The codes of gelu(x) in x's type under the least scale of each row, and that times a^T."""
    y = x.new_empty(to.codes.shape)
    gelu_into(x, y)
    _code_into(y, to)


@twin
def swiglu_coded_into(x: Tensor, to: Coding) -> None:
    """The codes of silu(gate) * up in x's type under the least scale of each row, and that times a^T."""
    y = x.new_empty(to.codes.shape)
    swiglu_into(x, y)
    _code_into(y, to)


def _code_into(y: Tensor, to: Coding) -> None:
    code_rows_into(y, to.codes, to.scale, None)
    if to.a is not None and to.t is not None:
        torch.mm(y, to.a.T, out=to.t)
