"""The choice of device and dtype, free and peak memory, and the recognition of GPUs by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo import hardware
from octavo.errors import UsageError

GIB = 2**30


def fake_cuda(
    monkeypatch: pytest.MonkeyPatch, *, name: str, bfloat16: bool, gpus: int = 1, capability: tuple[int, int] = (9, 0)
) -> None:
    """Makes torch.cuda answer as on a machine with `gpus` GPUs. As on a T4, emulation counts as bfloat16 support."""

    def chosen(device: torch.device) -> None:
        assert device.index < gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
    )


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "read_cpu", lambda: ("Test CPU", frozenset(flags)))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16"])
def test_auto_is_bfloat16_on_a_cpu_with_bfloat16_instructions(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    fake_cpu(monkeypatch, "avx512f", flag)
    chosen = hardware.pick()
    assert (chosen.device, chosen.dtype, chosen.name) == (torch.device("cpu"), torch.bfloat16, "Test CPU")
    assert flag in chosen.reason


def test_auto_is_float32_if_the_vector_instructions_are_disabled_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, "amx_bf16")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    chosen = hardware.pick("cpu")
    assert chosen.dtype == torch.float32
    assert "ATEN_CPU_CAPABILITY" in chosen.reason
    fake_cpu(monkeypatch, "bf16")  # an Arm CPU, whose kernels are the default ones
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert hardware.pick("cpu").dtype == torch.bfloat16


def test_auto_is_float32_on_any_other_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, "avx512f", "avx512_vnni")
    chosen = hardware.pick()
    assert chosen.dtype == torch.float32
    assert "no bfloat16 instructions" in chosen.reason
    assert "PyTorch finds no GPU" in chosen.reason


def test_bfloat16_without_instructions_is_allowed_and_reported_as_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch)
    chosen = hardware.pick("cpu", "bfloat16")
    assert chosen.dtype == torch.bfloat16
    assert "saves memory but no time" in chosen.reason


@pytest.mark.parametrize(("bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_the_gpu_with_the_half_precision_dtype_that_it_supports(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, expected: torch.dtype
) -> None:
    fake_cuda(monkeypatch, name="Tesla T4", bfloat16=bfloat16)
    chosen = hardware.pick()
    assert (chosen.device, chosen.dtype) == (torch.device("cuda", 0), expected)
    assert chosen.name in chosen.reason


def test_an_explicit_device_overrides_the_automatic_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, name="Tesla T4", bfloat16=True, gpus=2)
    assert hardware.pick("cpu", "float32").device == torch.device("cpu")
    assert hardware.pick("cuda:1", "float32").device == torch.device("cuda", 1)
    assert hardware.pick("cuda:1", "float32").dtype == torch.float32


def test_an_unavailable_device_or_dtype_is_a_usage_error_with_a_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cuda(monkeypatch, name="Tesla T4", bfloat16=False)
    for device, dtype in [("cuda:1", "auto"), ("auto", "bfloat16"), ("auto", "int8"), ("mps", "auto")]:
        with pytest.raises(UsageError) as caught:
            hardware.pick(device, dtype)
        assert caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="use --device cpu"):
        hardware.pick("cuda")


def test_cpu_model_and_flags_are_read_from_proc_cpuinfo_of_x86_and_arm(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nmodel name\t: Chip A\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert hardware.read_cpu(x86) == ("Chip A", frozenset({"fpu", "avx512_bf16"}))
    name, flags = hardware.read_cpu(arm)
    assert name
    assert "bf16" in flags
    assert hardware.read_cpu(tmp_path / "none")[1] == frozenset()


def fake_proc(folder: Path, *, cgroup: str) -> Path:
    proc = folder / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def test_free_ram_is_mem_available(tmp_path: Path) -> None:
    assert hardware.free_ram_bytes(fake_proc(tmp_path, cgroup="0::/\n"), tmp_path / "cg") == 8 * GIB


@pytest.mark.parametrize("limited", ["a/b", "a", "."])
def test_a_cgroup_limit_on_any_level_lowers_free_ram(tmp_path: Path, limited: str) -> None:
    proc, cgroups = fake_proc(tmp_path, cgroup="0::/a/b\n"), tmp_path / "cg"
    (cgroups / "a" / "b").mkdir(parents=True)
    for folder in (cgroups / "a" / "b", cgroups / "a", cgroups):
        (folder / "memory.max").write_text("max\n")
        (folder / "memory.current").write_text(f"{3 * GIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")
    (cgroups / limited / "memory.max").write_text(f"{4 * GIB}\n")
    assert hardware.free_ram_bytes(proc, cgroups) == 2 * GIB


def test_a_cgroup_limit_of_version_1_lowers_free_ram(tmp_path: Path) -> None:
    proc = fake_proc(tmp_path, cgroup="9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    folder = tmp_path / "cg" / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{4 * GIB}")
    (folder / "memory.usage_in_bytes").write_text(f"{9 * GIB}")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {7 * GIB}\n")
    assert hardware.free_ram_bytes(proc, tmp_path / "cg") == 2 * GIB
    (folder / "memory.stat").unlink()
    assert hardware.free_ram_bytes(proc, tmp_path / "cg") == 0


def test_free_memory_of_this_machine_is_a_plausible_number_of_bytes() -> None:
    assert 64 * 2**20 < hardware.free_memory_bytes("cpu") < 2**46


def test_peak_memory_grows_with_allocations_and_does_not_fall_again() -> None:
    block = torch.ones(64 * 2**20 // 4)
    peak = hardware.peak_memory_bytes()
    assert peak > block.nbytes
    del block
    # Linux counts pages in batches for each thread: the peak is accurate to a few hundred kB.
    assert hardware.peak_memory_bytes() > peak - 2**20


def test_peak_memory_of_a_process_is_not_that_of_its_parent() -> None:
    block = torch.ones(96 * 2**20 // 4)
    assert hardware.peak_memory_bytes() > block.nbytes
    code = "from octavo.hardware import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < block.nbytes


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti"),
    ],
)
def test_a_gpu_is_found_by_the_name_from_its_driver(name: str, key: str) -> None:
    assert hardware.peak(name) is hardware.GPUS[key]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3080 Ti",
        "NVIDIA GeForce RTX 4060 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40S",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD EPYC",
        "",
    ],
)
def test_a_gpu_with_a_similar_name_is_unknown(name: str) -> None:
    assert hardware.peak(name) is None


def test_int8_has_twice_the_rate_of_half_precision_on_server_gpus_and_four_times_on_geforce() -> None:
    for key, row in hardware.GPUS.items():
        times = 4 if key.startswith("RTX ") and key != "RTX A6000" else 2
        assert row.int8_ops_per_second / row.half_flops_per_second == pytest.approx(times, rel=0.02), key


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_8bit_matmuls_need_compute_capability_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    fake_cuda(monkeypatch, name="Test", bfloat16=True, capability=capability)
    assert hardware.pick().matmul_8bit is expected


def test_a_cpu_has_no_8bit_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch, "amx_bf16")
    assert not hardware.pick().matmul_8bit
