"""Activation offload to CPU memory between forward and backward, and embeddings in CPU memory.

Forward stores tensors, backward loads them in reverse order. On a GPU the copies run on a stream of their own: while
the last two tensors are copied to CPU memory, forward continues; while backward uses one tensor, the next one is
prefetched. Nothing here makes the CPU wait, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UsageError
from octavo.runtime.dispatch import observe

IN_FLIGHT = 2  # copies to CPU memory that may be unfinished before forward waits for the oldest


@dataclass
class _Stored:
    """One tensor: its copy in CPU memory, the tensor while it is on the device, and the event of its last copy."""

    cpu: Tensor | None  # None on the meta device
    here: Tensor | None
    copied: torch.cuda.Event | None = None


@dataclass
class ActivationOffload:
    """The tensors that one pass has stored, on a stack."""

    _stack: list[_Stored] = field(default_factory=list)
    _shape: dict[str, Any] = field(default_factory=dict)

    def put(self, x: Tensor) -> None:
        """Copies x (M, d) to CPU memory; all tensors of a pass have one shape. x is released after IN_FLIGHT more."""
        self._shape = {"size": x.shape, "dtype": x.dtype, "device": x.device}
        stored = _Stored(_buffer(len(self._stack), x), x)
        self._copy(stored, to_cpu=True)
        self._stack.append(stored)
        if len(self._stack) > IN_FLIGHT:
            oldest = self._stack[-1 - IN_FLIGHT]
            _wait(oldest)  # the next tensor in its memory must not be written before it is copied
            oldest.here = None

    def take(self) -> Tensor:
        """The last stored tensor, on the device. The one before it is prefetched."""
        last = self._stack.pop()
        self._fetch(last)
        if self._stack:
            self._fetch(self._stack[-1])
        _wait(last)
        assert last.here is not None
        return last.here

    def _fetch(self, stored: _Stored) -> None:
        if stored.here is None:
            stored.here = torch.empty(**self._shape)
            self._copy(stored, to_cpu=False)

    def _copy(self, stored: _Stored, *, to_cpu: bool) -> None:
        assert stored.here is not None
        if stored.cpu is None:
            observe("to_host" if to_cpu else "from_host", [stored.here])
            return
        target, source = (stored.cpu, stored.here) if to_cpu else (stored.here, stored.cpu)
        if not stored.here.is_cuda:
            target.copy_(source)
            return
        copies, layers = _stream(stored.here.device), torch.cuda.current_stream(stored.here.device)
        copies.wait_stream(layers)  # for the source, or for the tensor that had this memory before
        with torch.cuda.stream(copies):
            target.copy_(source, non_blocking=True)
        stored.copied = copies.record_event()


def _wait(stored: _Stored) -> None:
    """Makes the stream of the layers wait for the last copy of a tensor."""
    if stored.copied is not None and stored.here is not None:
        torch.cuda.current_stream(stored.here.device).wait_event(stored.copied)


def join(device: torch.device) -> None:
    """Makes the current stream wait for all copies on the device.

    During the capture of a CUDA graph only captured copies are waited for. To wait for others is a CUDA error, which
    would hide the error that ended the capture.
    """
    if device.type == "cuda":
        copies, layers = _stream(device), torch.cuda.current_stream(device)
        if _is_capturing(copies) == _is_capturing(layers):
            layers.wait_stream(copies)


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# (index of a tensor in its pass, whether it is on a GPU) -> buffers of bytes. They are never freed, since captured CUDA
# graphs hold their addresses.
_PINNED: dict[tuple[int, bool], list[Tensor]] = {}


def _buffer(index: int, x: Tensor) -> Tensor | None:
    """CPU memory for tensor number `index` of a pass. Passes run one after another and share it."""
    if x.is_meta:
        return None
    buffers = _PINNED.setdefault((index, x.is_cuda), [])
    buffer = next((buffer for buffer in buffers if buffer.nbytes >= x.nbytes), None)
    if buffer is None:
        buffer = _allocate(torch.Size((x.nbytes,)), torch.uint8, pinned=x.is_cuda)
        buffers.append(buffer)
    return buffer[: x.nbytes].view(x.dtype).view(x.shape)


def _allocate(shape: torch.Size, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """CPU memory. UsageError if it cannot be pinned; PyTorch reports that as if the GPU were out of memory."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)
    except RuntimeError as error:
        size = f"{shape.numel() * dtype.itemsize / 2**20:,.0f} MiB"
        raise UsageError(f"No {size} of CPU memory can be pinned.", hint="Use --offload off.") from error


def pinned_bytes(size: int) -> int:
    """The memory of a pinned tensor of so many bytes: PyTorch rounds up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


_NAMES = {torch.int8: "|i1", torch.uint8: "|u1", torch.int16: "<i2", torch.float32: "<f4"}  # type strings of numpy


class _Pinned:
    """Pinned CPU memory with the interface by which PyTorch makes a CUDA tensor of it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # PyTorch holds this object as long as the CUDA tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": _NAMES[tensor.dtype], "data": (tensor.data_ptr(), False),
            "version": 3, "strides": None,
        }  # fmt: skip


def on_host(tensor: Tensor) -> Tensor:
    """A copy of a CUDA tensor in pinned CPU memory, as a CUDA tensor. Every read of it goes over the bus."""
    if not tensor.is_cuda:
        return tensor
    pinned = _allocate(tensor.shape, tensor.dtype, pinned=True).copy_(tensor)
    plain = pinned if tensor.dtype in _NAMES else pinned.view(torch.int16)
    mapped: Tensor = torch.as_tensor(_Pinned(plain), device=tensor.device)
    return mapped.view(tensor.dtype)


def on_device(tensor: Tensor) -> Tensor:
    """A tensor of `on_host`, copied back to device memory."""
    copied = tensor.clone()
    if tensor.is_cuda:
        # PyTorch would reuse the CPU memory at once: it does not track that the GPU still reads it.
        torch.cuda.synchronize(tensor.device)
    return copied
