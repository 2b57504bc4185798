"""One step of Adam over flat parameters with both moments in 8 bits (arXiv 2110.02861).

The state has the format of bitsandbytes: each moment is quantized with the dynamic data type in blocks of 256, with the
absmax of each block; the first moment is signed, the second is not. Two rules differ from bitsandbytes. A quantized
value is the nearest one: on a CPU bitsandbytes gives all second moments below 1.5e-5 of the absmax one value. And a
second moment above zero is never quantized to zero: the next step would divide by eps alone, and would move a parameter
by thousands of learning rates.

Legend: n parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.dynamic import levels, nearest
from octavo.runtime.dispatch import kernel

BLOCK = 256
TINY = torch.finfo(torch.float32).tiny  # a block of zeros is divided by this and stays zero
_CHUNK = 1024 * BLOCK  # elements of the reference at a time, so that temporaries stay in the CPU's cache


class Moments(NamedTuple):
    """Both moments, quantized, and the absmax of each block."""

    first: Tensor  # (n,) uint8
    second: Tensor  # (n,) uint8
    first_absmax: Tensor  # (ceil(n / 256),) float32
    second_absmax: Tensor  # (ceil(n / 256),) float32


class Rates(NamedTuple):
    """The hyperparameters of one step of AdamW, with the bias corrections of its number."""

    beta_1: float
    beta_2: float
    eps: float
    keep: float  # 1 - learning rate * weight decay
    size: float  # learning rate / (1 - beta_1^step)
    root: float  # sqrt(1 - beta_2^step)


def no_moments(values: Tensor) -> Moments:
    """The moments before the first step: zeros."""
    first, second = (
        torch.zeros(values.numel(), dtype=torch.uint8, device=values.device) for _ in range(2)
    )  # (n,) each
    absmax = torch.zeros(2, -(-values.numel() // BLOCK), device=values.device)  # (2, ceil(n / 256))
    return Moments(first, second, *absmax)


def adam_(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Rates) -> None:
    """One step of AdamW in place on values, first and second moment, all (n,) float32."""
    first.mul_(rates.beta_1).add_(gradient, alpha=1 - rates.beta_1)
    second.mul_(rates.beta_2).addcmul_(gradient, gradient, value=1 - rates.beta_2)
    values.mul_(rates.keep).addcdiv_(first, (second.sqrt() / rates.root).add_(rates.eps), value=-rates.size)


@kernel
def adam8_(values: Tensor, gradient: Tensor, moments: Moments, factor: Tensor, rates: Rates) -> None:
    """`adam_` with moments in 8 bits, in place; the gradient (n,) is multiplied by `factor`, a scalar float32."""
    for start in range(0, values.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        blocks = slice(start // BLOCK, (start + _CHUNK) // BLOCK)
        first = _Moment(moments.first[part], moments.first_absmax[blocks], signed=True)
        second = _Moment(moments.second[part], moments.second_absmax[blocks], signed=False)
        moment_values = first.dequantized(), second.dequantized()
        adam_(values[part], gradient[part] * factor, *moment_values, rates)
        first.quantize_(moment_values[0])
        second.quantize_(moment_values[1])


@dataclass
class _Moment:
    """Some blocks of one moment, n elements."""

    quantized: Tensor  # (n,) uint8
    absmax: Tensor  # (ceil(n / 256),)
    signed: bool

    def dequantized(self) -> Tensor:
        values = levels(self.quantized.device, signed=self.signed).values[self.quantized.int()]  # (n,)
        return values * self.absmax.repeat_interleave(BLOCK)[: len(self.quantized)]

    def quantize_(self, moment: Tensor) -> None:
        """Writes a moment (n,) float32."""
        blocks = F.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)  # (ceil(n / 256), 256)
        torch.amax(blocks.abs(), dim=1, out=self.absmax)
        scaled = (blocks * (1 / self.absmax.clamp_min(TINY))[:, None]).view(-1)[: len(moment)]  # (n,), -1 .. 1
        quantized = nearest(scaled, levels(moment.device, signed=self.signed), signed=self.signed)
        if not self.signed:
            quantized = torch.maximum(quantized, (moment > 0).int())
        self.quantized.copy_(quantized)
