"""Capabilities of devices for tests, without the devices, and `Hardware` with them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from octavo.hardware import Capabilities, Hardware
from octavo.hardware.capabilities import APPLE, cpu_capabilities, gpu_capabilities

GIB, KIB = 2**30, 2**10


def gpu(
    name: str, major: int, minor: int, *, memory_gib: int, processors: int, shared_kib: int = 99, gcn: str = "",
    bfloat16: bool = True,
) -> Capabilities:  # fmt: skip
    """Capabilities from the properties that PyTorch reports for a GPU; `gcn`: the architecture of an AMD GPU."""
    properties = SimpleNamespace(
        name=name, major=major, minor=minor, total_memory=memory_gib * GIB, multi_processor_count=processors,
        shared_memory_per_block_optin=shared_kib * KIB, gcnArchName=gcn,
    )  # fmt: skip
    return gpu_capabilities(properties, hip=bool(gcn), bfloat16=bfloat16)


CPU = cpu_capabilities("a CPU", frozenset({"avx2"}), vectorized=True)
CPU_BFLOAT16 = cpu_capabilities("a CPU with AMX", frozenset({"avx2", "amx_bf16"}), vectorized=True)
MPS = Capabilities(APPLE, "Apple GPU", frozenset({"float32", "float16"}))
MI300X = gpu("AMD Instinct MI300X", 9, 4, memory_gib=192, processors=304, gcn="gfx942:sramecc+:xnack-")
TESLA_M60 = gpu("Tesla M60", 5, 2, memory_gib=8, processors=16, shared_kib=48, bfloat16=False)
P100 = gpu("Tesla P100-PCIE-16GB", 6, 0, memory_gib=16, processors=56, shared_kib=48, bfloat16=False)
GTX_1080_TI = gpu("NVIDIA GeForce GTX 1080 Ti", 6, 1, memory_gib=11, processors=28, shared_kib=48, bfloat16=False)
V100 = gpu("Tesla V100-SXM2-16GB", 7, 0, memory_gib=16, processors=80, shared_kib=96, bfloat16=False)
T4 = gpu("Tesla T4", 7, 5, memory_gib=15, processors=40, shared_kib=64, bfloat16=False)
A100 = gpu("NVIDIA A100-SXM4-80GB", 8, 0, memory_gib=80, processors=108, shared_kib=163)
RTX_3060 = gpu("NVIDIA GeForce RTX 3060", 8, 6, memory_gib=12, processors=28)
RTX_4090 = gpu("NVIDIA GeForce RTX 4090", 8, 9, memory_gib=24, processors=128)
H200 = gpu("NVIDIA H200", 9, 0, memory_gib=141, processors=132, shared_kib=227)
B200 = gpu("NVIDIA B200", 10, 0, memory_gib=180, processors=148, shared_kib=227)
RTX_5090 = gpu("NVIDIA GeForce RTX 5090", 12, 0, memory_gib=32, processors=170)
UNKNOWN_GPU = gpu("NVIDIA Rubin Test Sample", 13, 0, memory_gib=64, processors=160, shared_kib=227)


def hardware(capabilities: Capabilities, dtype: torch.dtype | None = None) -> Hardware:
    """The hardware of a run on this device."""
    kind = "cuda" if capabilities.is_gpu else "cpu"
    if dtype is None:
        half = torch.bfloat16 if "bfloat16" in capabilities.dtypes else torch.float16
        dtype = half if kind == "cuda" else torch.float32
    return Hardware(torch.device(kind), dtype, "for a test", capabilities)
