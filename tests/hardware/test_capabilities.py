"""What devices can compute, and what follows for kernels, dtypes and 8-bit types, on devices that are not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests import devices

from octavo import hardware
from octavo.errors import UsageError
from octavo.hardware import Capabilities, hardware_for
from octavo.hardware.capabilities import AMD, CPU, NVIDIA, OTHER, capabilities_of, cpu_capabilities

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Expected:
    """What a device has."""

    vendor: str
    dtype: torch.dtype
    triton: bool = False
    matmul_8bit: bool = False
    fp8: bool = False
    flash_attention: bool = False
    tma: bool = False
    hopper_kernels: bool = False
    cuda_graphs: bool = False
    backward_8bit: bool = False


EXPECTED = {
    devices.CPU: Expected(CPU, torch.float32),
    devices.CPU_BFLOAT16: Expected(CPU, torch.bfloat16),
    devices.MI300X: Expected(AMD, torch.bfloat16),
    devices.TESLA_M60: Expected(NVIDIA, torch.float16, cuda_graphs=True),
    devices.GTX_1080_TI: Expected(NVIDIA, torch.float16, triton=True, cuda_graphs=True),
    devices.V100: Expected(NVIDIA, torch.float16, triton=True, cuda_graphs=True),
    devices.T4: Expected(NVIDIA, torch.float16, triton=True, matmul_8bit=True, cuda_graphs=True),
    devices.A100: Expected(NVIDIA, torch.bfloat16, True, True, False, True, cuda_graphs=True, backward_8bit=True),
    devices.RTX_4090: Expected(NVIDIA, torch.bfloat16, True, True, True, True, cuda_graphs=True, backward_8bit=True),
    devices.H200: Expected(NVIDIA, torch.bfloat16, True, True, True, True, True, True, True, True),
    devices.B200: Expected(NVIDIA, torch.bfloat16, True, True, True, True, True, False, True, True),
    devices.UNKNOWN_GPU: Expected(NVIDIA, torch.bfloat16, True, True, True, True, True, False, True, True),
}


@pytest.mark.parametrize("device", EXPECTED, ids=lambda device: device.name)
def test_what_follows_from_the_capabilities_of_a_device(device: Capabilities) -> None:
    chosen = hardware_for(GPU if device.is_gpu else torch.device("cpu"), device)
    found = Expected(
        device.vendor, chosen.dtype, device.triton, device.matmul_8bit, device.fp8, device.flash_attention, device.tma,
        device.hopper_kernels, device.cuda_graphs, device.backward_8bit,
    )  # fmt: skip
    assert found == EXPECTED[device]
    assert device.name in chosen.reason


def test_an_amd_gpu_that_reports_9_4_is_no_hopper() -> None:
    assert devices.MI300X.compute_capability is None
    assert devices.MI300X.instructions == {"gfx942"}
    assert devices.MI300X.memory_bytes == 192 * 2**30
    with pytest.raises(AssertionError, match="NVIDIA"):
        Capabilities(AMD, "AMD Instinct MI300X", compute_capability=(9, 4))


def test_an_apple_gpu_has_no_kernels_and_no_graphs() -> None:
    device = devices.MPS
    assert device.is_gpu
    assert not any((device.triton, device.matmul_8bit, device.hopper_kernels, device.cuda_graphs))


@pytest.mark.parametrize("device", ["mps", "mps:0"])
def test_an_apple_gpu_is_an_error_that_says_so(device: str) -> None:
    with pytest.raises(UsageError, match="octavo does not support Apple GPUs") as caught:
        hardware.pick(device)
    assert "--device cpu" in str(caught.value.hint)


def test_bfloat16_is_an_error_on_a_gpu_without_instructions_for_it() -> None:
    for device in (devices.T4, devices.GTX_1080_TI):
        with pytest.raises(UsageError, match=f"{device.name} has no bfloat16 instructions"):
            hardware_for(GPU, device, "bfloat16")
    assert hardware_for(GPU, devices.MI300X, "bfloat16").dtype == torch.bfloat16


def test_the_capabilities_of_a_device_are_made_once() -> None:
    here = capabilities_of(torch.device("cpu"))
    assert here is capabilities_of(torch.device("cpu"))
    assert here.vendor == CPU
    assert here.memory_bytes > 2**26
    assert here.processors >= 1
    assert capabilities_of(torch.device("meta")).vendor == OTHER


def test_bfloat16_on_x86_needs_the_vector_code_of_pytorch() -> None:
    for flag, without in (("amx_bf16", False), ("avx512_bf16", False), ("bf16", True)):
        assert "bfloat16" in cpu_capabilities("", frozenset({flag}), vectorized=True).dtypes
        assert ("bfloat16" in cpu_capabilities("", frozenset({flag}), vectorized=False).dtypes) == without


def test_cpu_model_and_flags_are_read_from_proc_cpuinfo_of_x86_and_arm(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nmodel name\t: Chip A\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert hardware.read_cpu(x86) == ("Chip A", frozenset({"fpu", "avx512_bf16"}))
    name, flags = hardware.read_cpu(arm)
    assert name
    assert "bf16" in flags
    assert hardware.read_cpu(tmp_path / "none")[1] == frozenset()
