"""Why the installed PyTorch cannot use the NVIDIA GPU of this machine, and which of PyTorch's wheels can.

The decisions are functions of facts (`Build`, `NvidiaGpu`, a compute capability), so that tests need no GPU. Facts of
the wheels: "PyTorch CUDA Support Matrix" in PyTorch's RELEASE.md, releases 2.8 to 2.14; PyTorch announced that 2.15 has
no CUDA 12.6 (github.com/pytorch/pytorch/issues/190385). Facts of the drivers: table 1 of NVIDIA's "CUDA Compatibility,
Minor Version Compatibility".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.failures import cut

Capability = tuple[int, int]

DRIVER_FOR = {13: 580, 12: 525, 11: 450}  # major version of CUDA -> lowest major version of the NVIDIA driver
NVIDIA_SMI_SECONDS = 10  # it takes up to some seconds on a machine that was idle
_HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES with which CUDA reports no GPU
_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([af]?)")
_TOO_OLD = re.compile(r"driver on your system is too old \(found version (\d{1,9})\)")
_VERSION_CHARACTERS = 40  # of a driver's version that are shown


@dataclass(frozen=True)
class Wheels:
    """PyTorch's wheels for one CUDA version.

    `index`: their folder on download.pytorch.org/whl. They have code for compute capabilities from `lowest` to below
    `end`, and need an NVIDIA driver of at least the major version `driver`. `last`: the last version of PyTorch that
    has them, "" if the current one does.
    """

    index: str
    cuda: str
    lowest: Capability
    end: Capability
    driver: int
    last: str = ""

    @property
    def title(self) -> str:
        last = f" (PyTorch {self.last} is the last version with it)" if self.last else ""
        return f"PyTorch's CUDA {self.cuda} build{last}"

    @property
    def command(self) -> str:
        """Installs them. pip keeps an installed torch of another build, so that must be removed first."""
        return f"pip uninstall -y torch && pip install torch --index-url https://download.pytorch.org/whl/{self.index}"


NEWEST: Capability = (99, 0)
WHEELS = (  # preferred ones first
    Wheels("cu130", "13.0", (7, 5), NEWEST, 580),
    Wheels("cu126", "12.6", (5, 0), (10, 0), 525, last="2.14"),
    Wheels("cu128", "12.8", (7, 5), NEWEST, 525, last="2.11"),
)


@dataclass(frozen=True)
class Build:
    """The installed PyTorch: its version ("2.13.0+cu130"), its CUDA version ("13.0"; "" without CUDA), and the error
    with which CUDA does not start ("" if it starts)."""

    version: str
    cuda: str
    error: str = ""


@dataclass(frozen=True)
class NvidiaGpu:
    """An NVIDIA GPU as its driver reports it without PyTorch. `driver` is a version ("535.104.05"), "" if unknown.

    `name` is "" and `capability` None where nvidia-smi does not answer.
    """

    driver: str = ""
    name: str = ""
    capability: Capability | None = None

    @property
    def title(self) -> str:
        return self.name or "NVIDIA GPU"


@dataclass(frozen=True)
class Problem:
    """Why a GPU is not used, and what to do. Both without a full stop."""

    fault: str
    remedy: str


def has_code(architectures: Sequence[str], capability: Capability) -> bool:
    """Whether a build with these architectures (`torch.cuda.get_arch_list()`) runs on a GPU of this capability.

    Machine code ("sm_86") runs on its own and on later capabilities of the same major version. PTX ("compute_90") is
    compiled by the driver for every later one. With the suffix "a" both run on one capability alone, with "f" on those
    of one major version. Source: NVIDIA, CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility".
    """
    for kind, major, minor, suffix in map(_parsed, architectures):
        built = (major, minor)
        same_major = major == capability[0] and built <= capability
        if built == capability or (suffix != "a" and same_major):
            return True
        if kind == "compute" and not suffix and built <= capability:
            return True
    return False


def wheels_for(capability: Capability | None, driver: int = 0) -> Wheels | None:
    """The preferred wheels with code for this capability that run with this major version of the driver.

    An unknown capability is taken as 7.5, an unknown driver (0) as the newest. None: there are none.
    """
    capability = capability or (7, 5)
    for wheels in WHEELS:
        if wheels.lowest <= capability < wheels.end and (not driver or driver >= wheels.driver):
            return wheels
    return None


def missing_code(
    name: str, capability: Capability, *, architectures: Sequence[str], version: str, driver: str = ""
) -> Problem:
    """The problem of a GPU for which PyTorch `version`, built for `architectures`, has no code."""
    listed = ", ".join(dict.fromkeys(f"{major}.{minor}" for _, major, minor, _ in map(_parsed, architectures)))
    fault = (
        f"{name} has compute capability {_dotted(capability)}, for which the installed PyTorch {version} has no code; "
        f"it has code for {listed}"
    )
    return Problem(fault, _remedy(capability, _major(driver)))


def unused_gpu(build: Build, gpu: NvidiaGpu | None, visible: str | None) -> Problem | None:
    """Why PyTorch finds no GPU although the machine has one; None if there is no sign of one.

    `visible` is the environment variable CUDA_VISIBLE_DEVICES, None if it is not set.
    """
    found = _TOO_OLD.search(build.error)  # CUDA's version times 1000: 12020 is 12.2
    if gpu is None and found is None:
        return None
    gpu = gpu or NvidiaGpu()
    if visible is not None and visible.strip() in _HIDDEN:
        return Problem(f"CUDA_VISIBLE_DEVICES={cut(visible)!r} hides the {gpu.title}", "Unset CUDA_VISIBLE_DEVICES")
    driver = _major(gpu.driver)
    if not build.cuda:
        fault = f"PyTorch {build.version} is built without CUDA and cannot use the {gpu.title}"
        return Problem(fault, _remedy(gpu.capability, driver))
    if found:
        driver = driver or DRIVER_FOR.get(int(found[1]) // 1000, 1)
    needed = DRIVER_FOR.get(_major(build.cuda), 0)
    if found or 0 < driver < needed:
        has = f"the {gpu.title} has driver {gpu.driver}" if gpu.driver else f"that of the {gpu.title} is older"
        supports = f" (CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10})" if found else ""
        newer = f"the NVIDIA driver {needed} or newer" if needed else "a newer NVIDIA driver"
        fault = f"PyTorch {build.version} needs {newer}, but {has}{supports}"
        remedy = _remedy(gpu.capability, driver)
        if not _wheels_have_code(build.cuda, gpu.capability):
            return Problem(fault, remedy)
        if wheels_for(gpu.capability, driver) is None:
            return Problem(fault, f"Update the NVIDIA driver to {needed} or newer")
        return Problem(fault, f"{remedy}, or install {newer}")
    fault = f"PyTorch {build.version} cannot start CUDA on the {gpu.title} (driver {gpu.driver})"
    reason = cut(next(iter(build.error.strip().splitlines()), "").rstrip("."))
    remedy = "Restart the machine if its driver was updated; start a container with its GPUs (docker run --gpus all)"
    if visible is not None:
        unset = f"Unset CUDA_VISIBLE_DEVICES={cut(visible)!r} if its first entry is not the number or UUID of a GPU"
        remedy = f"{unset}; r{remedy[1:]}"
    return Problem(f"{fault}: {reason}" if reason else fault, remedy)


def installed_build() -> Build:
    """The installed PyTorch, where `torch.cuda.is_available()` is False."""
    import torch

    cuda = getattr(torch.version, "cuda", None) or ""
    if not cuda:
        return Build(torch.__version__, "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error has the same text
            torch.cuda.init()
    except Exception as error:  # of any kind: it is the reason that is reported
        return Build(torch.__version__, cuda, str(error))
    return Build(torch.__version__, cuda)


def nvidia_gpu(driver_file: Path = Path("/proc/driver/nvidia/version")) -> NvidiaGpu | None:
    """The NVIDIA GPU of the highest compute capability, from nvidia-smi or the file of its driver on Linux.

    None if there is no sign of one.
    """
    if (program := shutil.which("nvidia-smi")) is not None:
        query = [program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(
                query, capture_output=True, encoding="utf-8", errors="replace", timeout=NVIDIA_SMI_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            answer = None
        if answer is not None and answer.returncode == 0 and (gpu := parse_nvidia_smi(answer.stdout)) is not None:
            return gpu
    try:
        text = driver_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", text)  # "for x86_64" precedes the version of open modules
    return NvidiaGpu(cut(found[1], _VERSION_CHARACTERS)) if found else None


def parse_nvidia_smi(answer: str) -> NvidiaGpu | None:
    """The GPU of the highest compute capability in nvidia-smi's lines "name, compute capability, driver version".

    The others may be too old for PyTorch, as one for a display. Of several equal ones it is the first.
    """
    gpus = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3 and _major(fields[2]):
            numbers = re.fullmatch(r"(\d{1,3})\.(\d{1,3})", fields[1])
            capability = (int(numbers[1]), int(numbers[2])) if numbers else None
            gpus.append(NvidiaGpu(cut(fields[2], _VERSION_CHARACTERS), cut(fields[0]), capability))
    return max(gpus, key=lambda gpu: gpu.capability or (0, 0), default=None)


def visible_devices() -> str | None:
    """The environment variable CUDA_VISIBLE_DEVICES."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def _remedy(capability: Capability | None, driver: int) -> str:
    """How to get a PyTorch that uses a GPU of this capability with this major version of the driver (0: unknown)."""
    if (wheels := wheels_for(capability, driver)) is not None:
        return f"Install {wheels.title}: `{wheels.command}`"
    if (newer := wheels_for(capability)) is not None:
        return f"Update the NVIDIA driver to {newer.driver} or newer, then install {newer.title}: `{newer.command}`"
    lowest = min(wheels.lowest for wheels in WHEELS)
    return f"Use a GPU of compute capability {_dotted(lowest)} or later, the lowest of PyTorch's builds"


def _wheels_have_code(cuda: str, capability: Capability | None) -> bool:
    """Whether wheels of this CUDA version have code for a GPU of this capability. A version that is not in WHEELS has
    that of the same major version, one without such wheels is taken to have it."""
    built = [wheels for wheels in WHEELS if wheels.cuda == cuda]
    built = built or [wheels for wheels in WHEELS if _major(wheels.cuda) == _major(cuda)]
    return not built or any(wheels.lowest <= (capability or (7, 5)) < wheels.end for wheels in built)


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def _parsed(architecture: str) -> tuple[str, int, int, str]:
    """(sm or compute, major, minor, suffix); zeros for an architecture of another vendor."""
    found = _ARCHITECTURE.fullmatch(architecture)
    return (found[1], int(found[2]), int(found[3]), found[4]) if found else ("", 0, 0, "")


def _major(version: str) -> int:
    found = re.match(r"\d{1,6}(?!\d)", version)
    return int(found[0]) if found else 0
