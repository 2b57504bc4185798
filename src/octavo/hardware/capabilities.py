"""What a device can compute, as data.

`capabilities_of` makes the value once for each device. Every choice of a kernel, a dtype or a code path is a function
of it, and no other file asks PyTorch what a GPU is. So a test passes the capabilities of a GPU that is not there.
"""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.hardware.memory import total_ram_bytes

if TYPE_CHECKING:
    import torch

NVIDIA, AMD, APPLE, CPU, OTHER = "nvidia", "amd", "apple", "cpu", "other"  # vendors; a CPU of any vendor is CPU

# Feature flags in /proc/cpuinfo for bfloat16 matrix instructions: two of x86, one of Arm.
X86_FLAGS = ("amx_bf16", "avx512_bf16")
BFLOAT16_FLAGS = (*X86_FLAGS, "bf16")

# CUDA compute capabilities: 6.0 is P100, 6.1 is GTX 10, 7.0 is V100, 7.5 is T4 (RTX 20), 8.0 is A100 (8.6 RTX 30), 8.9
# is RTX 40 and L4, 9.0 is H100 and H200, 10.0 is B200, 12.0 is RTX 50.
TRITON_FROM = (6, 0)  # every kernel is compiled from there on in tests; they were run on 9.0
TURING = (7, 5)  # tensor cores for int8
AMPERE = (8, 0)  # tensor cores for bfloat16, FlashAttention 2, the kernels of 8-bit matmuls
FP8_FROM = (8, 9)
HOPPER = 9  # major


_replaced: dict[torch.device, Capabilities] = {}


@dataclass(frozen=True)
class Capabilities:
    """What one device can compute.

    `vendor` is NVIDIA, AMD, APPLE, CPU or OTHER; `name` the model of the GPU or CPU. `dtypes` are the compute dtypes
    with instructions of their own, `instructions` the flags of a CPU (BFLOAT16_FLAGS) or the architecture of an AMD GPU
    ("gfx942"), `compute_capability` that of an NVIDIA GPU and of no other: an AMD GPU reports numbers of another
    meaning, (9, 4) for an MI300X. `memory_bytes` is all memory of the device, `processors` are streaming
    multiprocessors or CPU cores, `shared_memory_bytes` is the limit of one program on a GPU.
    """

    vendor: str
    name: str
    dtypes: frozenset[str] = frozenset({"float32"})
    instructions: frozenset[str] = frozenset()
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    processors: int = 1
    shared_memory_bytes: int = 0

    def __post_init__(self) -> None:
        assert (self.compute_capability is not None) == (self.vendor == NVIDIA), "a compute capability is NVIDIA's"

    @property
    def is_gpu(self) -> bool:
        return self.vendor in (NVIDIA, AMD, APPLE)

    @property
    def triton(self) -> bool:
        """Whether octavo's Triton kernels run: they are compiled and tested for NVIDIA GPUs only."""
        return self._from(TRITON_FROM)

    @property
    def triton_dots(self) -> bool:
        """Whether Triton compiles dots of matrices for tensor cores; on older GPUs into single multiplications."""
        return self.compute_capability is None or self._from(AMPERE)

    @property
    def shared_operands(self) -> bool:
        """Whether dots read their operands in shared memory (wgmma, tcgen05); elsewhere registers hold them."""
        return self.compute_capability in ((9, 0), (10, 0))

    @property
    def matmul_8bit(self) -> bool:
        """Whether 8-bit matmuls run on tensor cores, at least in forward."""
        return self._from(TURING)

    @property
    def backward_8bit(self) -> bool:
        """Whether 8-bit matmuls run in backward too. Its kernel needs Triton's dots; cuBLAS has forward's alone."""
        return self._from(AMPERE)

    @property
    def fp8(self) -> bool:
        """Whether the tensor cores multiply fp8 (e4m3)."""
        return self._from(FP8_FROM)

    @property
    def flash_attention(self) -> bool:
        """Whether PyTorch's FlashAttention 2 runs, also for packed documents and for shared key heads."""
        return self._from(AMPERE)

    def cudnn_attention(self, head_size: int) -> bool:
        """Whether cuDNN has attention for heads of this size, forward and backward."""
        return self._from(AMPERE) and (head_size <= 128 or self.compute_capability in ((9, 0), (10, 0)))

    @property
    def tma(self) -> bool:
        """Whether a copy engine loads tiles of matrices into shared memory (Tensor Memory Accelerator)."""
        return self._from((HOPPER, 0))

    @property
    def hopper_kernels(self) -> bool:
        """Whether it is a GPU for kernels/hopper/: their instructions (wgmma) exist on 9.0 alone."""
        return self.compute_capability is not None and self.compute_capability[0] == HOPPER

    @property
    def cuda_graphs(self) -> bool:
        """Whether steps are captured as CUDA graphs; on AMD GPUs that was never tried."""
        return self.vendor == NVIDIA

    @property
    def float32_results(self) -> bool:
        """Whether a matmul of 2-byte matrices can keep its float32 sums (`torch.mm(.., out_dtype=torch.float32)`)."""
        return self.vendor == NVIDIA

    def _from(self, capability: tuple[int, int]) -> bool:
        return self.compute_capability is not None and self.compute_capability >= capability


def capabilities_of(device: torch.device) -> Capabilities:
    """The capabilities of a device, made once. A GPU without an index is the current one."""
    if device.type == "cuda" and str(device) == "cuda":
        import torch

        device = torch.device("cuda", torch.cuda.current_device())
    return _replaced.get(device) or _capabilities(device)


def actual_capabilities(device: torch.device) -> Capabilities:
    """Those of the device itself, whether they were replaced or not. `device` has an index, if it is a GPU."""
    return _capabilities(device)


def replace_capabilities_(device: torch.device, capabilities: Capabilities) -> None:
    """Gives a device other capabilities, for this process (hardware/pretend.py)."""
    _replaced[device] = capabilities


def restore_capabilities_() -> None:
    """Gives all devices their own capabilities again."""
    _replaced.clear()


@functools.cache
def _capabilities(device: torch.device) -> Capabilities:
    import torch

    if device.type == "cuda":  # NVIDIA, or AMD with a ROCm build of PyTorch
        properties, hip = torch.cuda.get_device_properties(device), getattr(torch.version, "hip", None) is not None
        # Without including_emulation=False a T4 returns True, and then is slow and has no Triton support.
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return gpu_capabilities(properties, hip=hip, bfloat16=bfloat16)
    if device.type == "mps":
        return Capabilities(APPLE, "Apple GPU", frozenset({"float32", "float16"}))
    if device.type == "cpu":
        return cpu_capabilities(*read_cpu(), vectorized=torch.backends.cpu.get_cpu_capability() != "DEFAULT")
    return Capabilities(OTHER, device.type)


def gpu_capabilities(properties: Any, *, hip: bool, bfloat16: bool) -> Capabilities:
    """Those of a GPU with these properties (`torch.cuda.get_device_properties`); `hip`: of a ROCm build of PyTorch."""
    return Capabilities(
        AMD if hip else NVIDIA,
        properties.name,
        frozenset({"float32", "float16", "bfloat16"} if bfloat16 else {"float32", "float16"}),
        frozenset({properties.gcnArchName.partition(":")[0]} if hip else ()),
        None if hip else (properties.major, properties.minor),
        properties.total_memory,
        properties.multi_processor_count,
        0 if hip else properties.shared_memory_per_block_optin,
    )


def cpu_capabilities(name: str, flags: frozenset[str], *, vectorized: bool) -> Capabilities:
    """Those of a CPU with these feature flags. `vectorized`: PyTorch uses the CPU's vector instructions.

    Without them bfloat16 is out on x86: oneDNN would use its instructions, PyTorch's attention calls oneDNN in that
    case, and then fails for the lack of its own vectorized code.
    """
    instructions = flags.intersection(BFLOAT16_FLAGS)
    bfloat16 = bool(instructions if vectorized else instructions.difference(X86_FLAGS))
    return Capabilities(
        CPU,
        name,
        frozenset({"float32", "bfloat16"} if bfloat16 else {"float32"}),
        instructions,
        memory_bytes=total_ram_bytes(),
        processors=os.cpu_count() or 1,
    )


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
