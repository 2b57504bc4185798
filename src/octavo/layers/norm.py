"""LayerNorm (arXiv 1607.06450) and RMSNorm (1910.07467), with parameters in float32, computed in the type of x.

Legend: d the width of the model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo.ops import pointwise


class NormSpec(NamedTuple):
    """A norm as fused functions read it: LayerNorm with a bias, RMSNorm without."""

    weight: Tensor  # (d,)
    bias: Tensor | None  # (d,)
    eps: float
    zero_centred_weight: bool = False  # an RMSNorm multiplies by 1 + weight, in float32 (ops/pointwise.py)

    @property
    def centred(self) -> bool:
        """Whether it is a LayerNorm, which subtracts the mean. Every LayerNorm here has a bias."""
        return self.bias is not None

    @property
    def trained(self) -> list[Tensor]:
        """The parameters, which may require a gradient."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def write(self, x: Tensor, out: Tensor) -> None:
        """out = the norm of each group of d columns of x; both (M, n d)."""
        pointwise.norm_into(x, self.weight, self.bias, self.eps, out, zero_centred_weight=self.zero_centred_weight)

    def write_sum(self, x: Tensor, residual: Tensor, out: Tensor, *, scale: float) -> None:
        """out = residual + scale * the norm of x, all (M, d)."""
        pointwise.add_norm_into(
            x, self.weight, self.bias, self.eps, residual, out,
            scale=scale, zero_centred_weight=self.zero_centred_weight,
        )  # fmt: skip

    def backward(self, x: Tensor, dy: Tensor, residual: Tensor | None, out: Tensor, *, scale: float = 1.0) -> None:
        """out = residual + dx for the gradient scale * dy of the output; all (M, n d)."""
        pointwise.norm_backward_into(
            x, self.weight, self.eps, dy, residual, out,
            centred=self.centred, zero_centred_weight=self.zero_centred_weight, scale=scale,
        )  # fmt: skip

    def grad_trained(self, x: Tensor, dy: Tensor | None, *, scale: float = 1.0) -> list[Tensor | None]:
        """The gradients (d,) of `trained` for the gradient scale * dy of the output, None for those that need none.

        dy (M, n d) may be None if all are.
        """
        wanted = [tensor.requires_grad for tensor in self.trained]
        if not any(wanted):
            return [None] * len(wanted)
        assert dy is not None
        dy = dy if scale == 1 else dy * scale
        x, dy = (matrix.unflatten(1, (-1, self.weight.numel())) for matrix in (x, dy))  # (M, n, d) each
        gradients = pointwise.norm_parameters_backward(x, self.eps, dy, centred=self.centred)
        return [gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=False)]


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(x, self.spec())

    def spec(self) -> NormSpec:
        return NormSpec(self.weight, self.bias, self.eps)


class RmsNorm(nn.Module):
    """x / rms(x) * weight; the mean square is computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _normalize(x, self.spec())

    def spec(self) -> NormSpec:
        return NormSpec(self.weight, None, self.eps)


class GemmaRmsNorm(RmsNorm):
    """x / rms(x) * (1 + weight), in float32 until the result is rounded (Gemma, 2403.08295): a zero-centred weight."""

    def spec(self) -> NormSpec:
        return NormSpec(self.weight, None, self.eps, zero_centred_weight=True)


def _normalize(x: Tensor, norm: NormSpec) -> Tensor:
    """The reference where a gradient is needed; else one pass over memory."""
    if torch.is_grad_enabled():
        return pointwise.norm(x, norm.weight, norm.bias, norm.eps, zero_centred_weight=norm.zero_centred_weight)
    x = x.contiguous()  # the kernel reads whole rows
    out = torch.empty_like(x)
    norm.write(x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]))
    return out
