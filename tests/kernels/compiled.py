"""Compiles every kernel for a GPU that is not there: `python -m tests.kernels.compiled 75`.

It calls each operation as dispatch calls it on that GPU, in the shapes of real_calls.py. Triton compiles what the call
would launch, and ptxas assembles it. Prints one JSON object for each kernel of a call, every variant of it: operation
and call, file and function of the kernel, its constants, registers and bytes of stack of a thread (spilled registers),
bytes of shared memory, the instruction of a dot ("fma": none of tensor cores), and how many instructions compute in
float16. Where a reference runs instead of a kernel, the object names it. `--chosen` compiles nothing and prints what
would run, of all GPUs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from tests import devices
from tests.kernels.real_calls import CALLS, REFERENCES, Call, not_called
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo import kernels, ops
from octavo.hardware import Capabilities
from octavo.kernels import hopper
from octavo.ops import linear
from octavo.runtime.dispatch import KERNELS

for package in (ops, kernels, hopper):
    for module in iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)  # so that KERNELS is whole, and `pretended` finds all modules

GPUS = {
    60: devices.P100, 61: devices.GTX_1080_TI, 70: devices.V100, 75: devices.T4, 80: devices.A100,
    86: devices.RTX_3060, 89: devices.RTX_4090, 90: devices.H200, 100: devices.B200, 120: devices.RTX_5090,
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DOT = re.compile(r"\b(mma\.sync|wgmma|tcgen05)\b(?=[.\w]*mma|\.aligned|\.sp)")
# Arithmetic in float16, which a GTX 10 computes at 1/64 of the rate of float32. Not conversions and tensor cores.
HALF = re.compile(r"\b(?:add|sub|mul|fma|max|min|neg|abs|setp?|ex2|tanh)(?:\.\w+)*\.f16(?:x2)?\b")


class Absent:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class ReferenceRunsError(Exception):
    """A call has reached the reference of its operation."""


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """The kernels of every call on the GPU of this compute capability."""
    driver.set_active(Absent(capability))
    launch, seen = JITFunction.run, dict[str, dict[str, Any]]()

    def resources(function: Any, arguments: Any, options: Any) -> dict[str, Any]:
        result = launch(function, *arguments, **(options | {"warmup": True}))
        if result.hash not in seen:
            seen[result.hash] = _resources(function, result)
        return seen[result.hash]

    for call in CALLS:
        yield from _rows(call, GPUS[capability], resources)


def chosen() -> Iterator[dict[str, Any]]:
    """The kernels of every call on every GPU; nothing is compiled."""
    for capability, device in GPUS.items():
        for call in CALLS:
            yield from _rows(call, device, lambda *_: {}, capability=capability)


def _rows(call: Call, device: Capabilities, resources: Any, **more: Any) -> Iterator[dict[str, Any]]:
    """One row for each kernel; on Hopper also of the kernels that run under an untested version of Triton (`gluon`)."""
    about = {"operation": call.operation, "call": call.text, **more}
    if reason := not_called(call.operation, call.text, device):
        yield about | {"kernel": "", "reference": reason}
        return
    dtype = torch.bfloat16 if "bfloat16" in device.dtypes else torch.float16
    file, _, name = call.operation.partition(".")
    arguments, named = call.make(dtype, device)
    for gluon in (True, False) if device.hopper_kernels and file in ("matmul8", "lora_backward") else (False,):
        launched = list[dict[str, Any]]()

        def run(function: Any, *given: Any, into: list[Any] = launched, **options: Any) -> None:
            kernel = f"{function.__module__.removeprefix('octavo.kernels.')}.{function.__name__}"
            into.append({"kernel": kernel} | resources(function, given, options))

        with pretended(device, run, gluon=gluon):
            try:
                result = getattr(import_module(f"octavo.ops.{file}"), name)(*arguments, **named)
            except ReferenceRunsError:
                yield about | {"kernel": "", "reference": REFERENCES[call.operation]}
                continue
        work = {"bytes": call.moved_bytes(arguments, named, result), "flops": call.flops}
        fallback = device.hopper_kernels and not gluon and file in ("matmul8", "lora_backward")
        for row in launched:
            yield about | row | work | ({"fallback": True} if fallback else {})


@contextmanager
def pretended(device: Capabilities, run: Any, *, gluon: bool) -> Iterator[None]:
    """Tensors of the CPU are on the device, for every choice of a kernel or a tile, but not of a library's function.

    `run` gets what a kernel is launched with, and a reference raises ReferenceRunsError. Matmuls of cuBLAS between
    kernels are not computed: the low-rank GEMMs after an activation's own kernel, and 8-bit matmuls on Turing.
    """
    replaced: dict[str, Any] = {"capabilities_of": lambda _: device, "hopper_kernels_run_on": lambda _: gluon}
    modules = [m for m in list(sys.modules.values()) if m.__name__.startswith("octavo.") and m is not linear]
    before = [(m, name, getattr(m, name)) for m in modules for name in replaced if hasattr(m, name)]
    lora = import_module("octavo.kernels.lora_backward")
    before += [(JITFunction, "run", JITFunction.run), (lora, "lora_grads", lora.lora_grads)]
    before += [(torch, name, getattr(torch, name)) for name in ("mm", "addmm", "_int_mm")]
    replaced |= {"run": run_of(run), "lora_grads": lambda *_: None, "_int_mm": _int32_sums}
    replaced |= dict.fromkeys(("mm", "addmm"), lambda *_, out: out)
    codes = [(reference, reference.__code__) for reference in KERNELS.values()]
    try:
        for module, name, _ in before:
            setattr(module, name, replaced[name])
        for reference, _ in codes:
            reference.__code__ = _reference.__code__
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for reference, code in codes:
            reference.__code__ = code


def run_of(run: Any) -> Any:
    """`run` as a method of a kernel."""
    return lambda kernel, *arguments, **options: run(kernel, *arguments, **options)


def _int32_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(len(a), b.shape[1], dtype=torch.int32)


def _reference(*_: Any, **__: Any) -> None:
    """Takes the place of the code of every reference, whose globals are others."""
    from tests.kernels.compiled import ReferenceRunsError

    raise ReferenceRunsError


def _resources(kernel: Any, result: Any) -> dict[str, Any]:
    ptx = result.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", listing)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    matrices = DOT.search(ptx)
    has_dot = "tt.dot" in result.asm.get("ttir", "") or "warp_group_dot" in result.asm["ttgir"]  # of Triton, of Gluon
    names = [parameter.name for parameter in kernel.params]
    constants = {
        names[at[0]]: value for at, value in result.src.constants.items() if len(at) == 1 and names[at[0]].isupper()
    }
    return {
        "constants": constants, "registers": registers, "stack": stack, "shared": result.metadata.shared,
        "dot": matrices[1] if matrices else "fma" if has_dot else "", "half": len(HALF.findall(ptx)),
    }  # fmt: skip


if __name__ == "__main__":
    # The module of this name, not __main__: references raise its error.
    this = import_module("tests.kernels.compiled")
    for row in this.chosen() if sys.argv[1] == "--chosen" else this.compiled(int(sys.argv[1])):
        sys.stdout.write(json.dumps(row, default=str) + "\n")
        sys.stdout.flush()
