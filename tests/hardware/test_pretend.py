"""Running on a GPU as if it were an older or a smaller one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests import devices

from octavo.errors import UsageError
from octavo.hardware import (
    GPUS,
    Hardware,
    capabilities,
    capabilities_of,
    free_memory_bytes,
    gpu_named,
    memory,
    memory_limit_bytes,
    peak,
    restore_,
)
from octavo.hardware.pretend import MODELS, SHARED_KIB, capabilities_like, notice, pretend_
from octavo.ops.attention import implementations
from octavo.system import quoted

GIB, GPU = 2**30, torch.device("cuda", 0)
On = Callable[[capabilities.Capabilities], Hardware]
SAME = {
    "T4": devices.T4, "P100": devices.P100, "1080Ti": devices.GTX_1080_TI, "3060": devices.RTX_3060,
    "4090": devices.RTX_4090, "5090": devices.RTX_5090,
}  # fmt: skip


@pytest.fixture(autouse=True)
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The shares of an H200's 140 GiB that the process is limited to; 100 GiB are free, 1 GiB is reserved."""
    found: list[float] = []
    monkeypatch.setattr(capabilities, "_replaced", {})
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: found.append(share))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    return found


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """The hardware of this machine with the given GPU, which is cuda:0."""

    def made(real: capabilities.Capabilities) -> Hardware:
        monkeypatch.setattr(capabilities, "_capabilities", lambda device: real)
        return replace(devices.hardware(real), device=GPU)

    return made


@pytest.mark.parametrize("name", SAME)
def test_the_capabilities_are_those_of_the_properties_that_pytorch_reports(name: str) -> None:
    expected, made = SAME[name], capabilities_like(name)
    for field in ("vendor", "name", "dtypes", "compute_capability", "processors", "shared_memory_bytes"):
        assert getattr(made, field) == getattr(expected, field), field
    assert 0.85 * expected.memory_bytes < made.memory_bytes <= expected.memory_bytes - GIB / 2


@pytest.mark.parametrize("name", MODELS)
def test_the_memory_leaves_some_for_cuda_and_libraries_of_what_pytorch_reports(name: str) -> None:
    """GiB: PyTorch's report, by public messages, for three GPUs; of the data sheet it leaves 0.6 to 1.3."""
    key = gpu_named(name)
    assert key is not None
    sheet = GPUS[key].memory_gib
    assert sheet is not None
    assert 0.6 <= sheet - MODELS[name].memory_gib <= 1.3
    reported = {"T4": 14.56, "P100": 15.89, "1080Ti": 10.91}.get(name, sheet)
    assert reported - MODELS[name].memory_gib >= 0.5


def test_the_shared_memory_is_that_of_the_devices_of_tests() -> None:
    known = [each for each in vars(devices).values() if isinstance(each, capabilities.Capabilities)]
    by_capability = {each.compute_capability: each.shared_memory_bytes // 1024 for each in known}
    assert {each: by_capability[each] for each in SHARED_KIB} == SHARED_KIB


@pytest.mark.parametrize("name", MODELS)
def test_a_gpu_with_more_memory_runs_as_the_named_one(name: str, shares: list[float], on: On) -> None:
    here = on(devices.H200)
    made = pretend_(name, here)
    assert capabilities_of(GPU) == made.capabilities == capabilities_like(name)
    old = MODELS[name].compute_capability < (8, 0)
    assert made.dtype == (torch.float16 if old else torch.bfloat16)
    assert shares == [made.capabilities.memory_bytes / (140 * GIB)]
    assert memory_limit_bytes(GPU) == made.capabilities.memory_bytes
    assert free_memory_bytes(GPU) == made.capabilities.memory_bytes - GIB
    memory.limit_memory_(GPU, 200 * GIB)  # a --gpu-memory that the pretended GPU does not have
    assert memory_limit_bytes(GPU) == made.capabilities.memory_bytes
    memory.limit_memory_(GPU, 2 * GIB)
    assert memory_limit_bytes(GPU) == 2 * GIB
    memory.limit_memory_(GPU, 3 * GIB)
    assert memory_limit_bytes(GPU) == 3 * GIB
    said = notice(name, here, made)
    assert made.name in said
    assert "Speeds are those of NVIDIA H200" in said


def test_bfloat16_is_refused_on_a_pretended_gpu_without_it_and_nothing_changes(shares: list[float], on: On) -> None:
    with pytest.raises(UsageError, match="Tesla T4 has no bfloat16 instructions"):
        pretend_("T4", on(devices.H200), "bfloat16")
    assert shares == []
    assert capabilities_of(GPU) == devices.H200
    assert memory_limit_bytes(GPU) is None


def test_another_gpu_in_place_of_the_pretended_one_is_compared_with_the_actual_gpu(on: On) -> None:
    small = pretend_("T4", on(devices.H200))
    assert pretend_("4090", small).capabilities == capabilities_of(GPU) == capabilities_like("4090")
    assert memory_limit_bytes(GPU) == capabilities_like("4090").memory_bytes


def test_after_restoring_the_gpu_is_the_actual_one_without_a_limit(shares: list[float], on: On) -> None:
    pretend_("T4", on(devices.H200))
    memory.limit_memory_(GPU, 2 * GIB)
    restore_()
    assert capabilities_of(GPU) == devices.H200
    assert memory_limit_bytes(GPU) is None
    assert shares[-1] == 1.0
    restore_()
    assert len(shares) == 3, "a process without a limit is left as it is"


@pytest.mark.parametrize("device", [devices.CPU, devices.MI300X])
def test_pretending_needs_an_nvidia_gpu(device: capabilities.Capabilities, shares: list[float], on: On) -> None:
    with pytest.raises(UsageError, match=f"needs an NVIDIA GPU .* this is {device.name}") as caught:
        pretend_("T4", on(device))
    assert "octavo plan --gpu T4" in str(caught.value.hint)
    assert shares == []
    assert capabilities._replaced == {}


def test_a_gpu_with_less_memory_cannot_run_in_place_of_another(shares: list[float], on: On) -> None:
    with pytest.raises(UsageError, match=r"--pretend A6000 needs 46\.9 GiB .* RTX 4090 has 24\.0 GiB"):
        pretend_("A6000", on(devices.RTX_4090))
    assert shares == []


@pytest.mark.parametrize(("name", "real", "lacking"), [
    ("3060", devices.T4, "bfloat16, Triton's dots"), ("1080Ti", devices.TESLA_M60, "Triton"),
    ("T4", devices.P100, "8-bit matmuls"), ("4090", devices.A100, "fp8"), ("5090", devices.RTX_4090, "TMA"),
])  # fmt: skip
def test_a_gpu_without_the_instructions_of_another_cannot_run_in_place_of_it(
    name: str, real: capabilities.Capabilities, lacking: str, shares: list[float], on: On
) -> None:
    real = replace(real, memory_bytes=80 * GIB)
    with pytest.raises(UsageError, match=f"--pretend {name} needs what the {real.name} lacks: {lacking}\\.") as caught:
        pretend_(name, on(real))
    assert f"octavo plan --gpu {name}" in str(caught.value.hint)
    assert shares == []
    assert capabilities._replaced == {}


def test_an_unknown_name_is_an_error_that_lists_the_others() -> None:
    for name in ("T5", "A100", "3090", "RTX 4090 Laptop", ""):
        with pytest.raises(UsageError, match=f"'{name}'") as caught:
            pretend_(name, devices.hardware(devices.H200))
        assert "T4, P100, 1080Ti" in str(caught.value.hint)
    with pytest.raises(UsageError) as long:
        pretend_("T4" * 10_000, devices.hardware(devices.H200))
    assert len(long.value.message) < 300


def test_a_gpu_is_named_as_for_a_plan() -> None:
    for name, key in (("t4", "T4"), ("Tesla T4", "T4"), ("GTX 1080 Ti", "1080Ti"), ("rtx a6000", "A6000")):
        assert capabilities_like(name) == capabilities_like(key)


@pytest.mark.parametrize(("name", "gib"), [("RTX 3060 8GB", 7.2), ("3060 8 GB", 7.2), ("RTX 3060 12GB", 11.2)])
def test_a_gpu_that_is_sold_with_two_sizes_has_the_memory_of_its_name(name: str, gib: float, on: On) -> None:
    made = pretend_(name, on(devices.H200))
    assert made.capabilities.memory_bytes == int(gib * GIB)
    assert memory_limit_bytes(GPU) == int(gib * GIB)
    assert peak(made.name) is GPUS[str(gpu_named(name))]  # so the plan of a run has its bandwidth
    assert replace(made.capabilities, memory_bytes=0, name="") == replace(
        capabilities_like("3060"), memory_bytes=0, name=""
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("RTX 3070", "of the RTX 3070 are those of --pretend 3060 --gpu-memory 7.2GiB"),
        ("GTX 1080", "of the GTX 1080 are those of --pretend 1080Ti --gpu-memory 7.2GiB"),
        ("L40S", f"octavo plan {quoted(['--gpu', 'L40S'])}"),
        ("V100 32GB", f"octavo plan {quoted(['--gpu', 'V100 32GB'])}"),
        ("RTX 3070", f"octavo plan {quoted(['--gpu', 'RTX 3070'])}"),
    ],
)
def test_for_another_gpu_the_hint_has_one_of_its_generation_with_its_memory(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        capabilities_like(name)
    assert hint in str(caught.value.hint)
    assert ("--gpu-memory" in str(caught.value.hint)) == (name not in ("L40S", "V100 32GB"))


@pytest.mark.parametrize("device", [devices.CPU, devices.GTX_1080_TI])
def test_names_with_blanks_are_quoted_in_commands(device: capabilities.Capabilities, on: On) -> None:
    """By a person they are pasted into a shell."""
    with pytest.raises(UsageError) as caught:
        pretend_("RTX A6000", on(device))
    assert f"--pretend {quoted(['RTX A6000'])} needs" in caught.value.message
    assert f"`octavo plan --gpu {quoted(['RTX A6000'])}`" in str(caught.value.hint)


@pytest.mark.parametrize(("device", "head_size", "expected"), [
    (devices.H200, 256, "cudnn flash efficient math"), (devices.A100, 128, "cudnn flash efficient math"),
    (devices.A100, 256, "flash efficient math"), (devices.RTX_5090, 256, "flash efficient math"),
    (devices.T4, 64, "efficient math"), (devices.P100, 256, "efficient math"),
    (devices.MI300X, 256, "cudnn flash efficient math"),
])  # fmt: skip
def test_attention_has_the_implementations_of_the_gpu(
    device: capabilities.Capabilities, head_size: int, expected: str
) -> None:
    assert " ".join(implementations(device, head_size)) == expected
