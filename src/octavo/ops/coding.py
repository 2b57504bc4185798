"""What goes into a product in 8 bits, coded in the pass that makes it: a norm, or an activation.

The product reads codes of its input's rows, the low-rank pairs beside it the input itself; so both are written, and a
reading of the input is saved.

Legend: M rows, d the width of the model, F that of the MLP; codes are (M, d) or (M, F), as ops/eight.py makes them.
"""

from __future__ import annotations

from torch import Tensor

from octavo.ops.eight import Coded, code_rows_into
from octavo.ops.pointwise import gelu_into, norm_into, swiglu_into
from octavo.ops.twins import twin


@twin
def norm_coded_into(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, codes: Coded) -> None:
    """`norm_into` of x (M, d), and the codes of out."""
    norm_into(x, weight, bias, eps, out)
    code_rows_into(out, *codes, None)


@twin
def gelu_coded_into(x: Tensor, out: Tensor, codes: Coded) -> None:
    """`gelu_into` of x (M, F), and the codes of out."""
    gelu_into(x, out)
    code_rows_into(out, *codes, None)


@twin
def swiglu_coded_into(x: Tensor, out: Tensor, codes: Coded) -> None:
    """`swiglu_into` of x (M, 2F), and the codes of out."""
    swiglu_into(x, out)
    code_rows_into(out, *codes, None)
