"""The operations between the matmuls of a block, forward and backward: norms and activations.

Results are written into `out`, which may be columns of a wider matrix, so the next operation needs no copy. Backward
reads the input of forward instead of saved intermediates. The backward of an activation also recomputes its output, in
the memory of the gradient that it has read.

Legend: M rows, d the width of the model, F the width of the MLP. Everything is computed in float32 and rounded to the
dtype of `out`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.runtime.dispatch import kernel


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (.., d) normalized: LayerNorm (arXiv 1607.06450) with a bias, RMSNorm (1910.07467) without.

    weight and bias (d,) are rounded to the dtype of x, as transformers does for a model in that dtype.
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
    """out = residual + dx for a norm whose output has the gradient dy; all (M, d).

    `centred`: LayerNorm, which subtracts the mean; else RMSNorm. out may be residual.
    """
    xhat, inverse = _standardized(x, eps, centred=centred)  # (M, d), (M, 1)
    g = dy.float() * weight.to(x.dtype).float()
    dx = g - xhat * (g * xhat).mean(dim=1, keepdim=True)
    if centred:
        dx = dx - g.mean(dim=1, keepdim=True)
    torch.add(residual, (dx * inverse).to(out.dtype), out=out)


def norm_parameters_backward(x: Tensor, eps: float, dy: Tensor, *, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients (d,) float32 of the weight of a norm, and of its bias if it is `centred`."""
    xhat, _ = _standardized(x, eps, centred=centred)
    dweight = (dy.float() * xhat).sum(dim=0)
    return dweight, dy.sum(dim=0, dtype=torch.float32) if centred else None


@kernel
def copy_into(x: Tensor, out: Tensor) -> None:
    """out (M, n) = x: columns of one matrix into columns of another, at memory bandwidth."""
    out.copy_(x)


@kernel
def gelu_into(x: Tensor, out: Tensor) -> None:
    """out = gelu(x), (M, F), in the tanh form that GPT-2 and GPT-J use (arXiv 1606.08415)."""
    out.copy_(F.gelu(x, approximate="tanh"))


@kernel
def gelu_backward_(x: Tensor, dy: Tensor) -> None:
    """Writes dy gelu'(x) over x and gelu(x) over dy, both (M, F): the LoRA gradients need both."""
    y = F.gelu(x, approximate="tanh")
    x.copy_(torch.ops.aten.gelu_backward(dy, x, approximate="tanh"))
    dy.copy_(y)


@kernel
def swiglu_into(x: Tensor, out: Tensor) -> None:
    """out (M, F) = silu(gate) * up, where x (M, 2F) is [gate | up] (arXiv 2002.05202)."""
    gate, up = x.chunk(2, dim=1)  # (M, F) each
    torch.mul(F.silu(gate), up, out=out)


@kernel
def swiglu_backward_(x: Tensor, dy: Tensor) -> None:
    """Writes the gradients of [gate | up] over x (M, 2F), and silu(gate) * up over its gradient dy (M, F)."""
    gate, up = x.chunk(2, dim=1)  # (M, F) each
    active = F.silu(gate)
    dgate, dup = torch.ops.aten.silu_backward(dy * up, gate), dy * active
    torch.mul(active, up, out=dy)
    torch.cat((dgate, dup), dim=1, out=x)


@kernel
def geglu_into(x: Tensor, out: Tensor) -> None:
    """out (M, F) = gelu(gate) * up, where x (M, 2F) is [gate | up] (arXiv 2002.05202); GELU in its tanh form."""
    gate, up = x.chunk(2, dim=1)  # (M, F) each
    torch.mul(F.gelu(gate, approximate="tanh"), up, out=out)


@kernel
def geglu_backward_(x: Tensor, dy: Tensor) -> None:
    """Writes the gradients of [gate | up] over x (M, 2F), and gelu(gate) * up over its gradient dy (M, F)."""
    gate, up = x.chunk(2, dim=1)  # (M, F) each
    active = F.gelu(gate, approximate="tanh")
    dgate, dup = torch.ops.aten.gelu_backward(dy * up, gate, approximate="tanh"), dy * active
    torch.mul(active, up, out=dy)
    torch.cat((dgate, dup), dim=1, out=x)


def _standardized(x: Tensor, eps: float, *, centred: bool) -> tuple[Tensor, Tensor]:
    """(x (M, d) in float32, minus its mean if `centred`, over its deviation; 1 / deviation (M, 1))."""
    values = x.float()
    if centred:
        values = values - values.mean(dim=1, keepdim=True)
    inverse = torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
    return values * inverse, inverse
