"""The device of a run as data: what it can compute, its dtype, its memory, and the peak throughput of known GPUs.

Importing this package does not import torch; the functions that need torch import it.
"""

from octavo.hardware.capabilities import Capabilities, capabilities_of, read_cpu
from octavo.hardware.gpu_names import gpu_named, gpus_with, nearest, other_sizes, peak
from octavo.hardware.gpus import GPUS, USABLE, Measured, Peak
from octavo.hardware.memory import (
    free_memory_bytes,
    free_ram_bytes,
    limit_memory_,
    memory_limit_bytes,
    peak_memory_bytes,
)
from octavo.hardware.pretend import notice, pretend_, restore_
from octavo.hardware.rates import LAUNCH_SECONDS, Rates, basis, rates_of
from octavo.hardware.selection import DTYPES, Hardware, hardware_for, pick

__all__ = [
    "DTYPES", "GPUS", "LAUNCH_SECONDS", "USABLE", "Capabilities", "Hardware", "Measured", "Peak", "Rates", "basis",
    "capabilities_of", "free_memory_bytes", "free_ram_bytes", "gpu_named", "gpus_with", "hardware_for",
    "limit_memory_", "memory_limit_bytes", "nearest", "notice", "other_sizes", "peak", "peak_memory_bytes", "pick",
    "pretend_", "rates_of", "read_cpu", "restore_",
]  # fmt: skip
