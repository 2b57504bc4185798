"""Compiles every kernel for a GPU that is not there: `python -m tests.kernels.compiled 75`.

It calls each operation as dispatch calls it on that GPU, on one case of the domain for each kind of kernel. Triton
compiles what the call would launch, and ptxas assembles it. Prints one JSON object for each kernel: the operation, the
function, registers and bytes of stack of a thread (spilled registers), bytes of shared memory, and "mma" or "fma" if it
has a dot.
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
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from tests import devices
from tests.kernels.cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.hardware import Capabilities
from octavo.ops import linear
from octavo.ops.matmul8 import FP8

GPUS = {
    60: devices.P100, 61: devices.GTX_1080_TI, 70: devices.V100, 75: devices.T4, 80: devices.A100,
    86: devices.RTX_3060, 89: devices.RTX_4090, 90: devices.H200, 100: devices.B200, 120: devices.RTX_5090,
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DOT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


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


def compiled(capability: int) -> Iterator[dict[str, Any]]:
    """The kernels of every operation on the GPU of this compute capability."""
    device, made = GPUS[capability], list[Any]()
    driver.set_active(Absent(capability))
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made.append((self, launch(self, *arguments, grid=grid, warmup=True, **options)))
        return made[-1][1]

    JITFunction.run = compile_only
    dtype = torch.bfloat16 if "bfloat16" in device.dtypes else torch.float16
    for name in CASES:
        file, _, function = name.partition(".")
        if file == "matmul8" and not device.matmul_8bit:
            continue  # no command asks for them there
        operation, seen = getattr(import_module(f"octavo.ops.{file}"), function), set[str]()
        for make in CASES[name]:
            arguments, named, _ = make(dtype)  # by the references, on the CPU
            if not device.fp8 and any(getattr(x, "dtype", None) == FP8 for x in arguments):
                continue  # gradients are int8 there
            with pretended(device):
                operation(*arguments, **named)
            for kernel, result in made:
                if kernel.__name__ not in seen:  # constants of other cases make more variants of it
                    seen.add(kernel.__name__)
                    yield {"operation": name, "kernel": kernel.__name__, **_resources(kernel, result)}
            made.clear()


@contextmanager
def pretended(device: Capabilities) -> Iterator[None]:
    """Tensors of the CPU are on the device, for every choice of a kernel or a tile, but not of a library's function.

    Gluon's kernels for Hopper have tests of their own (tests/kernels/hopper/).
    """
    replaced = {"capabilities_of": lambda _: device, "hopper_kernels_run_on": lambda _: False}
    modules = [m for m in list(sys.modules.values()) if m.__name__.startswith("octavo.") and m is not linear]
    before = [(m, name, getattr(m, name)) for m in modules for name in replaced if hasattr(m, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, replaced[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _resources(kernel: Any, result: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        listing = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", listing)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    has_dot = "tl.dot(" in kernel.src or "tt.dot" in result.asm["ttir"]
    dot = ("mma" if DOT.search(result.asm["ptx"]) else "fma") if has_dot else ""
    return {"registers": registers, "stack": stack, "shared": result.metadata.shared, "dot": dot}


if __name__ == "__main__":
    for row in compiled(int(sys.argv[1])):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
