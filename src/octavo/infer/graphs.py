"""CUDA graphs by shape: captured at first use, and dropped when tensors that they read were replaced.

A graph repeats the launches of its capture, with the same addresses: its inputs are copied to the same tensors before
each replay, and its results are overwritten by the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch

from octavo.layers.multi_lora import ServedAdapters
from octavo.runtime.capture import capturing


class Captured(Protocol):
    """A captured graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph


G = TypeVar("G", bound=Captured)
S = TypeVar("S", bound=Hashable)
T = TypeVar("T")


class Graphs(Generic[G]):
    """One graph for each shape. All share one memory pool: no two may run at the same time."""

    def __init__(self, adapters: ServedAdapters, device: torch.device) -> None:
        self._adapters, self._device = adapters, device
        self._graphs: dict[Hashable, G] = {}
        self._changes = adapters.changes

    @torch.no_grad()
    def get(self, shape: S, make: Callable[[S, Any], G]) -> G:
        """The graph of a shape. `make(shape, pool)` captures it if there is none.

        `make` is an argument and not an attribute: it refers to the owner of this object, and a reference cycle would
        delay the freeing of the cache.
        """
        if self._changes != self._adapters.changes:  # graphs hold the addresses of the adapters' tensors
            torch.cuda.synchronize(self._device)  # a replay in flight may still use the memory of the pool
            self._graphs, self._changes = {}, self._adapters.changes
        if shape not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[shape] = make(shape, pool)
        return self._graphs[shape]


def capture(run: Callable[[], T], device: torch.device, pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """(the graph of a call of `run`, the result of the call, whose tensors every replay overwrites)."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # An eager call first, on a side stream as PyTorch's documentation requires. It compiles kernels and lets libraries
    # allocate their workspaces: neither is allowed during capture.
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool, device):
        result = run()
    return graph, result
