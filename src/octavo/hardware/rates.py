"""The rates that a training step reaches on a GPU, each with a range: computed from published figures, not measured.

octavo's steps were measured on an H100 and an H200. For another GPU a rate follows from figures that others published
of it (`Measured`), else from those of GPUs with its compute capability, else from the share of the peak that an H100
reached. The less of this there is, the wider the range. docs/design/gpu-times.md has the sources and the reasons.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.hardware.capabilities import AMPERE
from octavo.hardware.gpus import GPUS, Peak

# Shares of an H100's peak throughput that matmuls, attention and memory-bound operations reached: fitted to the seconds
# of 14 settings with int8 weights and 512 tokens or more, within 5 %. For nf4 the forecast is up to a third too short.
MATMUL_SHARE, ATTENTION_SHARE, MEMORY_SHARE = 0.70, 0.59, 0.44
# Share of the int8 peak: within 8 % for seven settings of 2,048 tokens (rows of 128 tokens: within a third).
MATMUL8_SHARE = 0.70
BUS_SHARE = 0.63  # of the peak of the bus between CPU and GPU: an H100 and an H200 measured 0.8

# What a step of an H100 reached, over what the published programs reached on it: 692 of 794.5 TFLOP/s in matmuls, 0.44
# of the bandwidth where they had 0.80. Published figures of other GPUs are multiplied by these.
STEP_MATMUL = MATMUL_SHARE * 989 / 794.5  # 0.87
STEP_MEMORY = MEMORY_SHARE / 0.80  # 0.55

# Attention of heads of 256 and 2,048 tokens on an H100, TFLOP/s of forward and backward, the middle of what was
# measured. The backward has 2.5 times the FLOP of the forward.
CUDNN, FLASH, EFFICIENT = (440, 236), (229, 153), (118, 25.5)


def _time(rates: tuple[float, float]) -> float:
    forward, backward = rates
    return 1 / forward + 2.5 / backward


# From 8.0 on PyTorch runs FlashAttention 2, which took 1.6 times as long as cuDNN on an H100. It has no instructions of
# Hopper, so its share of another GPU's peak may be as large as cuDNN's of an H100's.
FLASH_SHARE, FLASH_SPREAD = ATTENTION_SHARE * _time(CUDNN) / _time(FLASH), 1.6  # 0.37: 0.23 to 0.59
# Below 8.0 it runs the memory-efficient kernels: 8.3 times as long on an H100, a share of 0.07. That is the low end,
# since a GPU with slower matmuls waits less for the rest of the kernel; the high end is four times as much.
EFFICIENT_SHARE, EFFICIENT_SPREAD = 2 * ATTENTION_SHARE * _time(CUDNN) / _time(EFFICIENT), 2.0  # 0.14: 0.07 to 0.28

PUBLISHED, SIMILAR = 1.25, 1.5  # the least spread of a rate from figures of the GPU itself, and from those of others

# Measured seconds of a step over the forecast ones, benchmarks/plan.csv and plan_families.csv: low and high end. Of an
# H100's and an H200's 87 settings 80 are within the first. The high end is of narrow models, whose short kernels wait
# for their start; kernels of a slower GPU are longer, so others have the range of models with layers 4,096 wide.
STEPS_ERROR, WIDE_ERROR = (0.8, 1.5), (0.85, 1.2)

# Seconds by which a kernel of a captured step is longer than its work takes: it starts, and its last blocks run alone.
# Measured on an H200: steps of 13 models with layers narrower than 4,096 were 0.9 to 11.2 microseconds a kernel longer
# than forecast (benchmarks/plan_families.csv; Gemma 2, whose attention is slow, is left out).
LAUNCH_SECONDS = 1e-6, 12e-6


@dataclass(frozen=True)
class Rate:
    """Work a second: between per_second / spread and per_second * spread, at most `most`; most likely `per_second`."""

    per_second: float
    spread: float = 1.0
    most: float = math.inf

    def at(self, end: int) -> float:
        """The slow end (-1), the middle (0) or the fast end (1)."""
        return min(self.per_second * self.spread**end, self.most)


@dataclass(frozen=True)
class Rates:
    """The rates of a step by kind of work: FLOP/s of three kinds, bytes a second of two.

    `error` is measured over forecast time with exact rates: the low and the high end.
    """

    matmul: Rate  # of 16-bit matrices
    matmul8: Rate
    attention: Rate
    memory: Rate  # operations that are bound by memory
    bus: Rate  # copies between CPU and GPU
    error: tuple[float, float]


@functools.cache
def rates_of(gpu: Peak) -> Rates:
    """The rates of a training step on a GPU."""
    half, int8 = gpu.half_flops_per_second, gpu.int8_ops_per_second
    bus = Rate(BUS_SHARE * gpu.bus_bytes_per_second, PUBLISHED)
    if gpu.measured.steps:
        return Rates(
            Rate(MATMUL_SHARE * half), Rate(MATMUL8_SHARE * int8), Rate(ATTENTION_SHARE * half),
            Rate(MEMORY_SHARE * gpu.bytes_per_second), bus, STEPS_ERROR,
        )  # fmt: skip
    matmul = _rate(gpu, half, _matmul_shares, STEP_MATMUL, MATMUL_SHARE)
    # A GPU whose power limit holds 16-bit matmuls back (a T4's, 70 W) is taken to hold 8-bit ones back as much.
    share8 = min(MATMUL8_SHARE, matmul.per_second / half)
    return Rates(
        matmul,
        Rate(share8 * int8, max(SIMILAR, matmul.spread), int8),
        Rate(half * attention_share(gpu)[0], attention_share(gpu)[1]),
        _rate(gpu, gpu.bytes_per_second, _memory_shares, STEP_MEMORY, MEMORY_SHARE),
        bus,
        WIDE_ERROR,
    )


def attention_share(gpu: Peak) -> tuple[float, float]:
    """Share of the 16-bit peak that attention reaches on a GPU whose steps were not measured, and its spread."""
    if gpu.compute_capability >= AMPERE:
        return FLASH_SHARE, FLASH_SPREAD
    return EFFICIENT_SHARE, EFFICIENT_SPREAD


def basis(gpu: Peak, name: str) -> str:
    """What the times of a GPU rest on, for people."""
    narrow = (
        f"The range counts {1e6 * LAUNCH_SECONDS[0]:g} to {1e6 * LAUNCH_SECONDS[1]:g} microseconds for the start of "
        "each kernel, which is much of the time of a narrow model."
    )
    if gpu.measured.steps:
        low, high = STEPS_ERROR
        return (
            "The times are computed, not measured: the work of a step over the rates that octavo reached on an H100. "
            f"Of 87 settings that were measured on an H100 and an H200, 80 took {low:g} to {high:g} times the computed "
            f"time. {narrow}"
        )
    figures = gpu.measured.half_flops_per_second is not None, gpu.measured.memory_share is not None
    kinds = [kind for kind, known in zip(("16-bit matmuls", "memory"), figures, strict=True) if known]
    known = f"Others published rates of its {' and '.join(kinds)}" if kinds else "No published rates of it were found"
    eight = "8-bit matmuls and " if gpu.matmul_8bit else ""
    rest = "attention" if all(figures) else "all other work" if any(figures) else "all work"
    return (
        f"The times are computed, not measured: the work of a step over rates of the {name}. {known}; for "
        f"{eight * all(figures)}{rest} an estimate from other GPUs is used. octavo never ran on it. Steps "
        f"with nf4 weights, and with rows of less than 1,024 tokens, may take a third longer. {narrow}"
    )


def _rate(gpu: Peak, peak: float, shares_of: Callable[[Peak], Sequence[float]], step: float, h100_share: float) -> Rate:
    """A rate from the shares of `peak` that others reached on this GPU, else on those with its compute capability."""
    shares, least = shares_of(gpu), PUBLISHED
    if not shares:
        others = [row for row in GPUS.values() if row.compute_capability == gpu.compute_capability]
        shares, least = [share for row in others if not row.measured.steps for share in shares_of(row)], SIMILAR
    if not shares:
        return Rate(h100_share * peak, SIMILAR, peak)
    low, high = min(shares), max(shares)
    # Programs reached more than the data sheets' peak of some GPUs, whose clocks are higher.
    return Rate(step * math.sqrt(low * high) * peak, max(least, math.sqrt(high / low)), max(1, high) * peak)


def _matmul_shares(gpu: Peak) -> list[float]:
    published = gpu.measured.half_flops_per_second
    return [flops / gpu.half_flops_per_second for flops in published or ()]


def _memory_shares(gpu: Peak) -> list[float]:
    return [] if gpu.measured.memory_share is None else [gpu.measured.memory_share]
