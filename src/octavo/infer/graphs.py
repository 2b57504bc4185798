"""CUDA graphs of a few shapes: recorded when first needed, dropped when what they read is no longer there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch

from octavo.layers.multi_lora import ServedAdapters


class Recorded(Protocol):
    """Something that was recorded, with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph


R = TypeVar("R", bound=Recorded)
S = TypeVar("S", bound=Hashable)
Found = TypeVar("Found")


class Graphs(Generic[R]):
    """One for each shape. All share one pool of memory: no two may run at a time."""

    def __init__(self, routing: ServedAdapters, device: torch.device) -> None:
        self._routing, self._device = routing, device
        self._made: dict[Hashable, R] = {}
        self._changes = routing.changes

    @torch.no_grad()
    def of(self, shape: S, make: Callable[[S, Any], R]) -> R:
        """The graph of a shape, recorded by `make(shape, pool)` if that was not done yet.

        (`make` is not kept: it knows its owner, and a cycle would hold a cache's memory until it is collected.)
        """
        if self._changes != self._routing.changes:  # graphs hold the addresses of the adapters' tensors
            torch.cuda.synchronize(self._device)  # memory that a replay still works in must not be given back
            self._made, self._changes = {}, self._routing.changes
        if shape not in self._made:
            pool = next(iter(self._made.values())).graph.pool() if self._made else None
            self._made[shape] = make(shape, pool)
        return self._made[shape]


def record(run: Callable[[], Found], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, Found]:
    """(the graph of a call, what the call returns and each replay writes anew)."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # once for real: kernels are compiled, libraries take what they need
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        found = run()
    return graph, found
