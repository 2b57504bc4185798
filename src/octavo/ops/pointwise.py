"""What stands between the products of a block, forward and backward: norms and activations.

Results are written into `out`, which may be columns of a wider matrix: what follows reads them there, and no
copy is made. Backward takes its input again instead of anything that forward would have to keep; an activation's makes
its output once more in the same pass, in the memory of the gradient that it has used up.

Legend: M rows, d the width of the model, F the width of the MLP. All take their numbers in float32 and write
them in the type of `out`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.runtime.dispatch import kernel


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (.., d) normalised: LayerNorm (arXiv 1607.06450) with a bias, RMSNorm (1910.07467) without.

    weight and bias (d,) are taken in x's type, as transformers does when a model is held in that type.
    """
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


@kernel
def norm_into(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    """`norm` of x (M, d), into out (M, d)."""
    out.copy_(norm(x, weight, bias, eps))


@kernel
def norm_backward_into(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, residual: Tensor, out: Tensor, *, centred: bool
) -> None:
    """out = residual + the gradient to x of a norm whose output has the gradient dy; all (M, d).

    `centred`: LayerNorm, which takes the mean off; else RMSNorm. out may be residual itself.
    """
    xhat, inverse = _standardised(x, eps, centred=centred)
    g = dy.float() * weight.to(x.dtype).float()
    dx = g - xhat * (g * xhat).mean(dim=1, keepdim=True)
    if centred:
        dx = dx - g.mean(dim=1, keepdim=True)
    torch.add(residual, (dx * inverse).to(out.dtype), out=out)


def norm_parameters_backward(x: Tensor, eps: float, dy: Tensor, *, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients (d,) float32 of a norm's weight, and of its bias where it is `centred`."""
    xhat, _ = _standardised(x, eps, centred=centred)
    dweight = (dy.float() * xhat).sum(dim=0)
    return dweight, dy.sum(dim=0, dtype=torch.float32) if centred else None


@kernel
def copy_into(x: Tensor, out: Tensor) -> None:
    """out (M, n) = x: columns of one matrix into columns of another, at the speed of memory."""
    out.copy_(x)


@kernel
def gelu_into(x: Tensor, out: Tensor) -> None:
    """out = gelu(x), (M, F), in the tanh form that GPT-2 and GPT-J use (arXiv 1606.08415)."""
    out.copy_(F.gelu(x, approximate="tanh"))


@kernel
def gelu_backward_(x: Tensor, dy: Tensor) -> None:
    """Writes dy gelu'(x) over x and gelu(x) over dy, both (M, F): what comes next in backward needs both."""
    y = F.gelu(x, approximate="tanh")
    x.copy_(torch.ops.aten.gelu_backward(dy, x, approximate="tanh"))
    dy.copy_(y)


@kernel
def swiglu_into(x: Tensor, out: Tensor) -> None:
    """out (M, F) = silu(gate) * up, where x (M, 2F) is [gate | up] (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=1)
    torch.mul(F.silu(gate), up, out=out)


@kernel
def swiglu_backward_(x: Tensor, dy: Tensor) -> None:
    """Writes the gradients of [gate | up] over these, x (M, 2F), and silu(gate) * up over its gradient dy (M, F)."""
    gate, up = x.chunk(2, dim=1)
    active = F.silu(gate)
    dgate, dup = torch.ops.aten.silu_backward(dy * up, gate), dy * active
    torch.mul(active, up, out=dy)
    torch.cat((dgate, dup), dim=1, out=x)


def _standardised(x: Tensor, eps: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    """(x in float32 with mean taken off and divided by its deviation, 1 / deviation (M, 1))."""
    values = x.float()
    if centred:
        values = values - values.mean(dim=1, keepdim=True)
    inverse = torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
    return values * inverse, inverse
