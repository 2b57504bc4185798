"""The kernels, the attention backend and the precision of matmuls that a run reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import devices

from octavo.commands import loading
from octavo.commands.backends import configure_backends
from octavo.commands.run_plan import budget_bytes
from octavo.config import MemoryOptions, ModelOptions
from octavo.errors import UsageError
from octavo.hardware import Capabilities, capabilities, memory
from octavo.hardware.capabilities import NVIDIA
from octavo.reporting import Report
from octavo.runtime import dispatch
from octavo.runtime.dispatch import Backends


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Resets the backends after a test."""
    yield
    dispatch.set_backends(Backends())


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton 3.7 and the kernels are installed, whatever this machine has."""
    dispatch.kernels_disabled_reason.cache_clear()
    dispatch.hopper_kernels_disabled_reason.cache_clear()
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(dispatch, "import_module", lambda name: SimpleNamespace(__version__="3.7.1"))
    yield
    dispatch.kernels_disabled_reason.cache_clear()
    dispatch.hopper_kernels_disabled_reason.cache_clear()


def reported(folder: Path, capabilities: Capabilities, **options: Any) -> str:
    """What a run on this device reports of its backends."""
    with Report(console=False, metrics=folder / "said") as report:
        configure_backends(MemoryOptions.model_validate(options), devices.hardware(capabilities), report)
    return (folder / "said").read_text()


def test_a_run_on_a_cpu_reports_no_kernels(tmp_path: Path) -> None:
    assert reported(tmp_path, devices.CPU, attention="math", kernels=False) == ""
    assert dispatch.backends() == Backends(kernels=False, attention="math")


GIB = 2**30
EXACT = "exact (8 bits need an NVIDIA GPU of compute capability 7.5 with tensor cores)"
GRAPHS, EAGER = "CUDA graphs", "eager (CUDA graphs are tested on NVIDIA GPUs only)"
NO_DOTS = "Triton (prompts by cuBLAS, without CUDA graphs: Triton's matmuls need compute capability 8.0)"
OLD_ATTENTION = "memory-efficient (FlashAttention and cuDNN need compute capability 8.0)"
AUTO_8BIT = "8 bits where faster and precise enough"
FORWARD_8BIT = AUTO_8BIT + ", in backward exact (8 bits need compute capability 8.0)"


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("device", "kernels", "steps", "matmuls"),
    [
        (devices.MI300X, "off (they are tested on NVIDIA GPUs only; this is an AMD GPU)", EAGER, EXACT),
        (devices.TESLA_M60, "off (compute capability 5.2; they need 6.0)", GRAPHS, EXACT),
        (devices.GTX_1080_TI, NO_DOTS, GRAPHS, EXACT),
        (devices.V100, NO_DOTS, GRAPHS, EXACT),
        (devices.T4, NO_DOTS, GRAPHS, FORWARD_8BIT),
        (devices.A100, "Triton", GRAPHS, AUTO_8BIT),
        (devices.H200, "Triton", GRAPHS, AUTO_8BIT),
        (devices.UNKNOWN_GPU, "Triton", GRAPHS, AUTO_8BIT),
    ],
    ids=lambda value: value.name if isinstance(value, Capabilities) else "",
)
def test_the_backends_of_a_device_are_reported_once_with_their_reasons(
    tmp_path: Path, device: Capabilities, kernels: str, steps: str, matmuls: str
) -> None:
    message = reported(tmp_path, device)
    assert message.count("Kernels: ") == 1
    attention = OLD_ATTENTION if device.vendor == NVIDIA and not device.flash_attention else "auto"
    assert f"Kernels: {kernels}. Attention: {attention}. Steps: {steps}. Matmuls: {matmuls}." in message


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": False}, "Kernels: off (--no-kernels)."),
        ({"cuda_graphs": False, "attention": "flash"}, "Attention: flash. Steps: eager (--no-cuda-graphs)."),
        ({"matmul": "exact"}, "Matmuls: exact (--matmul exact)."),
        ({"matmul": "8bit"}, "Matmuls: 8 bits (--matmul 8bit)."),
        ({"kernels": False}, "Matmuls: exact (8 bits need the kernels)."),
    ],
)
def test_options_decide_the_backends(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in reported(tmp_path, devices.RTX_3060, **options)


@pytest.mark.usefixtures("with_triton")
def test_a_gpu_without_triton_reports_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    message = reported(tmp_path, devices.RTX_3060)
    assert "Kernels: off (Triton is not installed)." in message
    assert "Matmuls: exact (8 bits need the kernels)." in message


@pytest.mark.usefixtures("with_triton")
def test_disabled_hopper_kernels_are_reported_on_a_hopper_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "import_module", lambda name: SimpleNamespace(__version__="9.9.0"))
    assert "Kernels: Triton (without the Hopper kernels: Triton 9.9.0; they are tested with 3.6 and 3.7)." in reported(
        tmp_path, devices.H200
    )
    assert "Kernels: Triton. " in reported(tmp_path, devices.A100)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_attention_that_the_gpu_has_no_kernels_of_is_an_error(tmp_path: Path, attention: str) -> None:
    for device in (devices.T4, devices.P100):
        with pytest.raises(UsageError, match=f"{device.name} does not run --attention {attention}: Flash"):
            reported(tmp_path, device, attention=attention)
    assert f"Attention: {attention}." in reported(tmp_path, devices.A100, attention=attention)
    assert "Attention: efficient." in reported(tmp_path, devices.T4, attention="efficient")


def test_a_limit_of_gpu_memory_is_a_share_of_the_memory_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 12 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    reported(tmp_path, devices.RTX_3060)
    reported(tmp_path, devices.RTX_3060, gpu_memory="30GiB")
    reported(tmp_path, devices.RTX_3060, gpu_memory="3GiB")
    assert shares == [1.0, 0.25]


Call = Callable[..., tuple[str, float, float | None]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The GPU, the budget and the limit in GiB of a call in Python, on an H200 of which 138 of 140 GiB are free."""
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(capabilities, "_replaced", {})
    monkeypatch.setattr(capabilities, "_capabilities", lambda device: devices.H200)
    cuda: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "get_arch_list": lambda: ["sm_90"], "mem_get_info": lambda device: (138 * GIB, 140 * GIB),
        "memory_reserved": lambda device: 0, "set_per_process_memory_fraction": lambda share, device: None,
    }  # fmt: skip
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)

    def called(pretend: str | None = None, gpu_memory: str = "auto", dtype: str = "auto") -> Any:
        options = MemoryOptions.model_validate({"gpu_memory": gpu_memory})
        with Report(console=False, metrics=tmp_path / "said") as report:
            model = ModelOptions.model_validate({"pretend": pretend, "dtype": dtype})
            hardware = loading.chosen_hardware(model, report)
            configure_backends(options, hardware, report)
        limit = memory.memory_limit_bytes(hardware.device)
        return hardware.name, round(budget_bytes(options, hardware) / GIB, 2), limit and round(limit / GIB, 2)

    return called


@pytest.mark.usefixtures("with_triton")
def test_a_call_has_its_own_gpu_and_its_own_limit_of_memory(call: Call, tmp_path: Path) -> None:
    assert call() == ("NVIDIA H200", 137.61, None)
    assert call("T4", "40GiB") == ("Tesla T4", 14.06, 14.06)
    assert call("T4", "8GiB") == ("Tesla T4", 8, 8)
    assert call("T4") == ("Tesla T4", 13.67, 14.06)
    assert "--pretend T4: NVIDIA H200 runs with" in (tmp_path / "said").read_text()
    assert call() == ("NVIDIA H200", 137.61, None)
    assert call("4090") == ("NVIDIA GeForce RTX 4090", 22.61, 23)
    assert call("3060", "11.5GiB") == ("NVIDIA GeForce RTX 3060", 11.2, 11.2)
    assert call(None, "8GiB") == ("NVIDIA H200", 8, 8)
    assert call(None, "20GiB") == ("NVIDIA H200", 20, 20)
    with pytest.raises(UsageError, match="Tesla T4 has no bfloat16 instructions"):
        call("T4", dtype="bfloat16")
    assert call() == ("NVIDIA H200", 137.61, None)
