"""The precision of training's matmuls: which frozen linears of the blocks are multiplied in 8 bits.

On one batch before training, every matmul runs both ways, forward and backward, and the exact result is used. A layer
whose relative error is over LIMIT stays exact. If the error halves when the channels of its input with the largest
values are kept exact, they are (LLM.int8(), arXiv 2208.07339). Everything else of a run is exact: the head, attention,
norms, LoRA, evaluation.

Legend: M rows (tokens), N outputs and K inputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.layers.context import ForwardOptions
from octavo.layers.dropout import Dropout
from octavo.layers.frozen import FrozenLinear
from octavo.layers.fused_linear import FusedLinear
from octavo.layers.linear8 import transposed_weight
from octavo.models import Decoder
from octavo.objective import Objective, inputs_of
from octavo.ops.linear_spec import Matmul8, QuantErrorProbe, split_outliers
from octavo.ops.matmul8 import fits

# With all layers of SmolLM2 in 8 bits (errors of outputs up to 12 %, of gradients up to 5 %) the loss came within 0.3 %
# of exact training (docs/log.md). The limit is lower, since that is one model.
LIMIT = 0.06
TOKENS = 512  # of the batch on which errors are measured
TIMED_TOKENS = 4096  # at which the time per token of a matmul no longer falls


@dataclass(frozen=True)
class Precision:
    """The layers that training multiplies in 8 bits, by name ("3.qkv"), each with the outlier channels of its input.

    All other matmuls are exact: in the compute dtype. With `forward_only` those of backward are too. The planner and
    the run use the same value.
    """

    outliers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    forward_only: bool = False

    def __contains__(self, name: str) -> bool:
        return name in self.outliers

    def to_json(self) -> dict[str, list[int]]:
        """For checkpoints, without `forward_only`."""
        return {name: list(channels) for name, channels in self.outliers.items()}

    @classmethod
    def from_json(cls, content: Mapping[str, list[int]], *, forward_only: bool = False) -> Precision:
        """The inverse of `to_json`."""
        return cls({name: tuple(channels) for name, channels in content.items()}, forward_only)


@dataclass(frozen=True)
class QuantError:
    """Relative errors of a layer in 8 bits: of its output, and of the gradient to its input (None: not needed).

    `outliers` is the error of the output with the input's outlier `channels` kept exact. See QuantErrorProbe.
    """

    forward: float
    backward: float | None
    outliers: float = math.inf
    channels: tuple[int, ...] = ()

    @property
    def acceptable(self) -> bool:
        """Whether the layer may be in 8 bits. A NaN is not acceptable."""
        forward = self.outliers if self.splits_outliers else self.forward
        return forward <= LIMIT and (self.backward is None or self.backward <= LIMIT)

    @property
    def splits_outliers(self) -> bool:
        """Whether outlier channels are kept exact: 4.5 % of a step in all layers, so only if the error halves."""
        return self.outliers < self.forward / 2


def layers(decoder: Decoder) -> Iterator[tuple[str, FrozenLinear]]:
    """(name, layer) of the linears of the blocks whose shapes 8-bit matmuls support."""
    for layer in decoder.blocks.modules():
        if isinstance(layer, FrozenLinear) and fits(*layer.matrix.shape):
            yield layer.path, layer


def all_8bit(decoder: Decoder, *, forward_only: bool = False) -> Precision:
    """Every supported layer in 8 bits, without outlier channels."""
    return Precision({name: () for name, _ in layers(decoder)}, forward_only)


def chosen_precision(
    errors: Mapping[str, QuantError], *, forced: bool = False, forward_only: bool = False
) -> Precision:
    """The precision by measured errors: exact over LIMIT, unless `forced`; with outlier channels if that pays."""
    return Precision(
        {
            name: error.channels if error.splits_outliers else ()
            for name, error in errors.items()
            if forced or error.acceptable
        },
        forward_only,
    )


def matmul8_of(decoder: Decoder, precision: Precision, *, transposed: int = 0) -> dict[str, Matmul8]:
    """The 8-bit matmuls of a decoder by layer name, with their tensors on its device, for `ForwardOptions`.

    The weights of the last `transposed` blocks are stored transposed too, for backward: one byte more per weight, and
    no transpose in each step.
    """
    made: dict[str, Matmul8] = {}
    for name, layer in layers(decoder):
        if name not in precision:
            continue
        matrix, outliers = layer.matrix, None
        if channels := precision.outliers[name]:
            outliers = split_outliers(torch.tensor(channels, device=matrix.device), matrix.in_features)
        like = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
        stored = _is_in_last(transposed, name, decoder) and not precision.forward_only
        weight = transposed_weight(matrix.int8_weight, like) if stored else None
        made[name] = Matmul8(outliers, weight, forward_only=precision.forward_only)
    return made


def transposed_bytes(decoder: Decoder, precision: Precision, blocks: int) -> int:
    """Bytes of the transposed weights of the linears in 8 bits of the last `blocks` blocks."""
    if precision.forward_only:
        return 0
    return sum(
        prod(layer.matrix.shape)
        for name, layer in layers(decoder)
        if name in precision and _is_in_last(blocks, name, decoder)
    )


def _is_in_last(blocks: int, name: str, decoder: Decoder) -> bool:
    """Whether a linear ("3.qkv") is in one of the last `blocks` blocks."""
    return int(name.partition(".")[0]) >= len(decoder.blocks) - blocks


@torch.no_grad()
def speedup(decoder: Decoder, tokens: int, *, forward_only: bool = False) -> float:
    """Time of the exact over time of the 8-bit matmul, forward and backward, of the largest layer, on a GPU."""
    layer = max((layer for _, layer in layers(decoder)), key=lambda layer: prod(layer.matrix.shape), default=None)
    if layer is None:
        return 1.0
    shape = min(tokens, TIMED_TOKENS), layer.matrix.in_features
    x = torch.randn(shape, dtype=layer.matrix.dtype, device=layer.matrix.device)  # (M, K)
    try:
        specs = (None, Matmul8(forward_only=forward_only))
        exact, fast = (_seconds(FusedLinear((layer.spec(matmul8),)), x) for matmul8 in specs)
    finally:
        torch.cuda.empty_cache()
    return exact / fast


def _seconds(linear: FusedLinear, x: Tensor) -> float:
    """The shortest of three times of a matmul of x (M, K) with its backward."""
    seeds = linear.dropout_seeds(Dropout())
    gemm_input = linear.gemm_input(len(x), x)
    gemm_input.put(x)
    linear.complete_(gemm_input, seeds)
    shortest = math.inf
    for _ in range(4):  # the first compiles kernels, and libraries choose theirs
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        linear.backward(linear.matmul(gemm_input), gemm_input, seeds, wants_dx=True)
        end.record()
        end.synchronize()
        shortest = min(shortest, begin.elapsed_time(end) / 1e3)
    return shortest


def measure_8bit_error(
    decoder: Decoder, batch: Batch, objective: Objective, *, forward_only: bool = False
) -> dict[str, QuantError]:
    """The errors of every layer in 8 bits on the first row of a batch. Adds to the gradients of the parameters."""
    row = replace(
        batch, ids=batch.ids[:1, :TOKENS], labels=batch.labels[:1, :TOKENS], positions=batch.positions[:1, :TOKENS],
        piece=batch.piece[:1, :TOKENS], weights=None if batch.weights is None else batch.weights[:1, :TOKENS],
    )  # fmt: skip
    probes = {name: QuantErrorProbe() for name, _ in layers(decoder)}
    options = ForwardOptions(
        matmul8={name: Matmul8(probe=probe, forward_only=forward_only) for name, probe in probes.items()},
        dropout=Dropout(torch.Generator()),
    )
    loss = objective(decoder, inputs_of(row, decoder.embed.matrix.device), options)
    if loss.requires_grad:
        loss.backward()
    return {
        name: QuantError(
            float(probe.forward), None if probe.backward is None else float(probe.backward), float(probe.outliers),
            tuple(probe.channels.tolist()),
        )
        for name, probe in probes.items()
        if probe.forward is not None and probe.outliers is not None and probe.channels is not None
    }  # fmt: skip
