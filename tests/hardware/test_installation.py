"""Whether the installed PyTorch can use a GPU, from facts alone: architectures, versions, the driver's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests import devices

from octavo.hardware import Capabilities
from octavo.hardware.installation import (
    WHEELS,
    Build,
    NvidiaGpu,
    has_code,
    missing_code,
    nvidia_gpu,
    parse_nvidia_smi,
    unused_gpu,
    wheels_for,
)  # fmt: skip

# torch.cuda.get_arch_list() of PyTorch's wheels, from RELEASE.md: CUDA 12.6, 12.8 (2.9 and 2.10), 13.0.
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]

INDEX = "https://download.pytorch.org/whl/"
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
T4 = NvidiaGpu("535.104.05", "Tesla T4", (7, 5))


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (CU126, (6, 1), True),  # GTX 1080 Ti: code for 6.0
        (CU126, (5, 2), True),
        (CU126, (8, 9), True),  # RTX 4090: code for 8.6
        (CU126, (12, 0), False),  # RTX 5090: other major version, no PTX
        (CU126, (3, 5), False),
        (CU128, (6, 0), False),  # Kaggle's P100 with its PyTorch
        (CU128, (7, 0), True),
        (CU128, (7, 5), True),
        (CU130, (7, 0), False),
        (CU130, (7, 2), False),
        (CU130, (8, 7), True),
        (CU130, (12, 1), True),
        (CU130, (13, 0), True),  # by PTX
        (CU130, (11, 0), False),  # PTX of a later capability does not run on an earlier one
        (["sm_80", "compute_90"], (12, 0), True),
        (["sm_90a", "compute_90a"], (9, 0), True),
        (["sm_90a", "compute_90a"], (10, 0), False),
        (["sm_100a", "compute_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        (["gfx942"], (9, 4), False),
        ([], (7, 5), False),
    ],
)
def test_code_runs_on_its_major_version_and_ptx_on_every_later_one(
    architectures: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert has_code(architectures, capability) is runs


@pytest.mark.parametrize(
    ("capability", "driver", "index"),
    [
        ((6, 1), 580, "cu126"), ((6, 0), 535, "cu126"), ((7, 0), 0, "cu126"), ((5, 2), 0, "cu126"),
        ((7, 5), 0, "cu130"), ((7, 5), 580, "cu130"), ((7, 5), 579, "cu126"), ((7, 5), 525, "cu126"),
        ((7, 5), 524, None), ((8, 6), 550, "cu126"), ((9, 0), 595, "cu130"),
        ((12, 0), 570, "cu128"), ((12, 0), 580, "cu130"), ((10, 0), 0, "cu130"),
        ((3, 7), 0, None), (None, 0, "cu130"), (None, 535, "cu126"),
    ],
)  # fmt: skip
def test_the_wheels_for_a_gpu_and_its_driver(
    capability: tuple[int, int] | None, driver: int, index: str | None
) -> None:
    wheels = wheels_for(capability, driver)
    assert (wheels and wheels.index) == index


@pytest.mark.parametrize("device", [devices.P100, devices.GTX_1080_TI, devices.V100])
def test_a_gpu_without_code_is_named_with_the_wheels_that_have_it(device: Capabilities) -> None:
    assert device.compute_capability is not None
    problem = missing_code(
        device.name, device.compute_capability, architectures=CU130, version="2.13.0+cu130", driver="580.95.05"
    )
    major, minor = device.compute_capability
    assert f"{device.name} has compute capability {major}.{minor}" in problem.fault
    assert "PyTorch 2.13.0+cu130" in problem.fault
    assert "7.5, 8.0, 8.6, 9.0, 10.0, 12.0" in problem.fault
    assert f"`pip uninstall -y torch && pip install torch --index-url {INDEX}cu126`" in problem.remedy
    assert "2.14 is the last version" in problem.remedy


def test_a_gpu_older_than_every_wheel_is_given_no_command() -> None:
    problem = missing_code("Tesla K80", (3, 7), architectures=CU126, version="2.11.0+cu126")
    assert "pip" not in problem.remedy
    assert "5.0 or later" in problem.remedy


def test_a_new_gpu_with_a_driver_of_cuda_12_gets_the_wheels_of_cuda_12() -> None:
    problem = missing_code("RTX 5090", (12, 0), architectures=CU126, version="2.14.1+cu126", driver="572.16")
    assert f"{INDEX}cu128`" in problem.remedy


def test_every_generation_has_wheels_with_code_for_it() -> None:
    for device in (
        devices.P100, devices.GTX_1080_TI, devices.V100, devices.T4, devices.RTX_3060, devices.RTX_4090, devices.H200,
        devices.B200, devices.RTX_5090,
    ):  # fmt: skip
        assert device.compute_capability is not None
        wheels = wheels_for(device.compute_capability)
        assert wheels is not None, device.name
        built = {"cu126": CU126, "cu128": CU128, "cu130": CU130}[wheels.index]
        assert has_code(built, device.compute_capability), device.name
    assert {wheels.index for wheels in WHEELS} == {"cu126", "cu128", "cu130"}


def test_an_old_driver_is_reported_with_its_version_and_both_ways_out() -> None:
    problem = unused_gpu(Build("2.13.0+cu130", "13.0", TOO_OLD), T4, None)
    assert problem is not None
    for fact in ("2.13.0+cu130", "580 or newer", "Tesla T4", "535.104.05", "CUDA 12.2"):
        assert fact in problem.fault, fact
    assert f"{INDEX}cu126`" in problem.remedy
    assert "install the NVIDIA driver 580 or newer" in problem.remedy


def test_a_driver_too_old_for_every_wheel_must_be_updated() -> None:
    old = NvidiaGpu("470.82.01", "Tesla T4", (7, 5))
    problem = unused_gpu(Build("2.13.0+cu130", "13.0", TOO_OLD.replace("12020", "11040")), old, None)
    assert problem is not None
    assert "CUDA 11.4" in problem.fault
    assert problem.remedy == "Update the NVIDIA driver to 580 or newer"


def test_an_old_driver_is_found_from_pytorch_alone_and_from_the_driver_alone() -> None:
    by_pytorch = unused_gpu(Build("2.13.0+cu130", "13.0", TOO_OLD), None, None)
    assert by_pytorch is not None
    assert "CUDA 12.2" in by_pytorch.fault
    assert f"{INDEX}cu126`" in by_pytorch.remedy
    by_driver = unused_gpu(Build("2.13.0+cu130", "13.0", "CUDA unknown error"), T4, None)
    assert by_driver is not None
    assert "needs the NVIDIA driver 580 or newer" in by_driver.fault


@pytest.mark.parametrize("capability", [(5, 2), (6, 1), (7, 0)])
def test_a_newer_driver_is_no_advice_if_the_installed_build_has_no_code_for_the_gpu(
    capability: tuple[int, int],
) -> None:
    gpu, build = NvidiaGpu("535.104.05", "old", capability), Build("2.13.0+cu130", "13.0", TOO_OLD)
    problem = unused_gpu(build, gpu, None)
    assert problem is not None
    assert f"{INDEX}cu126`" in problem.remedy
    assert "580" not in problem.remedy
    too_old = unused_gpu(build, replace(gpu, driver="470.82.01"), None)
    assert too_old is not None
    assert "Update the NVIDIA driver to 525 or newer" in too_old.remedy
    assert f"{INDEX}cu126`" in too_old.remedy, "with this driver the installed build runs on no such GPU"
    cu126 = unused_gpu(Build("2.13.0+cu126", "12.6", TOO_OLD), replace(gpu, driver="470.82.01"), None)
    assert cu126 is not None
    assert cu126.remedy == "Update the NVIDIA driver to 525 or newer"


def test_a_build_without_cuda_and_a_driver_too_old_for_every_wheel_need_both() -> None:
    problem = unused_gpu(Build("2.13.0+cpu", ""), NvidiaGpu("470.82.01", "Tesla T4", (7, 5)), None)
    assert problem is not None
    assert "Update the NVIDIA driver to 580 or newer" in problem.remedy
    assert f"{INDEX}cu130`" in problem.remedy


def test_a_build_without_cuda_on_a_machine_with_an_nvidia_gpu_is_reported() -> None:
    problem = unused_gpu(Build("2.13.0+cpu", ""), T4, None)
    assert problem is not None
    assert "2.13.0+cpu is built without CUDA" in problem.fault
    assert "Tesla T4" in problem.fault
    assert f"{INDEX}cu126`" in problem.remedy  # its driver runs CUDA 12


def test_any_other_error_of_cuda_is_quoted() -> None:
    error = "CUDA driver initialization failed, you might not have a CUDA gpu.\nMore lines."
    problem = unused_gpu(Build("2.10.0+cu128", "12.8", error), T4, None)
    assert problem is not None
    assert problem.fault.endswith("CUDA driver initialization failed, you might not have a CUDA gpu")
    assert "--gpus all" in problem.remedy


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_environment_hides_are_no_fault_of_the_installation(hidden: str) -> None:
    problem = unused_gpu(Build("2.13.0+cu130", "13.0", "No CUDA GPUs are available"), T4, hidden)
    assert problem is not None
    assert problem.fault == f"CUDA_VISIBLE_DEVICES={hidden!r} hides the Tesla T4"
    shown = unused_gpu(Build("2.13.0+cpu", ""), T4, "0")
    assert shown is not None
    assert "CUDA_VISIBLE_DEVICES" not in shown.fault


@pytest.mark.parametrize("value", ["-1,0", "7", "none", "NoDevFiles", "GPU-abc", "9" * 5000])
def test_a_value_of_the_environment_that_may_hide_gpus_is_named_where_cuda_does_not_start(value: str) -> None:
    build = Build("2.13.0+cu126", "12.6", "No CUDA GPUs are available")
    problem = unused_gpu(build, T4, value)
    assert problem is not None
    assert f"CUDA_VISIBLE_DEVICES={value[:20]}" in problem.remedy.replace("'", "")
    assert len(problem.remedy) < 500
    without = unused_gpu(build, T4, None)
    assert without is not None
    assert "CUDA_VISIBLE_DEVICES" not in without.remedy


def test_a_machine_without_an_nvidia_gpu_has_no_problem() -> None:
    no_driver = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
    assert unused_gpu(Build("2.13.0+cu130", "13.0", no_driver), None, None) is None
    assert unused_gpu(Build("2.13.0+cpu", ""), None, "") is None


def test_nvidia_smi_answers_are_read() -> None:
    assert parse_nvidia_smi("Tesla T4, 7.5, 535.104.05\nTesla T4, 7.5, 535.104.05\n") == T4
    assert parse_nvidia_smi("Tesla T4, [N/A], 470.82\n") == NvidiaGpu("470.82", "Tesla T4", None)
    several = "Quadro K600, [N/A], 535.1\nTesla P100, 6.0, 535.1\nTesla T4, 7.5, 535.1\nTesla V100, 7.0, 535.1\n"
    assert parse_nvidia_smi(several) == NvidiaGpu("535.1", "Tesla T4", (7, 5))
    digits = "9" * 5000
    long = parse_nvidia_smi(f"{'T4 ' * 10_000}, {digits}.{digits}, 535.{digits}\n")
    assert long is not None
    assert len(long.name) < 300
    assert len(long.driver) < 100
    assert parse_nvidia_smi(f"T4, 7.5, {digits}\n") is None
    for answer in ("", "No devices were found\n", "NVIDIA-SMI has failed, it could not, communicate\n"):
        assert parse_nvidia_smi(answer) is None


@pytest.mark.parametrize(
    ("line", "driver"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)", "580.95.05"),
    ],
)
def test_the_driver_of_linux_is_found_without_nvidia_smi(
    line: str, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    version = tmp_path / "version"
    version.write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.3.0\n", encoding="utf-8")
    assert nvidia_gpu(version) == NvidiaGpu(driver)
    assert nvidia_gpu(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'Tesla T4, 7.5, 535.104.05'", T4),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", None),
        ("echo 'Tesla T4, 7.5, 535.104.05'; exit 9", None),
        (r"printf 'Tesla T4\377, 7.5, 535.104.05\n'", replace(T4, name="Tesla T4\ufffd")),
    ],
)
def test_nvidia_smi_is_asked_and_its_failure_is_not_an_error(
    script: str, expected: NvidiaGpu | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert nvidia_gpu(tmp_path / "absent") == expected
