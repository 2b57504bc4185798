"""Simulates a training step on the meta device: its peak memory and its work, before weights are read.

The real decoder, adapter, loss and backward run on tensors without data. Every tensor that is allocated and freed goes
through a model of PyTorch's CUDA allocator. So the forecast is of the memory that PyTorch will reserve, and it follows
the code: there is no second description of a step that could differ from it.

Source of the allocator's rules: PyTorch 2.11, c10/cuda/CUDACachingAllocator.cpp, with expandable segments.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.hardware import LAUNCH_SECONDS, Peak, Rates, rates_of
from octavo.runtime.dispatch import OP_OBSERVERS
from octavo.runtime.offload import pinned_bytes

ROUND, SMALL = 512, 2**20  # bytes: sizes are rounded up to ROUND; up to SMALL they are allocated from separate pages
PAGES = {True: 2 * 2**20, False: 20 * 2**20}  # bytes by which an arena grows: of small blocks, of others


@dataclass(frozen=True)
class Forecast:
    """Of one micro-batch: peak bytes beyond those allocated before it, FLOPs, bytes read and written, kernels."""

    peak_bytes: int
    matmul_flops: float
    attention_flops: float
    moved_bytes: float
    matmul8_flops: float = 0.0
    host_bytes: int = 0  # of pinned CPU memory, for offload
    bus_bytes: float = 0.0  # copied to CPU memory and back
    large_bytes: int = 0  # of peak_bytes, those of the arena of all blocks over SMALL
    launches: int = 0  # operations that start a kernel, each counted once

    def seconds(self, gpu: Peak) -> float:
        """The time on a GPU, the middle of its range. Offload copies overlap with computing."""
        return max(self._seconds(rates_of(gpu), 0), self.launches * LAUNCH_SECONDS[0])

    def seconds_range(self, gpu: Peak) -> tuple[float, float]:
        """The shortest and the longest time on a GPU: all rates at their fast or slow end, and the forecast's error.

        The shortest is no shorter than the matmuls and attention take at the GPU's peak, or at what programs reached,
        nor than the kernels take to start. In the longest all kernels wait for their start (`LAUNCH_SECONDS`).
        """
        rates = rates_of(gpu)
        low, high = rates.error
        half = max(gpu.half_flops_per_second, *(gpu.measured.half_flops_per_second or (0.0,)))
        least = (self.matmul_flops + self.attention_flops) / half + self.matmul8_flops / gpu.int8_ops_per_second
        first, last = (self.launches * each for each in LAUNCH_SECONDS)
        longest = self._seconds(rates, -1)
        return max(self._seconds(rates, 1) * low, least, first), max(longest * high, longest + last)

    def _seconds(self, rates: Rates, end: int) -> float:
        computing = (
            self.matmul_flops / rates.matmul.at(end)
            + self.matmul8_flops / rates.matmul8.at(end)
            + self.attention_flops / rates.attention.at(end)
            + self.moved_bytes / rates.memory.at(end)
        )
        return max(computing, self.bus_bytes / rates.bus.at(end))


def simulate(step: Callable[[], Any]) -> Forecast:
    """Runs `step` on meta tensors that exist already."""
    recorder = _Recorder()
    OP_OBSERVERS.append(recorder.observe)
    try:
        with recorder:
            step()
    finally:
        OP_OBSERVERS.remove(recorder.observe)
    peak = sum(arena.end for arena in recorder.arenas.values())
    return Forecast(
        peak, recorder.flops, recorder.attention_flops, recorder.moved, recorder.matmul8_flops,
        recorder.host_bytes, recorder.bus_bytes, recorder.arenas[False].end, recorder.launches,
    )  # fmt: skip


@dataclass
class Arena:
    """Memory that grows at its end; an allocation takes the smallest free block that is large enough.

    The free block at the end counts as the largest: it can grow (`get_free_block` of the allocator).
    """

    page: int
    end: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)  # (size, start), sorted
    taken: dict[int, int] = field(default_factory=dict)  # start -> size

    def allocate(self, size: int) -> int:
        """The start of a block of `size` bytes."""
        at = bisect_left(self.free, (size, 0))
        if at + 1 < len(self.free) and sum(self.free[at]) == self.end:
            at += 1
        if at == len(self.free):
            last = next((block for block in self.free if block[0] + block[1] == self.end), (0, self.end))
            if last[0]:
                self.free.remove(last)
            grown = -(-(size - last[0]) // self.page) * self.page
            block = (last[0] + grown, last[1])
            self.end += grown
        else:
            block = self.free.pop(at)
        if block[0] > size:
            insort(self.free, (block[0] - size, block[1] + size))
        self.taken[block[1]] = size
        return block[1]

    def free_block(self, start: int) -> None:
        """Frees a block and merges it with free neighbours."""
        size = self.taken.pop(start)
        for other in [block for block in self.free if block[1] + block[0] == start or block[1] == start + size]:
            self.free.remove(other)
            start, size = min(start, other[1]), size + other[0]
        insort(self.free, (size, start))


class _Recorder(TorchDispatchMode):
    """Counts the work of every operation, and allocates and frees the memory of its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arenas = {small: Arena(page) for small, page in PAGES.items()}
        self._thread = threading.get_ident()
        self.flops = 0.0
        self.attention_flops = 0.0
        self.matmul8_flops = 0.0
        self.moved = 0.0
        self.host_bytes = 0
        self.bus_bytes = 0.0
        self.launches = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in args if isinstance(x, Tensor)]
        for tensor in (*given, *(kwargs or {}).values()):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())  # allocated before, or in an earlier operation
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        made = [tensor for tensor in results if isinstance(tensor, Tensor) and tensor.is_meta and self._made(tensor)]
        name = function.__name__.partition(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = given[-2:]
            self.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
            self.launches += 1
        elif (made or name.endswith("_")) and not name.startswith(("empty", "new_")):  # these move no data
            self._move([*given, *made])
            self.launches += 1
        return result

    def observe(self, name: str, tensors: list[Tensor]) -> None:
        """Counts an operation that does not reach the dispatch mode: a kernel, or attention.

        Those of other threads, in which another run may train, are not counted: a dispatch mode has one thread too.
        """
        if threading.get_ident() != self._thread:
            return
        self.launches += 1
        if name.startswith("attention"):
            rows, length, heads, size = tensors[0].shape
            forward = 2.0 * rows * heads * length**2 * size  # two matmuls over half of the square
            self.attention_flops += forward * (2.5 if name.endswith("backward") else 1.0)
        if name in ("to_host", "from_host"):
            self.bus_bytes += tensors[0].nbytes
        if name == "to_host":
            self.host_bytes += pinned_bytes(tensors[0].nbytes)
        if name == "matmul_8bit_into":
            (m, k), n = tensors[0].shape, len(tensors[2])
            self.matmul8_flops += 2.0 * m * k * n
        else:
            self._move(tensors)

    def _move(self, tensors: list[Tensor]) -> None:
        self.moved += sum(float(prod(tensor.shape)) * tensor.itemsize for tensor in tensors)

    def _made(self, tensor: Tensor) -> bool:
        """Allocates memory for a tensor's storage, freed with it; False if the storage existed before."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known.add(storage)
        size = -(-max(1, storage.nbytes()) // ROUND) * ROUND
        arena = self.arenas[size <= SMALL]
        weakref.finalize(storage, arena.free_block, arena.allocate(size))
        return True
