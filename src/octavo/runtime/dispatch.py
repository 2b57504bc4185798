"""Dispatch of an operation to its reference in plain PyTorch or to its Triton kernel of the same file and name.

`@kernel` marks a reference in ops/ that has a kernel in kernels/. A call goes to the kernel if the device of its first
argument runs octavo's kernels, else to the reference. `kernels_disabled_reason` and `hopper_kernels_disabled_reason`
decide that, as functions of the device's `Capabilities`.

`set_backends` changes the one global setting: which of these code paths the process uses, from --no-kernels and
--attention. docs/design/kernels.md explains why it is not an argument of every function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, cast, overload

from torch import Tensor

from octavo.hardware.capabilities import AMD, CPU, TRITON_FROM, Capabilities, capabilities_of

Operation = TypeVar("Operation", bound=Callable[..., Any])

KERNELS: dict[str, Callable[..., Any]] = {}  # "file.name" -> reference, of every operation that has a kernel
# Called for each operation on the meta device with its name and the tensors that it reads or writes.
OP_OBSERVERS: list[Callable[[str, list[Tensor]], None]] = []
TESTED_TRITON = ("3.6", "3.7")  # versions of Triton with which the Hopper kernels were compiled and compared
ATTENTIONS = ("auto", "cudnn", "flash", "efficient", "math")


@dataclass(frozen=True)
class Backends:
    """Which code paths a process may use.

    `kernels`: octavo's Triton kernels, where the device runs them. `attention`: the implementation of attention on
    GPUs, one of ATTENTIONS; auto is the fastest one that supports the call.
    """

    kernels: bool = True
    attention: str = "auto"

    def __post_init__(self) -> None:
        assert self.attention in ATTENTIONS


_backends = Backends()
# A context variable: another thread may train on a GPU meanwhile, or simulate another one.
_ampere = ContextVar("_ampere", default=True)


def backends() -> Backends:
    """The setting of this process."""
    return _backends


def set_backends(wanted: Backends) -> None:
    """Changes the setting of this process."""
    global _backends
    _backends = wanted


@contextmanager
def simulated_gpu(*, ampere: bool) -> Iterator[None]:
    """Operations on the meta device allocate what they do on a GPU of compute capability 8.0 or higher, or below it.

    Below it there is no FlashAttention, and references run in place of kernels that are made of dots.
    """
    token = _ampere.set(ampere)
    try:
        yield
    finally:
        _ampere.reset(token)


def simulates_ampere() -> bool:
    return _ampere.get()


@functools.cache
def kernels_disabled_reason(capabilities: Capabilities) -> str:
    """Why the references run on a device; "" if octavo's Triton kernels do."""
    if not capabilities.triton:
        return _unsupported(capabilities)
    if find_spec("triton") is None:
        return "Triton is not installed"
    if find_spec("octavo.kernels") is None:
        return "the folder octavo/kernels was deleted"
    return ""


def _unsupported(capabilities: Capabilities) -> str:
    if capabilities.compute_capability is not None:
        major, minor = capabilities.compute_capability
        return f"compute capability {major}.{minor}; they need {TRITON_FROM[0]}.{TRITON_FROM[1]}"
    names = {AMD: "an AMD GPU", CPU: "a CPU"}
    return f"they are tested on NVIDIA GPUs only; this is {names.get(capabilities.vendor, 'another device')}"


@functools.cache
def hopper_kernels_disabled_reason(capabilities: Capabilities) -> str:
    """Why the kernels of kernels/hopper/ do not run on a device; "" if they do.

    They are written in Gluon, Triton's experimental language. Its names change between versions, so only versions with
    which the kernels were compiled and compared are used.
    """
    if not capabilities.hopper_kernels:
        return "not a Hopper GPU"
    if reason := kernels_disabled_reason(capabilities):
        return reason
    version = import_module("triton").__version__
    if version.startswith(tuple(f"{tested}." for tested in TESTED_TRITON)):
        return ""
    return f"Triton {version}; they are tested with {' and '.join(TESTED_TRITON)}"


def kernels_run_on(tensor: Tensor) -> bool:
    """Whether a call with this tensor goes to the kernels."""
    return _backends.kernels and not kernels_disabled_reason(capabilities_of(tensor.device))


def hopper_kernels_run_on(tensor: Tensor) -> bool:
    """Whether a call with this tensor goes to the kernels of kernels/hopper/, where one supports it."""
    return _backends.kernels and not hopper_kernels_disabled_reason(capabilities_of(tensor.device))


def observe(name: str, tensors: list[Tensor]) -> None:
    """Calls OP_OBSERVERS for an operation on the meta device."""
    for observer in OP_OBSERVERS:
        observer(name, tensors)


@overload
def kernel(reference: Operation) -> Operation: ...
@overload
def kernel(
    *, on_meta: Callable[[Tensor], Tensor] | Literal["kernel"] | None = None, dots: bool = False
) -> Callable[[Operation], Operation]: ...
def kernel(
    reference: Any = None,
    *,
    on_meta: Callable[[Tensor], Tensor] | Literal["kernel"] | None = None,
    dots: bool = False,
) -> Any:
    """Marks a reference that has a kernel. The device of its first argument decides which of the two runs.

    On the meta device, where tensors have shapes and no values, neither computes anything. A training step is simulated
    there to forecast its memory (train/simulate.py), so a call allocates what the kernel would allocate, and
    OP_OBSERVERS get its tensors. `on_meta` says what a call does there:

    - None: it allocates nothing and returns None, as an in-place operation.
    - a function: it returns this function of the first argument.
    - "kernel": it calls the kernel's Python function, which allocates its tensors, calls `observe` and launches nothing
      on the meta device. If the folder kernels/ was deleted, or the GPU of the simulation does not run the kernel, it
      calls the reference.

    With `dots` the kernel is made of Triton's dots: GPUs on which these do not run on tensor cores take the reference,
    whose matmuls are cuBLAS's.
    """
    if reference is None:
        return functools.partial(_dispatched, on_meta=on_meta, dots=dots)
    return _dispatched(reference, on_meta=None, dots=False)


def _dispatched(
    reference: Operation, *, on_meta: Callable[[Tensor], Tensor] | Literal["kernel"] | None, dots: bool
) -> Operation:
    file, name = reference.__module__.rpartition(".")[2], reference.__name__
    KERNELS[f"{file}.{name}"] = reference

    @functools.wraps(reference)
    def run(first: Tensor, *rest: Any, **named: Any) -> Any:
        if first.is_meta and on_meta != "kernel":
            observe(name, [first, *_tensors(rest)])
            return on_meta(first) if on_meta is not None else None
        runs = kernels_run_on(first) and (not dots or capabilities_of(first.device).triton_dots)
        has_kernel = not dots or simulates_ampere()
        if runs or (first.is_meta and has_kernel and find_spec("octavo.kernels") is not None):
            return getattr(import_module(f"octavo.kernels.{file}"), name)(first, *rest, **named)
        return reference(first, *rest, **named)

    return cast(Operation, run)


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among positional arguments, also those in tuples."""
    flat = [x for argument in arguments for x in (argument if isinstance(argument, tuple) else (argument,))]
    return [x for x in flat if isinstance(x, Tensor)]
