"""What the work runs on: device, compute type and the reason for both; free memory; what a card does at best.

Importing this file loads no torch: every function that needs it imports it when called.
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

# Words of /proc/cpuinfo that stand for matrix instructions on bfloat16: two of x86, one of Arm.
X86_FLAGS = ("amx_bf16", "avx512_bf16")
BFLOAT16_FLAGS = (*X86_FLAGS, "bf16")


# CUDA's compute capability: RTX 30 and A100; RTX 40, L4, H100 and newer.
MATMUL_8BIT_FROM, FP8_FROM = (8, 0), (8, 9)
HOPPER = 9


@dataclass(frozen=True)
class Hardware:
    """Where tensors live and in which type they are multiplied. `name` is the card or CPU model."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    name: str
    eight: bool = False  # whether it is a card for products in 8 bits
    hopper: bool = False  # H100, H200: a generation with instructions of its own


@dataclass(frozen=True)
class Peak:
    """The most that a card does, without sparsity. An upper bound for plans and for judging a measurement."""

    half_flops_per_second: float
    int8_ops_per_second: float
    bytes_per_second: float
    eight: bool = True  # whether the kernels for products in 8 bits run there


def _peak(half_tflops: float, int8_tops: float, gigabytes: float, *, eight: bool = True) -> Peak:
    return Peak(half_tflops * 1e12, int8_tops * 1e12, gigabytes * 1e9, eight)


# Vendors' data sheets: dense float16/bfloat16 products that add up in float32, dense int8 products, memory.
# GeForce cards do the first at half rate, so int8 is four times that there and twice elsewhere.
# The key's words must all be in the name that the driver gives, the longest key wins.
CARDS: dict[str, Peak] = {
    "H200": _peak(989, 1979, 4800),
    "H100": _peak(989, 1979, 3350),
    "H100 PCIe": _peak(756, 1513, 2000),
    "A100 40GB": _peak(312, 624, 1555),
    "A100 80GB": _peak(312, 624, 2039),
    "A100 80GB PCIe": _peak(312, 624, 1935),
    "L4": _peak(121, 242, 300),
    "T4": _peak(65, 130, 320, eight=False),
    "RTX A6000": _peak(154.8, 309.7, 768),
    "RTX 4090": _peak(165, 661, 1008),
    "RTX 4060": _peak(30.2, 121, 272),
    "RTX 3090": _peak(71, 284, 936),
    "RTX 3080": _peak(59.5, 238, 760),
    "RTX 3070": _peak(40.6, 163, 448),
    "RTX 3060": _peak(25.5, 102, 360),
    "RTX 2080 Ti": _peak(53.8, 215, 616, eight=False),
}

# A word that makes another card of the same number: an RTX 3080 Ti is not an RTX 3080.
_VARIANTS = frozenset({"ti", "super", "d", "laptop", "mobile", "max", "nvl", "mig"})


def peak(name: str) -> Peak | None:
    """The row of CARDS for the name that the driver gives ("NVIDIA A100-SXM4-80GB"); None if not known."""
    words = _words(name)
    fitting = [key for key in CARDS if _words(key) <= words and not (words - _words(key)).intersection(_VARIANTS)]
    return CARDS[max(fitting, key=lambda key: len(_words(key)))] if fitting else None


def pick(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Choose the device and the compute type.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; `dtype` is "auto" or one of DTYPES. Auto takes the first
    CUDA card if there is one; then bfloat16 where the hardware multiplies it, else float16 on a card and
    float32 on a CPU. Raises UsageError for a device or a type that is not there.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"unknown compute type {dtype!r}", hint=f"choose auto, {', '.join(DTYPES)}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}", hint="choose auto, cpu, cuda or cuda:N")
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return _pick_cpu(dtype, asked=device == "cpu")
    return _pick_cuda(device, dtype)


def _pick_cpu(dtype: str, *, asked: bool) -> Hardware:
    import torch

    name, flags = read_cpu()
    flag = next((flag for flag in BFLOAT16_FLAGS if flag in flags), None)
    able = f"this CPU multiplies bfloat16 ({flag})" if flag else "this CPU has no bfloat16 instructions"
    if flag in X86_FLAGS and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # oneDNN would use the instructions; PyTorch's attention asks it to, and then lacks its own part.
        flag, able = None, "PyTorch is kept from using this CPU's vector instructions (ATEN_CPU_CAPABILITY)"
    chosen = dtype if dtype != "auto" else "bfloat16" if flag else "float32"
    if dtype == "auto":
        why = able
    elif dtype == "bfloat16" and not flag:
        why = f"as asked, though {able}: it saves memory and no time"
    else:
        why = "as asked"
    where = "as asked" if asked else "PyTorch finds no CUDA card"
    reason = f"Computing on the CPU ({name}; {where}) in {chosen}: {why}."
    return Hardware(torch.device("cpu"), getattr(torch, chosen), reason, name)


def _pick_cuda(device: str, dtype: str) -> Hardware:
    import torch

    if not torch.cuda.is_available():
        build = torch.version.cuda
        fault = "PyTorch finds no card" if build else "this PyTorch is a build for CPUs only"
        remedy = "see whether nvidia-smi lists one" if build else "install a build of PyTorch for CUDA"
        raise UsageError(f"device {device!r}: {fault}", hint=f"{remedy}, or use --device cpu")
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r}: there are {torch.cuda.device_count()} CUDA cards, counted from 0",
            hint="use --device auto",
        )
    chosen_device = torch.device("cuda", index)
    torch.cuda.set_device(chosen_device)  # for streams, graphs and kernels, which take the current one
    name = torch.cuda.get_device_name(chosen_device)
    # Without including_emulation=False a T4 says yes, and then computes slowly and without Triton.
    able = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not able:
        raise UsageError(f"{name} has no bfloat16 instructions", hint="use --dtype float16 or float32")
    chosen = dtype if dtype != "auto" else "bfloat16" if able else "float16"
    has = "the card multiplies bfloat16" if able else "the card is too old for bfloat16"
    reason = f"Computing on {name} ({chosen_device}) in {chosen}: {has if dtype == 'auto' else 'as asked'}."
    capability = torch.cuda.get_device_capability(chosen_device)
    kind = getattr(torch, chosen)
    return Hardware(chosen_device, kind, reason, name, capability >= MATMUL_8BIT_FROM, capability[0] == HOPPER)


def read_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """The CPU's model and its feature words. Without such a file: the platform's name for it, no words."""
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
    """Bytes that can still be taken: of the card, or of RAM within the limit set on this process's cgroup."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_ram_bytes()


def free_ram_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free RAM in bytes, page cache included since it makes room. Without /proc: all RAM, on Windows what is free."""
    meminfo = proc / "meminfo"
    if not meminfo.is_file():
        return available_ram_bytes()
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_free_bytes(proc / "self" / "cgroup", cgroups)])


def _cgroup_free_bytes(membership: Path, cgroups: Path) -> list[int]:
    """What each cgroup above this process leaves free, version 2 and 1; [] if none sets a limit.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst (memory) and cgroup-v1/memory.rst.
    """
    if not membership.is_file():
        return []
    found = []
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
        inside = Path(path.lstrip("/"))
        for folder in [root / inside, *(root / parent for parent in inside.parents)]:
            limit, usage = folder / limit_name, folder / usage_name
            if not (limit.is_file() and usage.is_file()) or limit.read_text().strip() == "max":
                continue
            used = int(usage.read_text()) - _memory_stat_bytes(folder / "memory.stat", reclaimable)
            found.append(max(0, int(limit.read_text()) - used))
    return found


def _memory_stat_bytes(path: Path, key: str) -> int:
    found = re.search(rf"^{key} (\d+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(found[1]) if found else 0


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """The most bytes held so far: on a card what PyTorch reserved there, else this process's resident RAM."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status")
    # VmHWM starts anew with the program; ru_maxrss begins at the size of the process that started this one.
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found:
        return int(found[1]) * 1024
    return peak_ram_bytes()


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
