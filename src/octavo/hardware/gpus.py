"""Peak throughput and memory of known GPUs, for plans of runs and to judge measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from octavo.hardware.capabilities import AMPERE, TURING

# The share of the memory that a plan counts on if the GPU is not here: ECC takes up to 1/16 of it, and the driver,
# CUDA's context and the kernels of its libraries take some hundred MiB.
USABLE = 0.9


@dataclass(frozen=True)
class Measured:
    """What was measured of a GPU. docs/design/gpu-times.md has the source of every figure.

    `half_flops_per_second` are the lowest and the highest published figure for large 16-bit matmuls, `memory_share` is
    the share of the peak bandwidth of its memory that a memory-bound program reached. None: no figure was found.
    """

    half_flops_per_second: tuple[float, float] | None = None
    memory_share: float | None = None
    steps: bool = False  # octavo's own training steps were measured on it


@dataclass(frozen=True)
class Peak:
    """Peak throughput of a GPU without sparsity: an upper bound, for plans and to judge measurements; its memory.

    `memory_gib` is None if GPUs of the same name are sold with several sizes and none is the usual one.
    """

    half_flops_per_second: float
    int8_ops_per_second: float
    bytes_per_second: float  # of its memory
    bus_bytes_per_second: float  # between CPU and GPU, in one direction
    compute_capability: tuple[int, int]
    memory_gib: int | None = None
    measured: Measured = Measured()
    tensor_cores: bool = True  # for int8; the GTX 16 has the compute capability of GPUs with them, and none
    name: str = ""  # the key of GPUS

    @property
    def matmul_8bit(self) -> bool:
        """Whether 8-bit matmuls run on its tensor cores, at least in forward."""
        return self.compute_capability >= TURING and self.tensor_cores

    @property
    def backward_8bit(self) -> bool:
        """Whether they run in backward too."""
        return self.compute_capability >= AMPERE

    @property
    def ampere(self) -> bool:
        """Whether it has FlashAttention and all of octavo's kernels (`runtime.dispatch.simulated_gpu`)."""
        return self.compute_capability >= AMPERE

    @property
    def usable_bytes(self) -> int | None:
        """The memory that a run can count on."""
        return None if self.memory_gib is None else int(USABLE * self.memory_gib * 2**30)


PCIE = {3: 15.75, 4: 31.5, 5: 63.0}  # GB/s in one direction of 16 lanes, by generation


def _peak(
    half_tflops: float,
    int8_tops: float,
    gigabytes: float,
    compute_capability: tuple[int, int],
    pcie: int,
    memory_gib: int | None = None,
    *,
    lanes: int = 16,
    measured: Measured | None = None,
    tensor_cores: bool = True,
) -> Peak:
    bus = PCIE[pcie] * lanes / 16
    rates = (half_tflops * 1e12, int8_tops * 1e12, gigabytes * 1e9, bus * 1e9)
    return Peak(*rates, compute_capability, memory_gib, measured or Measured(), tensor_cores)


def _measured(
    tflops: tuple[float, float] | None = None, memory: float | None = None, *, steps: bool = False
) -> Measured:
    """Published TFLOP/s, lowest and highest, and share of the memory's bandwidth."""
    return Measured(tflops and (tflops[0] * 1e12, tflops[1] * 1e12), memory, steps)


# Vendors' data sheets: dense float16/bfloat16 matmuls with float32 accumulation in TFLOP/s, dense int8 matmuls in
# TOP/s, memory bandwidth in GB/s, compute capability, generation of PCIe, memory in GiB. GeForce GPUs have half rate
# with float32 accumulation, so their int8 rate is four times the first value; elsewhere it is twice. GPUs without
# tensor cores (Pascal and GTX 16) accumulate in float32 at their float32 rate; the P100 has no int8 instructions, so
# int8 has that rate too. The int8 rate of those with such instructions (DP4A), which a V100 and a Titan V have in
# addition to 16-bit tensor cores, is four times the float32 rate. `measured`: docs/design/gpu-times.md.
# Data sheets write GB for memory and mean GiB, before the part for ECC; of the H200's 141 GB about 139 GiB are usable.
# A T4's driver reports 15 of its 16 GiB, and PyTorch 14.56.
# A key matches a driver's GPU name that has all words of the key, and no other memory size than its row; the longest
# matching key is used. Keys with a size, as "RTX 3060 8GB", are for `--gpu`: drivers' names of GeForce GPUs have none.
_ROWS: dict[str, Peak] = {
    "B200": _peak(2250, 4500, 8000, (10, 0), 5, 179),
    "H200": _peak(989, 1979, 4800, (9, 0), 5, 139, measured=_measured(steps=True)),
    "H100": _peak(989, 1979, 3350, (9, 0), 5, 80, measured=_measured((794.5, 821.2), 0.80, steps=True)),
    "H100 PCIe": _peak(756, 1513, 2000, (9, 0), 5, 80, measured=_measured((499.5, 499.5), 0.85)),
    "A100 40GB": _peak(312, 624, 1555, (8, 0), 4, 40, measured=_measured((230, 271.2), 0.84)),
    "A100 80GB": _peak(312, 624, 2039, (8, 0), 4, 80, measured=_measured((230, 271.2), 0.77)),
    "A100 80GB PCIe": _peak(312, 624, 1935, (8, 0), 4, 80, measured=_measured((252.9, 256.4), 0.76)),
    "A30": _peak(165, 330, 933, (8, 0), 4, 24),
    "L40S": _peak(362, 733, 864, (8, 9), 4, 48),
    "L40": _peak(181, 362, 864, (8, 9), 4, 48),
    "L4": _peak(121, 242, 300, (8, 9), 4, 24, measured=_measured((91.4, 91.4), 0.76)),
    "A40": _peak(149.7, 299.3, 696, (8, 6), 4, 48),
    "A10": _peak(125, 250, 600, (8, 6), 4, 24),
    "A10G": _peak(70, 140, 600, (8, 6), 4, 24),
    "A2": _peak(18, 36, 200, (8, 6), 4, 16, lanes=8),
    "T4": _peak(65, 130, 320, (7, 5), 3, 15, measured=_measured((24, 39), 0.65)),
    "P100": _peak(9.3, 9.3, 732, (6, 0), 3, 16, measured=_measured((8.5, 9.1), 0.69)),
    "P100 SXM2": _peak(10.6, 10.6, 732, (6, 0), 3, 16),
    "V100 16GB": _peak(125, 62.8, 900, (7, 0), 3, 16),
    "V100 16GB PCIe": _peak(112, 56, 900, (7, 0), 3, 16),
    "V100 32GB": _peak(125, 62.8, 900, (7, 0), 3, 32),
    "V100 32GB PCIe": _peak(112, 56, 900, (7, 0), 3, 32),
    "V100S": _peak(130, 65.6, 1134, (7, 0), 3, 32),
    "P40": _peak(11.8, 47, 346, (6, 1), 3, 24),
    "P4": _peak(5.5, 22, 192, (6, 1), 3, 8),
    "Quadro P6000": _peak(12.6, 50.5, 432, (6, 1), 3, 24),
    "Quadro P5000": _peak(8.9, 35.5, 288, (6, 1), 3, 16),
    "RTX 6000 Ada": _peak(364.2, 728.5, 960, (8, 9), 4, 48),
    "RTX 5000 Ada": _peak(261.1, 522.2, 576, (8, 9), 4, 32),
    "RTX A6000": _peak(154.8, 309.7, 768, (8, 6), 4, 48, measured=_measured((95, 131.2), 0.88)),
    "RTX A5500": _peak(136.4, 272.8, 768, (8, 6), 4, 24),
    "RTX A5000": _peak(111.1, 222.2, 768, (8, 6), 4, 24),
    "RTX A4500": _peak(94.6, 189.2, 640, (8, 6), 4, 20),
    "RTX A4000": _peak(76.7, 153.4, 448, (8, 6), 4, 16),
    "RTX A2000": _peak(31.9, 63.9, 288, (8, 6), 4, 6),
    "RTX A2000 12GB": _peak(31.9, 63.9, 288, (8, 6), 4, 12),
    "Quadro RTX 8000": _peak(130.5, 261, 672, (7, 5), 3, 48),
    "Quadro RTX 6000": _peak(130.5, 261, 672, (7, 5), 3, 24),
    "Quadro RTX 5000": _peak(89.2, 178.4, 448, (7, 5), 3, 16, measured=_measured(memory=0.80)),
    "Quadro RTX 4000": _peak(57, 114, 416, (7, 5), 3, 8),
    "RTX 5090": _peak(209.5, 838, 1792, (12, 0), 5, 32, measured=_measured((254, 254), 0.81)),
    "RTX 5080": _peak(112.6, 450.2, 960, (12, 0), 5, 16),
    "RTX 5070 Ti": _peak(87.9, 351.5, 896, (12, 0), 5, 16),
    "RTX 5070": _peak(61.7, 246.9, 672, (12, 0), 5, 12),
    "RTX 5060 Ti": _peak(47.4, 189.6, 448, (12, 0), 5, lanes=8),
    "RTX 5060 Ti 16GB": _peak(47.4, 189.6, 448, (12, 0), 5, 16, lanes=8),
    "RTX 5060 Ti 8GB": _peak(47.4, 189.6, 448, (12, 0), 5, 8, lanes=8),
    "RTX 5060": _peak(38.4, 153.4, 448, (12, 0), 5, 8, lanes=8),
    "RTX 5050": _peak(26.3, 105.3, 320, (12, 0), 5, 8, lanes=8),
    "RTX 4090": _peak(165, 661, 1008, (8, 9), 4, 24, measured=_measured((172, 179), 0.85)),
    "RTX 4080 Super": _peak(104.4, 417.8, 736, (8, 9), 4, 16),
    "RTX 4080": _peak(97.5, 389.9, 717, (8, 9), 4, 16),
    "RTX 4070 Ti Super": _peak(88.2, 352.8, 672, (8, 9), 4, 16),
    "RTX 4070 Ti": _peak(80.2, 320.7, 504, (8, 9), 4, 12),
    "RTX 4070 Super": _peak(71, 283.9, 504, (8, 9), 4, 12),
    "RTX 4070": _peak(58.3, 233.2, 504, (8, 9), 4, 12),
    "RTX 4060 Ti": _peak(44.1, 176.5, 288, (8, 9), 4, lanes=8),
    "RTX 4060 Ti 16GB": _peak(44.1, 176.5, 288, (8, 9), 4, 16, lanes=8),
    "RTX 4060 Ti 8GB": _peak(44.1, 176.5, 288, (8, 9), 4, 8, lanes=8),
    "RTX 4060": _peak(30.2, 121, 272, (8, 9), 4, 8, lanes=8),
    "RTX 3090 Ti": _peak(80, 320, 1008, (8, 6), 4, 24, measured=_measured((81, 86), 0.87)),
    "RTX 3090": _peak(71, 284, 936, (8, 6), 4, 24, measured=_measured((78, 78), 0.89)),
    "RTX 3080 Ti": _peak(68.2, 272.8, 912, (8, 6), 4, 12),
    "RTX 3080": _peak(59.5, 238, 760, (8, 6), 4, 10),
    "RTX 3080 12GB": _peak(61.3, 245, 912, (8, 6), 4, 12),
    "RTX 3070 Ti": _peak(43.5, 174, 608, (8, 6), 4, 8),
    "RTX 3070": _peak(40.6, 163, 448, (8, 6), 4, 8),
    "RTX 3060 Ti": _peak(32.4, 129.6, 448, (8, 6), 4, 8, measured=_measured(memory=0.90)),
    "RTX 3060": _peak(25.5, 102, 360, (8, 6), 4, 12, measured=_measured(memory=0.90)),
    "RTX 3060 8GB": _peak(25.5, 102, 240, (8, 6), 4, 8),
    "RTX 3050": _peak(18.2, 72.8, 224, (8, 6), 4, 8, lanes=8),
    "RTX 3050 6GB": _peak(13.5, 54.2, 168, (8, 6), 4, 6, lanes=8),
    "Titan RTX": _peak(130.5, 261, 672, (7, 5), 3, 24),
    "RTX 2080 Ti": _peak(53.8, 215, 616, (7, 5), 3, 11, measured=_measured((53.4, 53.4), 0.79)),
    "RTX 2080 Super": _peak(44.6, 178.4, 496, (7, 5), 3, 8),
    "RTX 2080": _peak(40.3, 161.1, 448, (7, 5), 3, 8, measured=_measured((36.2, 36.2), 0.79)),
    "RTX 2070 Super": _peak(36.3, 145, 448, (7, 5), 3, 8),
    "RTX 2070": _peak(29.9, 119.4, 448, (7, 5), 3, 8),
    "RTX 2060 Super": _peak(28.7, 114.9, 448, (7, 5), 3, 8),
    "RTX 2060": _peak(25.8, 103.2, 336, (7, 5), 3, 6),
    "RTX 2060 12GB": _peak(28.7, 114.9, 336, (7, 5), 3, 12),
    "GTX 1660 Ti": _peak(5.4, 21.8, 288, (7, 5), 3, 6, tensor_cores=False),
    "GTX 1660 Super": _peak(5, 20.1, 336, (7, 5), 3, 6, tensor_cores=False),
    "GTX 1660": _peak(5, 20.1, 192, (7, 5), 3, 6, tensor_cores=False),
    "Titan V": _peak(110, 59.6, 653, (7, 0), 3, 12),
    "Titan Xp": _peak(12.1, 48.6, 548, (6, 1), 3, 12),
    "GTX 1080 Ti": _peak(11.3, 45.4, 484, (6, 1), 3, 11, measured=_measured((10.3, 10.8), 0.83)),
    "GTX 1080": _peak(8.9, 35.5, 320, (6, 1), 3, 8),
    "GTX 1070 Ti": _peak(8.2, 32.7, 256, (6, 1), 3, 8),
    "GTX 1070": _peak(6.5, 25.9, 256, (6, 1), 3, 8),
}
GPUS = {name: replace(row, name=name) for name, row in _ROWS.items()}
