"""The kernels, the attention backend and the precision of matmuls of a run, each with its reason."""

from __future__ import annotations

from octavo.config import MemoryOptions, size_in_bytes
from octavo.errors import UsageError
from octavo.hardware import Hardware, Peak, limit_memory_, peak
from octavo.hardware.capabilities import NVIDIA
from octavo.reporting import Report
from octavo.runtime.dispatch import (
    Backends,
    hopper_kernels_disabled_reason,
    kernels_disabled_reason,
    set_backends,
)

_NEEDED = "an NVIDIA GPU of compute capability 7.5 with tensor cores"
_NEED_AMPERE = "FlashAttention and cuDNN need compute capability 8.0"


def configure_backends(options: MemoryOptions, hardware: Hardware, report: Report) -> None:
    """Sets the kernels and the attention backend of this process, and reports the choices and their reasons.

    UsageError for an attention backend that the GPU has no kernels of.
    """
    check_gpu(options, hardware)
    if options.attention == "math" and hardware.capabilities.is_gpu:
        report.warn(MATH_MEMORY)
    attention = _attention(options, hardware)
    set_backends(Backends(options.kernels, options.attention))
    if not hardware.capabilities.is_gpu:
        return
    disabled = kernels_disabled_reason(hardware.capabilities) if options.kernels else "--no-kernels"
    kernels = f"off ({disabled})" if disabled else _triton(hardware)
    steps = "CUDA graphs" if options.cuda_graphs else "eager (--no-cuda-graphs)"
    if not hardware.capabilities.cuda_graphs:
        steps = "eager (CUDA graphs are tested on NVIDIA GPUs only)"
    report.say(f"Kernels: {kernels}. Attention: {attention}. Steps: {steps}. Matmuls: {_matmuls(options, hardware)}.")
    limit = size_in_bytes(options.gpu_memory)
    if limit is not None:
        limit_memory_(hardware.device, limit)


MATH_MEMORY = (
    "--attention math stores the scores of all pairs of tokens for each head, and the memory plan does not count them: "
    "long rows take more than it says. --attention efficient stores none."
)


def check_gpu(options: MemoryOptions, hardware: Hardware, gpu: Peak | None = None, *, dtype: str = "auto") -> None:
    """UsageError for an attention backend or a --dtype that the GPU to plan for does not have."""
    if is_ampere(hardware, gpu):
        return
    name = hardware.name if gpu is None or _is_here(hardware, gpu) else f"The {gpu.name}"
    if options.attention in ("flash", "cudnn"):
        raise UsageError(
            f"{name} does not run --attention {options.attention}: {_NEED_AMPERE}.", hint="Use --attention auto."
        )
    if dtype == "bfloat16":
        raise UsageError(f"{name} has no bfloat16 instructions.", hint="Use --dtype float16 or float32.")


def _attention(options: MemoryOptions, hardware: Hardware) -> str:
    """The attention backend, and the reason if the GPU has none of the fastest."""
    if is_ampere(hardware) or options.attention != "auto":
        return options.attention
    return f"memory-efficient ({_NEED_AMPERE})"


def _triton(hardware: Hardware) -> str:
    """ "Triton", with the reason if some kernels are disabled."""
    device = hardware.capabilities
    if not device.triton_dots:
        return "Triton (prompts by cuBLAS, without CUDA graphs: Triton's matmuls need compute capability 8.0)"
    reason = hopper_kernels_disabled_reason(device) if device.hopper_kernels else ""
    return f"Triton (without the Hopper kernels: {reason})" if reason else "Triton"


def _matmuls(options: MemoryOptions, hardware: Hardware) -> str:
    """The precision of matmuls with frozen weights, and the reason."""
    if wants_8bit(options, hardware):
        chosen = "8 bits (--matmul 8bit)" if options.matmul == "8bit" else "8 bits where faster and precise enough"
        exact = ", in backward exact (8 bits need compute capability 8.0)"
        return chosen if backward_8bit(hardware) else chosen + exact
    if options.matmul == "exact":
        return "exact (--matmul exact)"
    if hardware.capabilities.matmul_8bit:
        return "exact (8 bits need the kernels)"
    return f"exact (8 bits need {_NEEDED})"


def wants_8bit(options: MemoryOptions, hardware: Hardware, gpu: Peak | None = None) -> bool:
    """Whether to use 8-bit matmuls. UsageError if --matmul 8bit is given and the GPU does not support them.

    `gpu` is the GPU to plan for, which need not be that of this machine.
    """
    if options.matmul == "exact":
        return False
    device, is_here = hardware.capabilities, _is_here(hardware, gpu)
    supported = device.matmul_8bit if is_here else gpu is not None and gpu.matmul_8bit
    if options.matmul == "8bit":
        if not supported and (is_here or gpu is not None):
            name = f"The {gpu.name}" if gpu and not is_here else hardware.name
            raise UsageError(f"{name} has no 8-bit matmuls: they need {_NEEDED}.", hint="Use --matmul exact.")
        return True
    return supported and options.kernels and not (is_here and kernels_disabled_reason(device))


def backward_8bit(hardware: Hardware, gpu: Peak | None = None) -> bool:
    """Whether backward has 8-bit matmuls too, if forward has, on the GPU to plan for. On a CPU it has."""
    if gpu is not None and not _is_here(hardware, gpu):
        return gpu.backward_8bit
    return hardware.capabilities.backward_8bit or not hardware.capabilities.is_gpu


def is_ampere(hardware: Hardware, gpu: Peak | None = None) -> bool:
    """Whether the GPU to plan for has compute capability 8.0 or higher. One that is neither here nor named has."""
    if gpu is not None and not _is_here(hardware, gpu):
        return gpu.ampere
    return hardware.capabilities.flash_attention or hardware.capabilities.vendor != NVIDIA


def _is_here(hardware: Hardware, gpu: Peak | None) -> bool:
    """Whether the GPU to plan for is that of this machine."""
    return hardware.capabilities.is_gpu and (gpu is None or gpu == peak(hardware.name))
