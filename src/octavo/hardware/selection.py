"""The device and the compute dtype of a run, with the reason for both."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.errors import UsageError
from octavo.hardware.capabilities import BFLOAT16_FLAGS, CPU, Capabilities, capabilities_of

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Hardware:
    """Device and compute dtype, with the reason for the choice, and what the device can compute."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    capabilities: Capabilities

    @property
    def name(self) -> str:
        """The model of the GPU or CPU."""
        return self.capabilities.name


def pick(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Chooses the device and the compute dtype.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; `dtype` is "auto" or one of DTYPES. Auto is the first GPU if there
    is one, and bfloat16 if the hardware has instructions for it, else float16 on a GPU and float32 on a CPU. Raises
    UsageError for a device or a dtype that is not available.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", hint=f"Choose auto, {', '.join(DTYPES)}.")
    if re.fullmatch(r"mps(:\d+)?", device):
        raise UsageError(
            f"Device {device!r}: octavo does not support Apple GPUs.", hint="Use --device cpu, which needs no GPU."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"Unknown device {device!r}.", hint="Choose auto, cpu, cuda or cuda:N.")
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        chosen = torch.device("cpu")
        return hardware_for(chosen, capabilities_of(chosen), dtype, where="--device" if device == "cpu" else _no_gpu())
    chosen = _cuda_device(device)
    torch.cuda.set_device(chosen)  # streams, graphs and kernels use the current device
    return hardware_for(chosen, capabilities_of(chosen), dtype)


def hardware_for(device: torch.device, capabilities: Capabilities, dtype: str = "auto", *, where: str = "") -> Hardware:
    """The hardware of a device with these capabilities. `where` is why a run is on the CPU."""
    import torch

    choose = _cpu_dtype if capabilities.vendor == CPU else _gpu_dtype
    chosen, why = choose(capabilities, dtype)
    on = f"the CPU ({capabilities.name}; {where})" if where else f"{capabilities.name} ({device})"
    return Hardware(device, getattr(torch, chosen), f"Running on {on} in {chosen} ({why}).", capabilities)


def _cpu_dtype(capabilities: Capabilities, dtype: str) -> tuple[str, str]:
    """(the compute dtype, the reason for it)"""
    flag = next((flag for flag in BFLOAT16_FLAGS if flag in capabilities.instructions), None)
    native = "bfloat16" in capabilities.dtypes
    if flag is None:
        support = "this CPU has no bfloat16 instructions"
    elif native:
        support = f"this CPU has bfloat16 instructions ({flag})"
    else:
        support = "ATEN_CPU_CAPABILITY disables this CPU's vector instructions in PyTorch"
    if dtype == "auto":
        return ("bfloat16" if native else "float32"), support
    if dtype == "bfloat16" and not native:
        return dtype, f"--dtype, although {support}: it saves memory but no time"
    return dtype, "--dtype"


def _gpu_dtype(capabilities: Capabilities, dtype: str) -> tuple[str, str]:
    """(the compute dtype, the reason for it)"""
    native = "bfloat16" in capabilities.dtypes
    if dtype == "bfloat16" and not native:
        raise UsageError(f"{capabilities.name} has no bfloat16 instructions.", hint="Use --dtype float16 or float32.")
    if dtype != "auto":
        return dtype, "--dtype"
    return ("bfloat16", "supported by the GPU") if native else ("float16", "the GPU is too old for bfloat16")


def _cuda_device(device: str) -> torch.device:
    """The GPU of "auto", "cuda" or "cuda:N"; UsageError if PyTorch does not find it."""
    import torch

    if not torch.cuda.is_available():
        build = torch.backends.cuda.is_built()  # also of a ROCm build
        fault = "PyTorch finds no GPU" if build else "this PyTorch is a CPU-only build"
        remedy = "Check that nvidia-smi lists a GPU" if build else "Install a CUDA build of PyTorch"
        raise UsageError(f"Device {device!r}: {fault}.", hint=f"{remedy}, or use --device cpu.")
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"Device {device!r}: PyTorch finds {torch.cuda.device_count()} GPUs, numbered from 0.",
            hint="Use --device auto.",
        )
    return torch.device("cuda", index)


def _no_gpu() -> str:
    """Why auto is the CPU."""
    import torch

    return "octavo does not support Apple GPUs" if torch.backends.mps.is_available() else "PyTorch finds no GPU"
