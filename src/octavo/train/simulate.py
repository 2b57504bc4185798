"""A training step rehearsed on the meta device: what memory it will take and what work it is, before weights are read.

The real model, adapter, loss and backward run, on tensors that have shapes and no numbers. Every tensor that is made
and freed goes through a model of PyTorch's allocator, so the forecast is of the memory that the card will be asked
for, and it follows the code: there is no second description of a step that could be wrong.

Source of the allocator's rules: PyTorch 2.11, c10/cuda/CUDACachingAllocator.cpp, with expandable segments.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.hardware import Peak
from octavo.runtime.dispatch import OP_OBSERVERS
from octavo.runtime.offload import pinned_bytes

# Shares of an H100's peaks that its products, attention and passes over memory reached: fitted to the seconds of 14
# settings with int8 weights and 512 tokens or more, which they give within 5 %. NF4's are up to a third too low.
PRODUCT_SHARE, ATTENTION_SHARE, MEMORY_SHARE = 0.70, 0.59, 0.44
# Of the peak of int8: seven settings of 2,048 tokens are given within 8 % (rows of 128 tokens: a third).
EIGHT_SHARE = 0.70
BUS_BYTES_PER_SECOND = 2e10  # between host and card, one way at a time: PCIe 4 gives 25 GB/s, an H100's 5 gave 55
ROUND, SMALL = 512, 2**20  # bytes: sizes are rounded up to the one; up to the other they come from pages of their own
PAGES = {True: 2 * 2**20, False: 20 * 2**20}  # by which memory grows, of small blocks and of others


@dataclass(frozen=True)
class Forecast:
    """Of one micro-batch: peak bytes on top of what stood before, floating-point operations, bytes read and written."""

    peak_bytes: int
    product_flops: float
    attention_flops: float
    moved_bytes: float
    eight_flops: float = 0.0  # of products in 8 bits
    host_bytes: int = 0  # of the host's memory, for what waits there
    bus_bytes: float = 0.0  # copied there and back

    def seconds(self, card: Peak) -> float:
        """What a card of this peak takes, at the shares of its peaks that an H100 reached (docs/log.md).

        Copies to the host and back run beside that, unless they take longer.
        """
        return max(self._computing(card), self.bus_bytes / BUS_BYTES_PER_SECOND)

    def _computing(self, card: Peak) -> float:
        return (
            self.product_flops / (PRODUCT_SHARE * card.half_flops_per_second)
            + self.eight_flops / (EIGHT_SHARE * card.int8_ops_per_second)
            + self.attention_flops / (ATTENTION_SHARE * card.half_flops_per_second)
            + self.moved_bytes / (MEMORY_SHARE * card.bytes_per_second)
        )


def rehearse(step: Callable[[], Any]) -> Forecast:
    """Runs `step`, which works on meta tensors that exist already."""
    recorder = _Recorder()
    OP_OBSERVERS.append(recorder.observe)
    try:
        with recorder:
            step()
    finally:
        OP_OBSERVERS.remove(recorder.observe)
    peak = sum(arena.end for arena in recorder.arenas.values())
    return Forecast(
        peak, recorder.flops, recorder.attention_flops, recorder.moved, recorder.eight_flops,
        recorder.host_bytes, recorder.bus_bytes,
    )  # fmt: skip


@dataclass
class Arena:
    """Memory that grows at its end and gives the smallest free block that is large enough."""

    page: int
    end: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)  # (size, start), sorted
    taken: dict[int, int] = field(default_factory=dict)  # start -> size

    def take(self, size: int) -> int:
        """The start of a block of `size` bytes."""
        at = bisect_left(self.free, (size, 0))
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

    def give(self, start: int) -> None:
        """Takes a block back and joins it with free neighbours."""
        size = self.taken.pop(start)
        for other in [block for block in self.free if block[1] + block[0] == start or block[1] == start + size]:
            self.free.remove(other)
            start, size = min(start, other[1]), size + other[0]
        insort(self.free, (size, start))


class _Recorder(TorchDispatchMode):
    """Sees every operation: counts its work, and takes and gives back the memory of what it makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arenas = {small: Arena(page) for small, page in PAGES.items()}
        self.flops = 0.0
        self.attention_flops = 0.0
        self.eight_flops = 0.0
        self.moved = 0.0
        self.host_bytes = 0
        self.bus_bytes = 0.0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in args if isinstance(x, Tensor)]
        for tensor in (*given, *(kwargs or {}).values()):
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())  # stood before, unless it was made here and is known
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        made = [tensor for tensor in results if isinstance(tensor, Tensor) and tensor.is_meta and self._made(tensor)]
        name = function.__name__.partition(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            a, b = given[-2:]
            self.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        elif (made or name.endswith("_")) and not name.startswith(("empty", "new_")):  # views and room move nothing
            self._move([*given, *made])
        return result

    def observe(self, name: str, tensors: list[Tensor]) -> None:
        """Counts an operation that the mode does not see: a kernel's, or attention."""
        if name.startswith("attention"):
            rows, length, heads, size = tensors[0].shape
            forward = 2.0 * rows * heads * length**2 * size  # two products over half of the square
            self.attention_flops += forward * (2.5 if name.endswith("backward") else 1.0)
        if name in ("to_host", "from_host"):
            self.bus_bytes += tensors[0].nbytes
        if name == "to_host":
            self.host_bytes += pinned_bytes(tensors[0].nbytes)
        if name == "matmul_8bit_into":
            (m, k), n = tensors[0].shape, len(tensors[2])
            self.eight_flops += 2.0 * m * k * n
        else:
            self._move(tensors)

    def _move(self, tensors: list[Tensor]) -> None:
        self.moved += sum(float(prod(tensor.shape)) * tensor.itemsize for tensor in tensors)

    def _made(self, tensor: Tensor) -> bool:
        """Takes memory for a tensor's storage and gives it back with it; False if that is known already."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        self._known.add(storage)
        size = -(-max(1, storage.nbytes()) // ROUND) * ROUND
        arena = self.arenas[size <= SMALL]
        weakref.finalize(storage, arena.give, arena.take(size))
        return True
