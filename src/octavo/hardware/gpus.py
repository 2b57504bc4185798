"""Peak throughput of known GPUs, for plans of runs and to judge measurements."""

from __future__ import annotations

import re
from dataclasses import dataclass

from octavo.hardware.capabilities import AMPERE


@dataclass(frozen=True)
class Peak:
    """Peak throughput of a GPU without sparsity: an upper bound, for plans and to judge measurements."""

    half_flops_per_second: float
    int8_ops_per_second: float
    bytes_per_second: float  # of its memory
    bus_bytes_per_second: float  # between CPU and GPU, in one direction
    compute_capability: tuple[int, int]

    @property
    def matmul_8bit(self) -> bool:
        """Whether the kernels of 8-bit matmuls run on it."""
        return self.compute_capability >= AMPERE


PCIE = {3: 15.75, 4: 31.5, 5: 63.0}  # GB/s in one direction of 16 lanes, by generation


def _peak(
    half_tflops: float,
    int8_tops: float,
    gigabytes: float,
    compute_capability: tuple[int, int],
    pcie: int,
    lanes: int = 16,
) -> Peak:
    bus = PCIE[pcie] * lanes / 16
    return Peak(half_tflops * 1e12, int8_tops * 1e12, gigabytes * 1e9, bus * 1e9, compute_capability)


# Vendors' data sheets: dense float16/bfloat16 matmuls with float32 accumulation in TFLOP/s, dense int8 matmuls in
# TOP/s, memory bandwidth in GB/s, compute capability, generation of PCIe. GeForce GPUs have half rate with float32
# accumulation, so their int8 rate is four times the first value; elsewhere it is twice. A key matches a driver's GPU
# name that has all words of the key; the longest matching key is used.
GPUS: dict[str, Peak] = {
    "H200": _peak(989, 1979, 4800, (9, 0), 5),
    "H100": _peak(989, 1979, 3350, (9, 0), 5),
    "H100 PCIe": _peak(756, 1513, 2000, (9, 0), 5),
    "A100 40GB": _peak(312, 624, 1555, (8, 0), 4),
    "A100 80GB": _peak(312, 624, 2039, (8, 0), 4),
    "A100 80GB PCIe": _peak(312, 624, 1935, (8, 0), 4),
    "L4": _peak(121, 242, 300, (8, 9), 4),
    "T4": _peak(65, 130, 320, (7, 5), 3),
    "RTX A6000": _peak(154.8, 309.7, 768, (8, 6), 4),
    "RTX 4090": _peak(165, 661, 1008, (8, 9), 4),
    "RTX 4060": _peak(30.2, 121, 272, (8, 9), 4, lanes=8),
    "RTX 3090": _peak(71, 284, 936, (8, 6), 4),
    "RTX 3080": _peak(59.5, 238, 760, (8, 6), 4),
    "RTX 3070": _peak(40.6, 163, 448, (8, 6), 4),
    "RTX 3060": _peak(25.5, 102, 360, (8, 6), 4),
    "RTX 2080 Ti": _peak(53.8, 215, 616, (7, 5), 3),
}

# Words for a different GPU with the same number: an RTX 3080 Ti is not an RTX 3080.
_VARIANTS = frozenset({"ti", "super", "d", "laptop", "mobile", "max", "nvl", "mig"})


def peak(name: str) -> Peak | None:
    """The row of GPUS for a GPU name of the driver ("NVIDIA A100-SXM4-80GB"); None for an unknown GPU."""
    words = _words(name)
    matches = [key for key in GPUS if _words(key) <= words and not (words - _words(key)).intersection(_VARIANTS)]
    return GPUS[max(matches, key=lambda key: len(_words(key)))] if matches else None


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
