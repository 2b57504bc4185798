"""Capture of CUDA graphs.

A graph takes part in the state of random generators: of PyTorch's default one, which every capture registers, and of
those that dropout registers. The first registration of a generator allocates device memory. If that fails, PyTorch 2.11
has entered the graph on one side only, and ends the process when the graph is freed ("The graph should be registered to
the state"). So as much memory is allocated and freed just before: there a lack of memory is an ordinary
`OutOfMemoryError`, after which training goes on with less memory.

cuBLAS has a workspace for every stream of every thread, 32 MiB on Hopper, and autograd runs backward in a thread of its
own. The first matmul of each allocates it, for good. Within a step that is between two activations, and no later
tensor that is larger than the rest of the free block fits there. So they are allocated before a step, and before
a capture outside of the graph's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BLOCK = 2**20  # bytes: PyTorch allocates blocks of up to this size together, in segments of two
STATE_BYTES = 2 * 512  # of a generator: seed and offset, a smallest block each


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device, *, backward: bool = False
) -> Iterator[None]:
    """The work of the body becomes the graph; `backward`: a backward pass is part of it.

    OutOfMemoryError if there is no memory for the capture to begin.
    """
    context = torch.cuda.graph(graph, pool=pool)
    with torch.cuda.stream(context.capture_stream):
        if backward:
            allocate_workspaces(device)
        require_memory(device)
    with context:
        yield


def register(graph: torch.cuda.CUDAGraph, generators: list[torch.Generator], device: torch.device) -> None:
    """Registers generators with a graph before its capture. OutOfMemoryError if there is no memory for their states."""
    if generators:
        require_memory(device, STATE_BYTES * len(generators))
    for generator in generators:
        graph.register_generator_state(generator)


def allocate_workspaces(device: torch.device) -> None:
    """Allocates cuBLAS's workspaces of the current stream: of this thread, and of autograd's for the device."""
    if device.type != "cuda":
        return
    with torch.enable_grad():
        x = torch.zeros(16, 16, device=device, requires_grad=True)
        torch.mm(x, x).sum().backward()


def require_memory(device: torch.device, size: int = 2 * STATE_BYTES) -> None:
    """Allocates and frees `size` bytes for small tensors on the current stream. OutOfMemoryError if there are none."""
    blocks = -(-size // BLOCK) + 1  # one more: the tensors need not fit into the rest of a segment that is in use
    held = [torch.empty(BLOCK, dtype=torch.uint8, device=device) for _ in range(blocks)]
    del held
