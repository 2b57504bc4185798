"""Definition first, fast path second: an operation here may have a Triton twin in kernels/, of the same file and name.

`@twin` on a definition makes calls with tensors on a CUDA card go to the twin; on a CPU the definition runs. A
folder kernels/ that is deleted, a PyTorch without Triton, or `use_kernels(False)` leaves the definitions alone.
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

TWINS: dict[str, Callable[..., Any]] = {}  # "room.name" -> definition: every operation that has a twin
RESULTS: dict[str, Callable[[Tensor], Tensor]] = {}  # name -> what it returns, from its first argument; else nothing
OBSERVERS: list[Callable[[str, list[Tensor]], None]] = []  # told of what is rehearsed: name, what it reads and writes
GLUON = ("3.6", "3.7")  # versions of Triton whose Gluon is known
_chosen: bool | None = None  # as `use_kernels` said; None: wherever they run


def use_kernels(wanted: bool | None) -> None:
    """Switches the twins off or on for this process; None leaves it to what is installed."""
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
def gluon_untested() -> str:
    """Why kernels in Gluon, Triton's experimental language, are left out (kernels/hopper/); "" if they are not.

    Its names change between versions, so a version counts once its kernels were compiled and compared with it.
    """
    version = import_module("triton").__version__
    if version.startswith(tuple(f"{tested}." for tested in GLUON)):
        return ""
    return f"Triton {version}; it is tested with {' and '.join(GLUON)}"


@functools.cache
def gluon_runs_on(device: torch.device) -> bool:
    """Whether a card has kernels in Gluon: a Hopper, with a Triton that is tested."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER and not gluon_untested()


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether a call with this tensor goes to the twins."""
    return tensor.is_cuda and _chosen is not False and not kernels_missing()


def twin(definition: Operation) -> Operation:
    """Marks a definition that has a twin. Its first argument is the tensor that says where it runs.

    On the meta device, where tensors have shapes and no numbers, a call takes the memory that a twin takes: none, or
    that of its result. So a whole training step can be rehearsed there (train/rehearsal.py).
    """
    room, name = definition.__module__.rpartition(".")[2], definition.__name__
    TWINS[f"{room}.{name}"] = definition

    @functools.wraps(definition)
    def run(first: Tensor, *rest: Any, **named: Any) -> Any:
        if first.is_meta:
            for observe in OBSERVERS:
                observe(name, [first, *_tensors(rest)])
            return RESULTS[name](first) if name in RESULTS else None
        if kernels_run_on(first):
            return getattr(import_module(f"octavo.kernels.{room}"), name)(first, *rest, **named)
        return definition(first, *rest, **named)

    return cast(Operation, run)


def _tensors(given: tuple[Any, ...]) -> list[Tensor]:
    """Those that are given, by themselves or in a tuple."""
    each = [x for one in given for x in (one if isinstance(one, tuple) else (one,))]
    return [x for x in each if isinstance(x, Tensor)]
