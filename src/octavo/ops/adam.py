"""One step of Adam over flat numbers whose two moments are held in 8 bits (arXiv 2110.02861).

The state is bitsandbytes': each moment as codes of the dynamic map in blocks of 256 and the absmax of each block, the
first moment signed, the second not. Two rules are octavo's own. A code is the nearest one: on a CPU bitsandbytes takes
any second moment under 1.5e-5 of its block's largest for the same number. And a second moment that is not zero never
becomes zero: the next step would divide by eps alone, which moves a number by thousands of learning rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.dynamic import ladder, nearest
from octavo.runtime.dispatch import kernel

BLOCK = 256
TINY = torch.finfo(torch.float32).tiny  # a block of zeros is divided by this and stays zero
_AT_ONCE = 1024 * BLOCK  # numbers that the definition works through at a time: what it makes stays in the CPU's cache


class Moments(NamedTuple):
    """Both moments of n numbers: codes (n,) uint8, and the absmax of each block, (ceil(n / 256),) float32."""

    first: Tensor
    second: Tensor
    first_absmax: Tensor
    second_absmax: Tensor


class Rates(NamedTuple):
    """What a step is taken with: AdamW's betas and eps, and what its learning rate and its number make of them."""

    beta_1: float
    beta_2: float
    eps: float
    keep: float  # 1 - learning rate * weight decay
    size: float  # learning rate / (1 - beta_1^step)
    root: float  # sqrt(1 - beta_2^step)


def no_moments(values: Tensor) -> Moments:
    """Those before the first step."""
    first, second = (torch.zeros(values.numel(), dtype=torch.uint8, device=values.device) for _ in range(2))
    absmax = torch.zeros(2, -(-values.numel() // BLOCK), device=values.device)
    return Moments(first, second, *absmax)


def adam_(values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rates: Rates) -> None:
    """One step in place on values, first and second moment, all (n,) float32."""
    first.mul_(rates.beta_1).add_(gradient, alpha=1 - rates.beta_1)
    second.mul_(rates.beta_2).addcmul_(gradient, gradient, value=1 - rates.beta_2)
    values.mul_(rates.keep).addcdiv_(first, (second.sqrt() / rates.root).add_(rates.eps), value=-rates.size)


@kernel
def adam8_(values: Tensor, gradient: Tensor, moments: Moments, factor: Tensor, rates: Rates) -> None:
    """The same with moments in 8 bits, and the gradient times `factor`, a scalar float32."""
    for start in range(0, values.numel(), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        blocks = slice(start // BLOCK, (start + _AT_ONCE) // BLOCK)
        first = _Moment(moments.first[part], moments.first_absmax[blocks], signed=True)
        second = _Moment(moments.second[part], moments.second_absmax[blocks], signed=False)
        numbers = first.decoded(), second.decoded()
        adam_(values[part], gradient[part] * factor, *numbers, rates)
        first.encode(numbers[0])
        second.encode(numbers[1])


@dataclass
class _Moment:
    """Some blocks of one moment."""

    codes: Tensor
    absmax: Tensor
    signed: bool

    def decoded(self) -> Tensor:
        values = ladder(self.codes.device, signed=self.signed).values[self.codes.int()]
        return values * self.absmax.repeat_interleave(BLOCK)[: len(self.codes)]

    def encode(self, moment: Tensor) -> None:
        """In place."""
        blocks = F.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)
        torch.amax(blocks.abs(), dim=1, out=self.absmax)
        shares = (blocks * (1 / self.absmax.clamp_min(TINY))[:, None]).view(-1)[: len(moment)]
        codes = nearest(shares, ladder(moment.device, signed=self.signed), signed=self.signed)
        if not self.signed:
            codes = torch.maximum(codes, (moment > 0).int())
        self.codes.copy_(codes)
