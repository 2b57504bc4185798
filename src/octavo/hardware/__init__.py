"""The device of a run as data: what it can compute, its dtype, its memory, and the peak throughput of known GPUs.

Importing this package does not import torch; the functions that need torch import it.
"""

from octavo.hardware.capabilities import Capabilities, capabilities_of, read_cpu
from octavo.hardware.gpus import GPUS, USABLE, Peak, nearest, other_sizes, peak
from octavo.hardware.memory import (
    free_memory_bytes,
    free_ram_bytes,
    limit_memory_,
    memory_limit_bytes,
    peak_memory_bytes,
)
from octavo.hardware.pretend import notice, pretend_
from octavo.hardware.selection import DTYPES, Hardware, hardware_for, pick

__all__ = [
    "DTYPES", "GPUS", "USABLE", "Capabilities", "Hardware", "Peak", "capabilities_of", "free_memory_bytes",
    "free_ram_bytes", "hardware_for", "limit_memory_", "memory_limit_bytes", "nearest", "notice", "other_sizes", "peak",
    "peak_memory_bytes", "pick", "pretend_", "read_cpu",
]  # fmt: skip
