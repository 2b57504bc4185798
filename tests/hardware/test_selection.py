"""The choice of device and compute dtype, with its reason."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tests import devices

from octavo import hardware
from octavo.errors import UsageError
from octavo.hardware import capabilities, installation
from octavo.hardware.installation import Build, NvidiaGpu

GIB = 2**30


@pytest.fixture(autouse=True)
def made_anew() -> Iterator[None]:
    """Capabilities are made once for each device; here each test fakes its own."""
    capabilities._capabilities.cache_clear()
    yield
    capabilities._capabilities.cache_clear()


def fake_cuda(
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    bfloat16: bool,
    gpus: int = 1,
    capability: tuple[int, int] = (9, 0),
    architectures: tuple[str, ...] = ("sm_75", "sm_90", "compute_120"),
) -> None:
    """Makes torch.cuda answer as on a machine with `gpus` GPUs. As on a T4, emulation counts as bfloat16 support.

    `architectures` are those of PyTorch's code. Nothing asks the real machine about a driver.
    """

    def chosen(device: torch.device) -> None:
        assert device.index < gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
    monkeypatch.setattr(installation, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], total_memory=GIB, multi_processor_count=40,
        shared_memory_per_block_optin=1024,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16
    )


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    capabilities._capabilities.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(installation, "installed_build", lambda: Build("2.13.0+cpu", ""))
    monkeypatch.setattr(installation, "nvidia_gpu", lambda: None)
    monkeypatch.setattr(capabilities, "read_cpu", lambda: ("Test CPU", frozenset(flags)))
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
    for device, dtype in [("cuda:1", "auto"), ("auto", "bfloat16"), ("auto", "int8"), ("tpu", "auto")]:
        with pytest.raises(UsageError) as caught:
            hardware.pick(device, dtype)
        assert caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="use --device cpu"):
        hardware.pick("cuda")


def test_a_gpu_for_which_pytorch_has_no_code_ends_the_command_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, name="NVIDIA GeForce GTX 1080 Ti", bfloat16=False, capability=(6, 1))
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(UsageError) as caught:
            hardware.pick(device)
        assert "NVIDIA GeForce GTX 1080 Ti has compute capability 6.1" in caught.value.message
        assert "whl/cu126`, or use --device cpu." in caught.value.hint
    assert hardware.pick("cpu").device == torch.device("cpu")


def test_a_gpu_that_runs_as_an_older_one_needs_no_code_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, name="NVIDIA H200", bfloat16=True, capability=(9, 0))
    monkeypatch.setattr(capabilities, "_replaced", {torch.device("cuda", 0): devices.GTX_1080_TI})
    assert hardware.pick().capabilities == devices.GTX_1080_TI


def test_the_driver_decides_which_wheels_a_gpu_without_code_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    blackwell = {"name": "NVIDIA GeForce RTX 5090", "bfloat16": True, "capability": (12, 0)}
    fake_cuda(monkeypatch, **blackwell, architectures=("sm_90",))  # type: ignore[arg-type]
    for driver, index in (("580.95", "cu130"), ("570.133", "cu128")):
        monkeypatch.setattr(installation, "nvidia_gpu", lambda driver=driver: NvidiaGpu(driver))
        with pytest.raises(UsageError) as caught:
            hardware.pick()
        assert f"whl/{index}`" in caught.value.hint


def test_a_gpu_that_pytorch_compiles_for_by_ptx_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, name="RTX 5090", bfloat16=True, capability=(12, 0), architectures=("sm_90", "compute_90"))
    assert hardware.pick().device == torch.device("cuda", 0)


def test_auto_says_why_the_gpu_of_the_machine_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch)
    monkeypatch.setattr(installation, "nvidia_gpu", lambda: NvidiaGpu("580.95.05", "Tesla T4", (7, 5)))
    chosen = hardware.pick()
    assert chosen.device == torch.device("cpu")
    assert "PyTorch cannot use the NVIDIA GPU" in chosen.reason
    assert "2.13.0+cpu is built without CUDA and cannot use the Tesla T4" in chosen.reason
    assert "whl/cu130`" in chosen.reason
    with pytest.raises(UsageError, match="built without CUDA") as caught:
        hardware.pick("cuda")
    assert caught.value.hint.endswith(", or use --device cpu.")
    assert "Tesla T4" not in hardware.pick("cpu").reason


def test_warnings_of_pytorch_about_a_driver_are_replaced_by_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cpu(monkeypatch)
    too_old = "The NVIDIA driver on your system is too old (found version 12020)."

    def unavailable() -> bool:
        warnings.warn(f"CUDA initialization: {too_old}", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(installation, "installed_build", lambda: Build("2.13.0+cu130", "13.0", too_old))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        reason = hardware.pick().reason
    assert shown == []
    assert "CUDA 12.2" in reason


def test_one_of_several_gpus_is_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, name="Tesla T4", bfloat16=False, gpus=2)
    said = " 2 GPUs found; octavo uses one, cuda:0. --device cuda:1 selects the other."
    assert hardware.pick().reason.endswith(said)
    assert hardware.pick("cuda").reason.endswith(said)
    assert "GPUs found" not in hardware.pick("cuda:1").reason
    fake_cuda(monkeypatch, name="Tesla T4", bfloat16=False, gpus=8)
    assert "8 GPUs found; octavo uses one, cuda:0. --device cuda:N selects another." in hardware.pick().reason
    fake_cuda(monkeypatch, name="Tesla T4", bfloat16=False)
    assert "GPUs found" not in hardware.pick().reason


def test_the_error_with_which_cuda_does_not_start_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fails)
    build = installation.installed_build()
    assert build == Build(torch.__version__, "13.0", "Found no NVIDIA driver on your system.")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert installation.installed_build() == Build(torch.__version__, "")


@pytest.mark.parametrize("device", ["cuda:" + "9" * 5000, "x" * 30_000])
def test_a_long_name_of_a_device_is_an_error_of_a_few_lines(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    fake_cuda(monkeypatch, name="NVIDIA H200", bfloat16=True)
    with pytest.raises(UsageError, match="Unknown device") as caught:
        hardware.pick(device)
    assert len(caught.value.message) < 300
