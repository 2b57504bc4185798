"""Dispatch of an operation to its reference in plain PyTorch or to its Triton kernel of the same file and name.

`@kernel` on a reference (in ops/) sends calls with tensors on a CUDA GPU to the kernel (in kernels/); on a CPU the
reference runs. It also runs everywhere if kernels/ is deleted, Triton is not installed, or after `use_kernels(False)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from octavo.hardware import HOPPER

Operation = TypeVar("Operation", bound=Callable[..., Any])

KERNELS: dict[str, Callable[..., Any]] = {}  # "room.name" -> definition: every operation that has a kernel
META_RESULTS: dict[
    str, Callable[[Tensor], Tensor]
] = {}  # name -> what it returns, from its first argument; else nothing
OP_OBSERVERS: list[
    Callable[[str, list[Tensor]], None]
] = []  # told of what is rehearsed: name, what it reads and writes
TESTED_TRITON = ("3.6", "3.7")  # versions of Triton whose Gluon is known
_chosen: bool | None = None  # as `use_kernels` said; None: wherever they run


def use_kernels(wanted: bool | None) -> None:
    """Switches the kernels off or on for this process; None leaves it to what is installed."""
    global _chosen
    _chosen = wanted


@functools.cache
def kernels_missing() -> str:
    """Why there are no Triton kernels here; "" if there are."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if find_spec("octavo.kernels") is None:
        return "octavo/kernels is not there"
    return ""


@functools.cache
def hopper_kernels_disabled_reason() -> str:
    """Why kernels in Gluon, Triton's experimental language, are left out (kernels/hopper/); "" if they are not.

    Its names change between versions, so a version counts once its kernels were compiled and compared with it.
    """
    version = import_module("triton").__version__
    if version.startswith(tuple(f"{tested}." for tested in TESTED_TRITON)):
        return ""
    return f"Triton {version}; it is tested with {' and '.join(TESTED_TRITON)}"


@functools.cache
def hopper_kernels_run_on(device: torch.device) -> bool:
    """Whether a card has kernels in Gluon: a Hopper, with a Triton that is tested."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == HOPPER
        and not hopper_kernels_disabled_reason()
    )


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether a call with this tensor goes to the kernels."""
    return tensor.is_cuda and _chosen is not False and not kernels_missing()


def kernel(definition: Operation) -> Operation:
    """Marks a definition that has a kernel. Its first argument is the tensor that says where it runs.

    On the meta device, where tensors have shapes and no numbers, a call takes the memory that a kernel takes: none, or
    that of its result. So a whole training step can be rehearsed there (train/simulate.py).
    """
    room, name = definition.__module__.rpartition(".")[2], definition.__name__
    KERNELS[f"{room}.{name}"] = definition

    @functools.wraps(definition)
    def run(first: Tensor, *rest: Any, **named: Any) -> Any:
        if first.is_meta:
            for observe in OP_OBSERVERS:
                observe(name, [first, *_tensors(rest)])
            return META_RESULTS[name](first) if name in META_RESULTS else None
        if kernels_run_on(first):
            return getattr(import_module(f"octavo.kernels.{room}"), name)(first, *rest, **named)
        return definition(first, *rest, **named)

    return cast(Operation, run)


def _tensors(given: tuple[Any, ...]) -> list[Tensor]:
    """Those that are given, by themselves or in a tuple."""
    each = [x for one in given for x in (one if isinstance(one, tuple) else (one,))]
    return [x for x in each if isinstance(x, Tensor)]
