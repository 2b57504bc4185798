"""The time of an operation on a GPU, measured with CUDA events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARMUP = 3


def milliseconds(run: Callable[[], object], repetitions: int = 20) -> float:
    """Median GPU time of `run`."""
    for _ in range(WARMUP):
        run()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))
