"""What a card need not hold all the time, in the host's memory: inputs of layers between forward and backward, and
tables of which a step reads a few rows.

A pass puts tensors away while it goes forward and takes them back in reverse order. On a card the copies run beside
the layers, on a stream of their own: forward goes on while the last two are copied away, and backward finds the next
one fetched while it works on one. Nothing here makes the host wait, so all of it can be recorded in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from octavo.errors import UsageError
from octavo.runtime.dispatch import observe

LEAVING = 2  # tensors that may be under way to the host before forward waits for one of them


@dataclass
class _Put:
    """One tensor: its place on the host, itself while it is on the device, and when its last copy has been made."""

    host: Tensor | None  # None where there are shapes alone
    here: Tensor | None
    copied: torch.cuda.Event | None = None


@dataclass
class ActivationOffload:
    """The tensors that one pass has put away."""

    _stack: list[_Put] = field(default_factory=list)
    _shape: dict[str, Any] = field(default_factory=dict)

    def put(self, x: Tensor) -> None:
        """Copies x (M, d), the same for all, to the host. It is let go once two more have been put."""
        self._shape = {"size": x.shape, "dtype": x.dtype, "device": x.device}
        put = _Put(_room(len(self._stack), x), x)
        self._copy(put, away=True)
        self._stack.append(put)
        if len(self._stack) > LEAVING:
            left = self._stack[-1 - LEAVING]
            _wait(left)  # whoever is given its memory next must not write there before it is copied
            left.here = None

    def take(self) -> Tensor:
        """What was put last, on the device; the one put before it is fetched meanwhile."""
        last = self._stack.pop()
        self._fetch(last)
        if self._stack:
            self._fetch(self._stack[-1])
        _wait(last)
        assert last.here is not None
        return last.here

    def _fetch(self, put: _Put) -> None:
        if put.here is None:
            put.here = torch.empty(**self._shape)
            self._copy(put, away=False)

    def _copy(self, put: _Put, *, away: bool) -> None:
        assert put.here is not None
        if put.host is None:
            observe("to_host" if away else "from_host", [put.here])
            return
        target, source = (put.host, put.here) if away else (put.here, put.host)
        if not put.here.is_cuda:
            target.copy_(source)
            return
        beside, layers = _stream(put.here.device), torch.cuda.current_stream(put.here.device)
        beside.wait_stream(layers)  # for what is copied, or for whoever had this memory before
        with torch.cuda.stream(beside):
            target.copy_(source, non_blocking=True)
        put.copied = beside.record_event()


def _wait(put: _Put) -> None:
    """What the layers do from here on comes after the last copy."""
    if put.copied is not None and put.here is not None:
        torch.cuda.current_stream(put.here.device).wait_event(put.copied)


def join(device: torch.device) -> None:
    """What comes next on the device comes after all copies that are under way, wanted or not.

    A recording waits for copies of its own alone: waiting for others would be an error, in place of what went wrong.
    """
    if device.type == "cuda":
        beside, layers = _stream(device), torch.cuda.current_stream(device)
        if _recorded(beside) == _recorded(layers):
            layers.wait_stream(beside)


def _recorded(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# For the first, second, .. tensor of a pass, whether it comes from a card: rooms in bytes.
_PINNED: dict[tuple[int, bool], list[Tensor]] = {}


def _room(place: int, x: Tensor) -> Tensor | None:
    """Where the tensor of this place in a pass stands on the host. Passes come one after another and share it.

    It is kept for as long as the process runs: graphs were recorded with its address.
    """
    if x.is_meta:
        return None
    rooms = _PINNED.setdefault((place, x.is_cuda), [])
    room = next((room for room in rooms if room.nbytes >= x.nbytes), None)
    if room is None:
        room = _taken(torch.Size((x.nbytes,)), torch.uint8, pinned=x.is_cuda)
        rooms.append(room)
    return room[: x.nbytes].view(x.dtype).view(x.shape)


def _taken(shape: torch.Size, kind: torch.dtype, *, pinned: bool) -> Tensor:
    """Memory of the host. UsageError if it has none to pin, which is not the card's lack."""
    try:
        return torch.empty(shape, dtype=kind, pin_memory=pinned)
    except RuntimeError as error:
        size = f"{shape.numel() * kind.itemsize / 2**20:,.0f} MiB"
        raise UsageError(f"The host has no {size} of memory to pin.", hint="Take --offload off.") from error


def pinned_bytes(size: int) -> int:
    """What a tensor of so many bytes takes when it is pinned: PyTorch rounds up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


_NAMES = {torch.int8: "|i1", torch.uint8: "|u1", torch.int16: "<i2", torch.float32: "<f4"}  # as numpy has them


class _Pinned:
    """Pinned memory of the host as a card addresses it."""

    def __init__(self, tensor: Tensor) -> None:
        self._kept = tensor  # with this object, which PyTorch keeps as long as the tensor that it makes of it
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape), "typestr": _NAMES[tensor.dtype], "data": (tensor.data_ptr(), False),
            "version": 3, "strides": None,
        }  # fmt: skip


def on_host(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor of the card's that lies in the host's memory. What is read of it crosses the bus."""
    if not tensor.is_cuda:
        return tensor
    pinned = _taken(tensor.shape, tensor.dtype, pinned=True).copy_(tensor)
    plain = pinned if tensor.dtype in _NAMES else pinned.view(torch.int16)
    found: Tensor = torch.as_tensor(_Pinned(plain), device=tensor.device)
    return found.view(tensor.dtype)


def on_card(tensor: Tensor) -> Tensor:
    """What `on_host` made, in the card's own memory again."""
    copied = tensor.clone()
    if tensor.is_cuda:
        # PyTorch does not know that the card reads the host's memory, and hands it out again at once.
        torch.cuda.synchronize(tensor.device)
    return copied
