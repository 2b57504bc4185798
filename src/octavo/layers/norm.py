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

    @property
    def centred(self) -> bool:
        """Whether it is a LayerNorm, which subtracts the mean. Every LayerNorm here has a bias."""
        return self.bias is not None

    @property
    def trained(self) -> list[Tensor]:
        """The parameters, which may require a gradient."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]


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


def _normalize(x: Tensor, norm: NormSpec) -> Tensor:
    """The reference where a gradient is needed; else one pass over memory."""
    if torch.is_grad_enabled():
        return pointwise.norm(x, norm.weight, norm.bias, norm.eps)
    x = x.contiguous()  # the kernel reads whole rows
    out = torch.empty_like(x)
    pointwise.norm_into(x.view(-1, x.shape[-1]), norm.weight, norm.bias, norm.eps, out.view(-1, x.shape[-1]))
    return out
