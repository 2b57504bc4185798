"""Free and peak memory of a device and of this process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.system import available_ram_bytes, peak_ram_bytes

if TYPE_CHECKING:
    import torch


REQUESTED, PRETENDED = "requested", "pretended"  # by --gpu-memory; the memory of the GPU of --pretend
_limits: dict[tuple[str, str], int] = {}  # bytes that PyTorch may reserve in this process, by device and reason


def limit_memory_(device: torch.device, limit_bytes: int, *, reason: str = REQUESTED) -> None:
    """Limits the bytes of a GPU's memory that PyTorch may reserve in this process.

    Replaces the limit for the same reason. Of both reasons the lower limit applies.
    """
    import torch

    _limits[str(device), reason] = limit_bytes
    limit, total = memory_limit_bytes(device), torch.cuda.mem_get_info(device)[1]
    assert limit is not None
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def remove_memory_limits_() -> None:
    """Removes the limits of `limit_memory_` from all devices."""
    import torch

    for device in {device for device, _ in _limits}:
        torch.cuda.set_per_process_memory_fraction(1.0, torch.device(device))
    _limits.clear()


def memory_limit_bytes(device: torch.device) -> int | None:
    """The lowest limit that `limit_memory_` has set; None without one."""
    return min((limit for (name, _), limit in _limits.items() if name == str(device)), default=None)


def free_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Free bytes: of device memory within the limit of this process, or of RAM within that of its cgroup."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        free, limit = int(torch.cuda.mem_get_info(device)[0]), memory_limit_bytes(device)
        return free if limit is None else min(free, limit - int(torch.cuda.memory_reserved(device)))
    return free_ram_bytes()


def free_ram_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free RAM in bytes with the page cache, which can be evicted. Without /proc: all RAM, on Windows the free RAM."""
    meminfo = proc / "meminfo"
    if not meminfo.is_file():
        return available_ram_bytes()
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_free_bytes(proc / "self" / "cgroup", cgroups)])


def total_ram_bytes(proc: Path = Path("/proc")) -> int:
    """RAM of the machine in bytes; on Windows, what is free."""
    meminfo = proc / "meminfo"
    match = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(match[1]) * 1024 if match else available_ram_bytes()


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
