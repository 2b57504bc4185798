"""Runs on a GPU as if it were an older or a smaller one, for tests of what octavo chooses there.

The GPU that is there keeps its speed, and its compiler makes other instructions. The types, the kernels with their
tiles, the implementation of attention and the memory are those of the other GPU, since each is a function of
`Capabilities`. A GPU with types or instructions that the one that is there lacks cannot be had.
"""

from __future__ import annotations

from typing import NamedTuple

from octavo.errors import UsageError
from octavo.failures import cut
from octavo.hardware.capabilities import (
    AMPERE,
    NVIDIA,
    Capabilities,
    actual_capabilities,
    replace_capabilities_,
    restore_capabilities_,
)
from octavo.hardware.gpu_names import gpu_named, other_sizes
from octavo.hardware.gpus import GPUS
from octavo.hardware.memory import PRETENDED, limit_memory_, remove_memory_limits_
from octavo.hardware.selection import Hardware, hardware_for
from octavo.system import quoted

# KiB of shared memory that a program may use, by compute capability. Source: CUDA C++ Programming Guide, section
# "Features and Technical Specifications".
SHARED_KIB = {
    (6, 0): 48, (6, 1): 48, (7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227,
    (12, 0): 99,
}  # fmt: skip


class Model(NamedTuple):
    """A GPU: its name by the driver, compute capability, streaming multiprocessors, and GiB for PyTorch.

    These GiB are what PyTorch reports as the total memory (14.56 on a T4, 15.89 on a P100, 10.91 on a GTX 1080 Ti, by
    its messages in public issues) less 0.5 for CUDA's context and libraries, and less what a display takes of a GPU for
    desktops.
    """

    name: str
    compute_capability: tuple[int, int]
    processors: int
    memory_gib: float


MODELS = {
    "T4": Model("Tesla T4", (7, 5), 40, 14.06),
    "P100": Model("Tesla P100-PCIE-16GB", (6, 0), 56, 15.0),
    "1080Ti": Model("NVIDIA GeForce GTX 1080 Ti", (6, 1), 28, 10.3),
    "RTX5000": Model("Quadro RTX 5000", (7, 5), 48, 15.0),
    "A6000": Model("NVIDIA RTX A6000", (8, 6), 84, 46.9),
    "3060": Model("NVIDIA GeForce RTX 3060", (8, 6), 28, 11.2),
    "4090": Model("NVIDIA GeForce RTX 4090", (8, 9), 128, 23.0),
    "5090": Model("NVIDIA GeForce RTX 5090", (12, 0), 170, 30.8),
}


def capabilities_like(name: str) -> Capabilities:
    """The capabilities of a GPU of MODELS, named as for `octavo plan --gpu`. UsageError for another one.

    A GPU that is also sold with another memory size has that size if the name does: 4 GiB less for "RTX 3060 8GB".
    """
    asked, model = gpu_named(name), _model(name)
    if model is None:
        raise UsageError(f"--pretend does not have the GPU {cut(name)!r}.", hint=_instead(asked))
    usual, memory_gib, title = gpu_named(model.name), model.memory_gib, model.name
    if asked is not None and usual is not None and asked != usual:
        memory_gib += (GPUS[asked].memory_gib or 0) - (GPUS[usual].memory_gib or 0)
        title += asked.removeprefix(usual)
    half = {"float16", "bfloat16"} if model.compute_capability >= AMPERE else {"float16"}
    return Capabilities(
        NVIDIA, title, frozenset({"float32", *half}), compute_capability=model.compute_capability,
        memory_bytes=int(memory_gib * 2**30), processors=model.processors,
        shared_memory_bytes=SHARED_KIB[model.compute_capability] * 2**10,
    )  # fmt: skip


def _model(name: str) -> Model | None:
    """The GPU of MODELS with this name, or with this name and another memory size."""
    asked = gpu_named(name)
    for model in MODELS.values():
        usual = gpu_named(model.name)
        if asked is not None and usual is not None and asked in (usual, *other_sizes(usual)):
            return model
    return None


def _instead(asked: str | None) -> str:
    """What to do in place of pretending the GPU `asked` of GPUS: a GPU of MODELS with its compute capability."""
    choices = f"Choose {', '.join(MODELS)}."
    if asked is None:
        return choices
    plan = f" `octavo plan {quoted(['--gpu', asked])}` has its memory and times."
    capability, usable = GPUS[asked].compute_capability, GPUS[asked].usable_bytes
    alike = [key for key, model in MODELS.items() if model.compute_capability == capability]
    large = [key for key in alike if usable is not None and usable <= MODELS[key].memory_gib * 2**30]
    if not large or usable is None:
        return choices + plan
    limit = f"{usable / 2**30:.1f}GiB"
    like = min(large, key=lambda key: MODELS[key].memory_gib)
    return f"{choices} The types and kernels of the {asked} are those of --pretend {like} --gpu-memory {limit}.{plan}"


def pretend_(name: str, here: Hardware, dtype: str = "auto") -> Hardware:
    """From now on the device of `here` has the capabilities and the memory of the GPU `name`, in this process.

    Returns its hardware, with `dtype` as in `pick`. UsageError without an NVIDIA GPU with as much memory and with its
    types and instructions, and for a dtype that the GPU `name` does not have; then nothing is changed.
    """
    wanted, real = capabilities_like(name), actual_capabilities(here.device)
    if real.compute_capability is None:
        raise UsageError(
            f"--pretend {quoted([name])} needs an NVIDIA GPU that runs in place of it; this is {real.name}.",
            hint=f"`octavo plan {quoted(['--gpu', name])}` needs no GPU.",
        )
    if lacking := _lacking(wanted, real):
        raise UsageError(
            f"--pretend {quoted([name])} needs what the {real.name} lacks: {', '.join(lacking)}.",
            hint=f"`octavo plan {quoted(['--gpu', name])}` needs no GPU.",
        )
    if real.memory_bytes < wanted.memory_bytes:
        gib = [f"{each.memory_bytes / 2**30:.1f} GiB" for each in (wanted, real)]
        raise UsageError(
            f"--pretend {quoted([name])} needs {gib[0]} of GPU memory; {real.name} has {gib[1]}.",
            hint=f"`octavo plan {quoted(['--gpu', name])}` needs no GPU.",
        )
    pretended = hardware_for(here.device, wanted, dtype)
    replace_capabilities_(here.device, wanted)
    limit_memory_(here.device, wanted.memory_bytes, reason=PRETENDED)
    return pretended


def _lacking(wanted: Capabilities, real: Capabilities) -> list[str]:
    """The types and instructions that choices for `wanted` may use, and that the GPU that is there does not have."""
    needed = {
        "Triton": (wanted.triton, real.triton),
        "Triton's dots": (wanted.triton_dots, real.triton_dots),
        "8-bit matmuls": (wanted.matmul_8bit, real.matmul_8bit),
        "fp8": (wanted.fp8, real.fp8),
        "TMA": (wanted.tma, real.tma),
    }
    return [*sorted(wanted.dtypes - real.dtypes), *(what for what, (needs, has) in needed.items() if needs and not has)]


def restore_() -> None:
    """Ends `pretend_` and removes the limits of memory, so that a call in Python has its own settings alone."""
    restore_capabilities_()
    remove_memory_limits_()


def notice(name: str, here: Hardware, pretended: Hardware) -> str:
    """What `pretend_` has changed, for people."""
    return (
        f"--pretend {quoted([name])}: {here.name} runs with the types, kernels, attention and memory "
        f"({pretended.capabilities.memory_bytes / 2**30:.1f} GiB) of the {pretended.name}. Speeds are those of "
        f"{here.name}, but the time of the plan is that of the {pretended.name}. --gpu-memory sets less memory."
    )
