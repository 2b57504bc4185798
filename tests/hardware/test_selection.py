"""The choice of device and compute dtype, with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from octavo import hardware
from octavo.errors import UsageError
from octavo.hardware import capabilities

GIB = 2**30


@pytest.fixture(autouse=True)
def made_anew() -> Iterator[None]:
    """Capabilities are made once for each device; here each test fakes its own."""
    capabilities._capabilities.cache_clear()
    yield
    capabilities._capabilities.cache_clear()


def fake_cuda(
    monkeypatch: pytest.MonkeyPatch, *, name: str, bfloat16: bool, gpus: int = 1, capability: tuple[int, int] = (9, 0)
) -> None:
    """Makes torch.cuda answer as on a machine with `gpus` GPUs. As on a T4, emulation counts as bfloat16 support."""

    def chosen(device: torch.device) -> None:
        assert device.index < gpus

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
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
