"""The device and the compute dtype of a run, with the reason for both."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo.errors import UsageError
from octavo.failures import cut
from octavo.hardware import installation
from octavo.hardware.capabilities import BFLOAT16_FLAGS, CPU, Capabilities, actual_capabilities, capabilities_of
from octavo.hardware.installation import Problem

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
    UsageError for a device or a dtype that is not available, and for a GPU for which PyTorch has no code.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", hint=f"Choose auto, {', '.join(DTYPES)}.")
    if re.fullmatch(r"mps(:\d+)?", device):
        raise UsageError(
            f"Device {cut(device)!r}: octavo does not support Apple GPUs.", hint="Use --device cpu, which needs no GPU."
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise UsageError(f"Unknown device {cut(device)!r}.", hint="Choose auto, cpu, cuda or cuda:N.")
    if device == "cpu":
        return _cpu(dtype, where="--device")
    with warnings.catch_warnings():  # PyTorch's about the driver and the GPU: octavo's messages replace them
        warnings.simplefilter("ignore")
        return _pick(device, dtype)


def _pick(device: str, dtype: str) -> Hardware:
    """The hardware of the device "auto", "cuda" or "cuda:N"."""
    import torch

    if not torch.cuda.is_available():
        build, gpu = installation.installed_build(), installation.nvidia_gpu()
        problem = installation.unused_gpu(build, gpu, installation.visible_devices())
        if device != "auto":
            raise _no_gpu_error(device, problem, build)
        if problem is None:
            return _cpu(dtype, where=_no_gpu())
        found = _cpu(dtype, where="PyTorch cannot use the NVIDIA GPU")
        return replace(found, reason=f"{found.reason} {problem.fault}. {problem.remedy}.")
    chosen = _cuda_device(device)
    torch.cuda.set_device(chosen)  # streams, graphs and kernels use the current device
    _check_code(actual_capabilities(chosen))
    found = hardware_for(chosen, capabilities_of(chosen), dtype)
    return found if ":" in device else replace(found, reason=found.reason + _other_gpus(torch.cuda.device_count()))


def _cpu(dtype: str, *, where: str) -> Hardware:
    """The CPU. `where` is why a run is on it."""
    import torch

    device = torch.device("cpu")
    return hardware_for(device, capabilities_of(device), dtype, where=where)


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

    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"Device {device!r}: PyTorch finds {torch.cuda.device_count()} GPUs, numbered from 0.",
            hint="Use --device auto.",
        )
    return torch.device("cuda", index)


def _check_code(capabilities: Capabilities) -> None:
    """UsageError if the installed PyTorch has no code for an NVIDIA GPU: its first kernel would fail."""
    import torch

    if capabilities.compute_capability is None:
        return
    architectures = torch.cuda.get_arch_list()
    if not architectures or installation.has_code(architectures, capabilities.compute_capability):
        return
    gpu = installation.nvidia_gpu()
    problem = installation.missing_code(
        capabilities.name, capabilities.compute_capability,
        architectures=architectures, version=torch.__version__, driver=gpu.driver if gpu else "",
    )  # fmt: skip
    raise UsageError(f"{problem.fault}.", hint=f"{problem.remedy}, or use --device cpu.")


def _no_gpu_error(device: str, problem: Problem | None, build: installation.Build) -> UsageError:
    """Why "cuda" or "cuda:N" is not available."""
    import torch

    if problem is None:
        compiled = bool(build.cuda) or torch.backends.cuda.is_built()  # the second is also true of a ROCm build
        problem = (
            Problem("PyTorch finds no GPU", "Check that nvidia-smi lists a GPU")
            if compiled
            else Problem("this PyTorch is a CPU-only build", "Install a CUDA build of PyTorch")
        )
    return UsageError(f"Device {device!r}: {problem.fault}.", hint=f"{problem.remedy}, or use --device cpu.")


def _no_gpu() -> str:
    """Why auto is the CPU of a machine without an NVIDIA GPU."""
    import torch

    return "octavo does not support Apple GPUs" if torch.backends.mps.is_available() else "PyTorch finds no GPU"


def _other_gpus(count: int) -> str:
    """That octavo uses one of several GPUs; "" if there is one."""
    if count < 2:
        return ""
    which = "cuda:1 selects the other" if count == 2 else "cuda:N selects another"
    return f" {count} GPUs found; octavo uses one, cuda:0. --device {which}."
