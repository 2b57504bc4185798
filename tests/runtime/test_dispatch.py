"""Which operations run their kernel and which their reference, on devices that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from tests import devices

from octavo.hardware import Capabilities
from octavo.ops import pointwise
from octavo.runtime import dispatch
from octavo.runtime.dispatch import (
    Backends,
    hopper_kernels_disabled_reason,
    hopper_kernels_run_on,
    kernels_disabled_reason,
    kernels_run_on,
    set_backends,
)


def on(capabilities: Capabilities, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes tensors of this process be on such a device."""
    monkeypatch.setattr(dispatch, "capabilities_of", lambda _: capabilities)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The arguments of calls of the kernel of gelu_into, which is replaced."""
    calls: list[Any] = []
    monkeypatch.setattr(import_module("octavo.kernels.pointwise"), "gelu_into", lambda *call: calls.append(call))
    kernels_disabled_reason.cache_clear()
    hopper_kernels_disabled_reason.cache_clear()
    yield calls
    set_backends(Backends())
    kernels_disabled_reason.cache_clear()
    hopper_kernels_disabled_reason.cache_clear()


def runs_a_kernel(called: list[Any]) -> bool:
    """Whether gelu_into runs its kernel; else its reference has."""
    x, out = torch.rand(2, 3, device="cpu") + 1, torch.zeros(2, 3, device="cpu")
    pointwise.gelu_into(x, out)
    assert called in ([], [(x, out)])
    assert kernels_run_on(x) == bool(called)
    assert bool(out.all()) == (not called)
    return bool(called)


REASONS = {
    devices.CPU: "tested on NVIDIA GPUs only; this is a CPU",
    devices.CPU_BFLOAT16: "this is a CPU",
    devices.MPS: "tested on NVIDIA GPUs only",
    devices.MI300X: "tested on NVIDIA GPUs only; this is an AMD GPU",
    devices.TESLA_M60: "compute capability 5.2; they need 6.0",
    devices.GTX_1080_TI: "",
    devices.T4: "",
    devices.A100: "",
    devices.H200: "",
    devices.B200: "",
    devices.UNKNOWN_GPU: "",
}


@pytest.mark.parametrize("device", REASONS, ids=lambda device: device.name)
def test_a_kernel_runs_on_nvidia_gpus_and_nowhere_else(
    device: Capabilities, called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(device, monkeypatch)
    assert REASONS[device] in kernels_disabled_reason(device)
    assert bool(REASONS[device]) == bool(kernels_disabled_reason(device))
    assert runs_a_kernel(called) == (REASONS[device] == "")


@pytest.mark.parametrize("device", REASONS, ids=lambda device: device.name)
def test_hopper_kernels_run_on_hopper_gpus_alone(
    device: Capabilities, called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(device, monkeypatch)
    assert hopper_kernels_run_on(torch.ones(2)) == (device is devices.H200)
    set_backends(Backends(kernels=False))
    assert not hopper_kernels_run_on(torch.ones(2))


@pytest.mark.parametrize("device", REASONS, ids=lambda device: device.name)
def test_without_kernels_the_references_run_on_every_device(
    device: Capabilities, called: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(device, monkeypatch)
    set_backends(Backends(kernels=False))
    assert not runs_a_kernel(called)


def test_tensors_of_this_cpu_go_to_the_references(called: list[Any]) -> None:
    assert not runs_a_kernel(called)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("triton", "Triton is not installed"), ("octavo.kernels", "the folder octavo/kernels was deleted")],
)
def test_without_triton_or_the_folder_the_references_run(
    called: list[Any], missing: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(devices.H200, monkeypatch)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == missing else object())
    assert kernels_disabled_reason(devices.H200) == reason
    assert hopper_kernels_disabled_reason(devices.H200) == reason
    assert not runs_a_kernel(called)
