"""Which products of a model are computed in 8 bits, and what that costs: tried on one batch before training.

A trial computes every product both ways, forward and backward, and goes on with the exact result. Where that halves the
error, the channels of a layer's input with the largest numbers are taken apart. A layer over the limit all the same
stays exact. What else a run does is exact: the head, attention, norms, low-rank pairs, evaluation. Whether 8 bits are
faster on a card is timed there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from octavo.data.loader import Batch
from octavo.layers.frozen import FrozenLinear
from octavo.layers.fused_linear import FusedLinear
from octavo.models import Decoder
from octavo.objective import inputs_of, loss_of
from octavo.ops.linear_spec import QuantErrorProbe, split_outliers
from octavo.ops.matmul8 import fits

# Of a product (Trial in ops/linear_spec.py). SmolLM2 came within 0.3 % of exact mode's loss with all of its layers in 8
# bits, outputs up to 12 % and gradients up to 5 % off (docs/log.md); the limit is under that, since it is one model.
LIMIT = 0.06
TOKENS = 512  # that a trial reads at most
TIMED_TOKENS = 4096  # that a product is timed with at most: by then it is as fast a token as with more


@dataclass(frozen=True)
class QuantError:
    """The error of a layer's output and of the gradient to its input, in 8 bits; None where that is not taken.

    `apart` is that of the output with the input's `channels` taken apart.
    """

    forward: float
    backward: float | None
    outliers: float = math.inf
    channels: tuple[int, ...] = ()

    @property
    def acceptable(self) -> bool:
        """Whether the layer may be in 8 bits. A gradient that is not taken costs nothing, one that is NaN is unfair."""
        forward = self.outliers if self.splits_outliers else self.forward
        return forward <= LIMIT and (self.backward is None or self.backward <= LIMIT)

    @property
    def splits_outliers(self) -> bool:
        """Whether channels are taken apart: in all layers that is 4.5 % of a step, so for half of the error only."""
        return self.outliers < self.forward / 2


def layers(model: Decoder) -> Iterator[tuple[str, FrozenLinear]]:
    """The products of the blocks that can be in 8 bits, by name."""
    blocks: nn.ModuleList = model.blocks
    for name, layer in blocks.named_modules():
        if isinstance(layer, FrozenLinear) and fits(*layer.matrix.shape):
            yield name, layer


def set_precision_(
    model: Decoder,
    *,
    exact: Collection[str] = (),
    outliers: Mapping[str, Sequence[int]] | None = None,
    wanted: bool = True,
) -> None:
    """Puts the products of the blocks into 8 bits, those named `exact` not, with these channels of inputs `apart`."""
    for name, layer in layers(model):
        layer.use_8bit = wanted and name not in exact
        layer.outliers = None
        if layer.use_8bit and (channels := (outliers or {}).get(name)):
            layer.outliers = split_outliers(
                torch.tensor(channels, device=layer.matrix.device), layer.matrix.in_features
            )


def keep_transposed_(model: Decoder, wanted: bool) -> None:
    """Keeps the weights of products in 8 bits transposed as well, or no longer does."""
    for _, layer in layers(model):
        layer.keep_transposed_(wanted and layer.use_8bit)


def transposed_bytes(model: Decoder) -> int:
    """What that takes."""
    return sum(prod(layer.matrix.shape) for _, layer in layers(model) if layer.use_8bit)


@torch.no_grad()
def speedup(model: Decoder, tokens: int) -> float:
    """How many times as fast in 8 bits the largest product of the blocks is, forward and backward. For a card."""
    found = max((layer for _, layer in layers(model)), key=lambda layer: prod(layer.matrix.shape), default=None)
    if found is None:
        return 1.0
    before, seconds = found.use_8bit, []
    shape = min(tokens, TIMED_TOKENS), found.matrix.in_features
    x = torch.randn(shape, dtype=found.matrix.dtype, device=found.matrix.device)
    try:
        for use_8bit in (False, True):
            found.use_8bit = use_8bit
            seconds.append(_seconds(FusedLinear((found.frozen(),)), x))
    finally:
        found.use_8bit = before
        torch.cuda.empty_cache()
    return seconds[0] / seconds[1]


def _seconds(wide: FusedLinear, x: Tensor) -> float:
    """The least time of three that a product of x (M, K) takes with its backward; none before has to be waited for."""
    dropout_seeds = wide.dropout_seeds()
    gemm_input = wide.gemm_input(len(x), x)
    gemm_input.put(x)
    wide.complete_(gemm_input, dropout_seeds)
    least = math.inf
    for _ in range(4):  # the first compiles kernels and makes libraries choose theirs
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        wide.backward(wide.product(gemm_input), gemm_input, dropout_seeds, grad_input=True)
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end) / 1e3)
    return least


def measure_8bit_error(model: Decoder, batch: Batch) -> dict[str, QuantError]:
    """What 8 bits cost each product on the first row of a batch. The gradients that this adds are the caller's."""
    own = replace(
        batch, ids=batch.ids[:1, :TOKENS], labels=batch.labels[:1, :TOKENS], positions=batch.positions[:1, :TOKENS],
        document=batch.document[:1, :TOKENS],
    )  # fmt: skip
    trials = {name: QuantErrorProbe() for name, _ in layers(model)}
    for name, layer in layers(model):
        layer.probe = trials[name]
    try:
        loss = loss_of(model, inputs_of(own, model.embed.matrix.device))
        if loss.requires_grad:
            loss.backward()
    finally:
        for _, layer in layers(model):
            layer.probe = None
    return {
        name: QuantError(
            float(tried.forward), None if tried.backward is None else float(tried.backward), float(tried.outliers),
            tuple(tried.channels.tolist()),
        )
        for name, tried in trials.items()
        if tried.forward is not None and tried.outliers is not None and tried.channels is not None
    }  # fmt: skip
