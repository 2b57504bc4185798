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


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, zero_centred_weight: bool = False) -> Tensor:
    """x (.., d) normalized: LayerNorm (arXiv 1607.06450) with a bias, RMSNorm (1910.07467) without.

    weight and bias (d,) are rounded to the dtype of x, as transformers does for a model in that dtype. With
    `zero_centred_weight` an RMSNorm multiplies by 1 + weight in float32 and rounds the result only (Gemma, 2403.08295).
    """
    if zero_centred_weight:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], 1 + weight.to(wide), eps).to(x.dtype)
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


@kernel
def norm_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, *, zero_centred_weight: bool = False
) -> None:
    """`norm` of each group of d columns of x (M, n d), into out (M, n d), for a weight (d,). out may be x.

    n is 1 for the norms of a block, and the number of heads for a norm of each head.
    """
    grouped, target = (_grouped(matrix, weight) for matrix in (x, out))  # (M, n, d) each
    target.copy_(norm(grouped, weight, bias, eps, zero_centred_weight=zero_centred_weight))


@kernel
def add_norm_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor, out: Tensor, *,
    scale: float = 1.0, zero_centred_weight: bool = False,
) -> None:  # fmt: skip
    """out = residual + scale * norm(x), all (M, d), for a norm after a branch. out may be x or residual.

    The norm is rounded to the dtype of x, and the sum to that of out, as by a norm and an addition.
    """
    normed = norm(x, weight, bias, eps, zero_centred_weight=zero_centred_weight)
    torch.add(residual, normed, alpha=scale, out=out)


@kernel
def norm_backward_into(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, residual: Tensor | None, out: Tensor, *,
    centred: bool, zero_centred_weight: bool = False, scale: float = 1.0,
) -> None:  # fmt: skip
    """out = residual + dx for a norm whose output has the gradient scale * dy, which is rounded to the dtype of dy.

    All matrices are (M, n d), the weight is (d,). `centred`: LayerNorm, which subtracts the mean; else RMSNorm. out may
    be residual or x. Without residual out = dx.
    """
    if scale != 1:
        dy = dy * scale
    factors = 1 + weight.float() if zero_centred_weight else weight.to(x.dtype).float()  # (d,)
    target = _grouped(out, weight)  # (M, n, d)
    xhat, inverse = _standardized(_grouped(x, weight), eps, centred=centred)  # (M, n, d), (M, n, 1)
    g = _grouped(dy, weight).float() * factors
    dx = g - xhat * (g * xhat).mean(dim=-1, keepdim=True)
    if centred:
        dx = dx - g.mean(dim=-1, keepdim=True)
    dx = (dx * inverse).to(out.dtype)
    target.copy_(dx if residual is None else _grouped(residual, weight) + dx)


def norm_parameters_backward(x: Tensor, eps: float, dy: Tensor, *, centred: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients (d,) float32 of the weight of a norm of x (.., d), and of its bias if it is `centred`."""
    xhat, _ = _standardized(x, eps, centred=centred)
    dweight = (dy.float() * xhat).flatten(0, -2).sum(dim=0)
    return dweight, dy.flatten(0, -2).sum(dim=0, dtype=torch.float32) if centred else None


@kernel
def copy_into(x: Tensor, out: Tensor) -> None:
    """out (M, n) = x: columns of one matrix into columns of another, at memory bandwidth."""
    out.copy_(x)


@kernel
def gelu_into(x: Tensor, out: Tensor, *, approximate: str = "tanh") -> None:
    """out = gelu(x), (M, F) (arXiv 1606.08415): in the tanh form of GPT-2 and GPT-J, or with erf ("none") of Pythia."""
    out.copy_(F.gelu(x, approximate=approximate))


@kernel
def gelu_backward_(x: Tensor, dy: Tensor, *, approximate: str = "tanh") -> None:
    """Writes dy gelu'(x) over x and gelu(x) over dy, both (M, F): the LoRA gradients need both."""
    y = F.gelu(x, approximate=approximate)
    x.copy_(torch.ops.aten.gelu_backward(dy, x, approximate=approximate))
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
    """(x (.., d) in float32, minus its mean if `centred`, over its deviation; 1 / deviation (.., 1))."""
    values = x.float()
    if centred:
        values = values - values.mean(dim=-1, keepdim=True)
    inverse = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return values * inverse, inverse


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, n d) as a view (M, n, d) for a weight (d,)."""
    view: Tensor = x.unflatten(1, (-1, weight.numel()))
    return view
