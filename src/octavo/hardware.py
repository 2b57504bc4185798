"""Device and compute dtype with the reason for both, free and peak memory, and peak throughput by GPU.

Importing this file does not import torch; the functions that need torch import it.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.errors import UsageError
from octavo.system import available_ram_bytes, peak_ram_bytes

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

# Feature flags in /proc/cpuinfo for bfloat16 matrix instructions: two of x86, one of Arm.
X86_FLAGS = ("amx_bf16", "avx512_bf16")
BFLOAT16_FLAGS = (*X86_FLAGS, "bf16")

# CUDA compute capabilities: 8.0 is A100 (8.6 RTX 30), 8.9 is RTX 40 and L4; H100 and H200 are 9.0.
MATMUL_8BIT_FROM, FP8_FROM = (8, 0), (8, 9)
HOPPER = 9


@dataclass(frozen=True)
class Hardware:
    """Device and compute dtype, with the reason for the choice. `name` is the model of the GPU or CPU."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    name: str
    matmul_8bit: bool = False  # whether it is a GPU on which the kernels of 8-bit matmuls run
    hopper: bool = False  # H100, H200: the GPUs of the kernels in kernels/hopper/


@dataclass(frozen=True)
class Peak:
    """Peak throughput of a GPU without sparsity: an upper bound, for plans and to judge measurements."""

    half_flops_per_second: float
    int8_ops_per_second: float
    bytes_per_second: float
    matmul_8bit: bool = True  # whether the kernels of 8-bit matmuls run on it


def _peak(half_tflops: float, int8_tops: float, gigabytes: float, *, matmul_8bit: bool = True) -> Peak:
    return Peak(half_tflops * 1e12, int8_tops * 1e12, gigabytes * 1e9, matmul_8bit)


# Vendors' data sheets: dense float16/bfloat16 matmuls with float32 accumulation in TFLOP/s, dense int8 matmuls in
# TOP/s, memory bandwidth in GB/s. GeForce GPUs have half rate with float32 accumulation, so their int8 rate is four
# times the first value; elsewhere it is twice. A key matches a driver's GPU name that has all words of the key; the
# longest matching key is used.
GPUS: dict[str, Peak] = {
    "H200": _peak(989, 1979, 4800),
    "H100": _peak(989, 1979, 3350),
    "H100 PCIe": _peak(756, 1513, 2000),
    "A100 40GB": _peak(312, 624, 1555),
    "A100 80GB": _peak(312, 624, 2039),
    "A100 80GB PCIe": _peak(312, 624, 1935),
    "L4": _peak(121, 242, 300),
    "T4": _peak(65, 130, 320, matmul_8bit=False),
    "RTX A6000": _peak(154.8, 309.7, 768),
    "RTX 4090": _peak(165, 661, 1008),
    "RTX 4060": _peak(30.2, 121, 272),
    "RTX 3090": _peak(71, 284, 936),
    "RTX 3080": _peak(59.5, 238, 760),
    "RTX 3070": _peak(40.6, 163, 448),
    "RTX 3060": _peak(25.5, 102, 360),
    "RTX 2080 Ti": _peak(53.8, 215, 616, matmul_8bit=False),
}

# Words for a different GPU with the same number: an RTX 3080 Ti is not an RTX 3080.
_VARIANTS = frozenset({"ti", "super", "d", "laptop", "mobile", "max", "nvl", "mig"})


def peak(name: str) -> Peak | None:
    """The row of GPUS for a GPU name of the driver ("NVIDIA A100-SXM4-80GB"); None for an unknown GPU."""
    words = _words(name)
    matches = [key for key in GPUS if _words(key) <= words and not (words - _words(key)).intersection(_VARIANTS)]
    return GPUS[max(matches, key=lambda key: len(_words(key)))] if matches else None


def pick(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Chooses the device and the compute dtype.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; `dtype` is "auto" or one of DTYPES. Auto is the first GPU if there
    is one, and bfloat16 if the hardware has instructions for it, else float16 on a GPU and float32 on a CPU. Raises
    UsageError for a device or a dtype that is not available.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", hint=f"Choose auto, {', '.join(DTYPES)}.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"Unknown device {device!r}.", hint="Choose auto, cpu, cuda or cuda:N.")
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return _pick_cpu(dtype, explicit=device == "cpu")
    return _pick_cuda(device, dtype)


def _pick_cpu(dtype: str, *, explicit: bool) -> Hardware:
    import torch

    name, flags = read_cpu()
    flag = next((flag for flag in BFLOAT16_FLAGS if flag in flags), None)
    support = f"this CPU has bfloat16 instructions ({flag})" if flag else "this CPU has no bfloat16 instructions"
    if flag in X86_FLAGS and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # oneDNN would use the instructions. PyTorch's attention calls oneDNN in that case, and then fails for the lack
        # of its own vectorized code.
        flag, support = None, "ATEN_CPU_CAPABILITY disables this CPU's vector instructions in PyTorch"
    chosen = dtype if dtype != "auto" else "bfloat16" if flag else "float32"
    if dtype == "auto":
        why = support
    elif dtype == "bfloat16" and not flag:
        why = f"--dtype, although {support}: it saves memory but no time"
    else:
        why = "--dtype"
    where = "--device" if explicit else "PyTorch finds no GPU"
    reason = f"Running on the CPU ({name}; {where}) in {chosen} ({why})."
    return Hardware(torch.device("cpu"), getattr(torch, chosen), reason, name)


def _pick_cuda(device: str, dtype: str) -> Hardware:
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda
        fault = "PyTorch finds no GPU" if build else "this PyTorch is a CPU-only build"
        remedy = "Check that nvidia-smi lists a GPU" if build else "Install a CUDA build of PyTorch"
        raise UsageError(f"Device {device!r}: {fault}.", hint=f"{remedy}, or use --device cpu.")
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"Device {device!r}: PyTorch finds {torch.cuda.device_count()} GPUs, numbered from 0.",
            hint="Use --device auto.",
        )
    chosen_device = torch.device("cuda", index)
    torch.cuda.set_device(chosen_device)  # streams, graphs and kernels use the current device
    name = torch.cuda.get_device_name(chosen_device)
    # Without including_emulation=False a T4 returns True, and then is slow and has no Triton support.
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not supported:
        raise UsageError(f"{name} has no bfloat16 instructions.", hint="Use --dtype float16 or float32.")
    chosen = dtype if dtype != "auto" else "bfloat16" if supported else "float16"
    why = "--dtype" if dtype != "auto" else "supported by the GPU" if supported else "the GPU is too old for bfloat16"
    reason = f"Running on {name} ({chosen_device}) in {chosen} ({why})."
    capability = torch.cuda.get_device_capability(chosen_device)
    matmul_8bit, hopper = capability >= MATMUL_8BIT_FROM, capability[0] == HOPPER
    return Hardware(chosen_device, getattr(torch, chosen), reason, name, matmul_8bit, hopper)


def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """The model and the feature flags of the CPU. Without /proc/cpuinfo: the platform's name for it, no flags."""
    fallback = platform.processor() or platform.machine() or "unknown CPU"
    if not cpuinfo.is_file():
        return fallback, frozenset()
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    features = f"{fields.get('flags', '')} {fields.get('Features', '')}"
    return fields.get("model name") or fallback, frozenset(features.split())


def free_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Free bytes: of device memory, or of RAM within the limit of this process's cgroup."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_ram_bytes()


def free_ram_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free RAM in bytes with the page cache, which can be evicted. Without /proc: all RAM, on Windows the free RAM."""
    meminfo = proc / "meminfo"
    if not meminfo.is_file():
        return available_ram_bytes()
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_free_bytes(proc / "self" / "cgroup", cgroups)])


def _cgroup_free_bytes(membership: Path, cgroups: Path) -> list[int]:
    """Free bytes under the limit of each cgroup of this process, version 2 and 1; [] if none has a limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory) and cgroup-v1/memory.rst.
    """
    if not membership.is_file():
        return []
    free = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit_name, usage_name, reclaimable = names
        group = Path(path.lstrip("/"))
        for folder in [root / group, *(root / parent for parent in group.parents)]:
            limit, usage = folder / limit_name, folder / usage_name
            if not (limit.is_file() and usage.is_file()) or limit.read_text().strip() == "max":
                continue
            used = int(usage.read_text()) - _memory_stat_bytes(folder / "memory.stat", reclaimable)
            free.append(max(0, int(limit.read_text()) - used))
    return free


def _memory_stat_bytes(path: Path, key: str) -> int:
    match = re.search(rf"^{key} (\d+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(match[1]) if match else 0


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Peak bytes so far: reserved by PyTorch on a GPU, else the resident RAM of this process."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status")
    # VmHWM is reset by exec; ru_maxrss starts with the size of the parent process.
    match = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    if match:
        return int(match[1]) * 1024
    return peak_ram_bytes()


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
