"""Measures one row in this process: load, compare with the reference (optional), warm up, time steps, read memory.

finetune.py starts a process for each row, which calls `run_one`. Importing this module does not import torch.
"""

from __future__ import annotations

import gc
import json
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from peers import Trainable

GIB = 2**30
# Minimum cosine between a method's gradient and the float32 reference's: (all adapters as one vector, any one adapter).
# A row below either has a note. One adapter may have less with 8-bit matmuls, since LLM.int8() has 0.9895 on GPT-J.
# NF4 weights have an error of 9 %; on the tiny model the minimum over the adapters is 0.96.
MIN_COSINES = {"nf4": (0.9, 0.9), "nf4-8bit": (0.9, 0.9), "int8-8bit": (0.99, 0.98)}
MIN_COSINES_DEFAULT = (0.99, 0.99)
REFERENCE = "reference"  # in float32 with the original weights; reference-int8: with int8's dequantized weights
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Setting:
    """One row to measure.

    `reference`: file of loss and gradients; a reference writes it, the other methods are compared with it. `original`:
    that of the weights before quantization, with which a reference of dequantized weights is compared. `pretend`: the
    GPU whose types, kernels, attention and memory are used (hardware/pretend.py).
    """

    method: str
    model: str = "gptj"
    batch: int = 1
    seq_len: int = 2048
    cap_gib: float | None = None
    steps: int = 6
    warmup: int = 3
    tiny: bool = False
    seed: int = 0
    reference: str | None = None
    original: str | None = None
    pretend: str | None = None

    @property
    def is_reference(self) -> bool:
        return self.method.startswith(REFERENCE)

    @property
    def command(self) -> str:
        """The command that measures this row again."""
        parts = ["python", "benchmarks/finetune.py", "--model", self.model, "--rows", self.method]
        parts += ["--batch", str(self.batch), "--seq-len", str(self.seq_len)]
        parts += ["--steps", str(self.steps), "--warmup", str(self.warmup)]
        parts += ["--cap-gib", str(self.cap_gib)] if self.cap_gib else []
        parts += ["--seed", str(self.seed)] if self.seed else []
        parts += ["--pretend", self.pretend] if self.pretend else []
        if self.reference:
            parts += ["--gate", "dequantized" if self.original else "original"]
        return shlex.join(parts) + (" --tiny" if self.tiny else "")


def run_one(row: Setting, *, wait: bool) -> None:
    """Measures a row and prints it as one JSON line, also on errors. `wait`: start after a line on stdin."""
    import torch  # noqa: F401

    if not row.method.startswith("unsloth"):  # Unsloth patches transformers at its import, which uses the GPU
        from transformers.models.gptj import modeling_gptj  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

    if wait and not sys.stdin.readline():  # another row uses the GPU until then; the imports above do not
        return
    result = measured(row)
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()


def measured(row: Setting) -> dict[str, Any]:
    """The row with table.COLUMNS. After an error the note has its message and later columns are empty."""
    result = blank(row)
    try:
        _measure_(row, result)
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        out_of_memory = "out of memory" in str(error).lower() or "ALLOC_FAILED" in str(error)
        note = f"out of memory at {row.cap_gib:g} GiB" if row.cap_gib else "out of memory"
        add_note_(result, note if out_of_memory else f"{type(error).__name__}: {first_line}"[:300])
    return result


def blank(row: Setting) -> dict[str, Any]:
    """A row before its measurement: setting, versions, date and command."""
    setting = {
        name: getattr(row, name) for name in ("method", "model", "batch", "seq_len", "cap_gib", "steps", "warmup")
    }
    versions = {name: version_of(name) for name in PACKAGES}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**dict.fromkeys(table.COLUMNS), "date": now, **setting, **versions, "command": row.command, "note": ""}


def version_of(package: str) -> str:
    """The installed version, "" without one; imports nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def add_note_(result: dict[str, Any], note: str) -> None:
    """Appends to the note of a row."""
    result["note"] = f"{result['note']}; {note}" if result["note"] else note


def _measure_(row: Setting, result: dict[str, Any]) -> None:
    import torch

    from octavo.hardware import limit_memory_
    from shapes import batch_ids

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    result.update(gpu=device_name(device), octavo=import_module("octavo").__version__)
    if row.pretend and not row.is_reference:
        result["gpu"] += f" restricted to {_restrict_(row.pretend)}"
    if device.type == "cuda" and row.cap_gib:
        limit_memory_(device, int(row.cap_gib * GIB))
    trainable = _build(row, device, result)
    result["trainable_parameters"] = trainable.trainable_parameters
    load_reserved = reserved_gib(device)
    ids = [
        batch_ids(row.model, row.batch, row.seq_len, seed=row.seed + n, device=device, tiny=row.tiny)
        for n in range(max(1, row.warmup + row.steps))
    ]
    if row.reference:
        _gate_(row, result, trainable, ids[0])
    reset_peaks(device)
    if row.steps:
        losses, seconds = timed(trainable, ids, row.warmup, device)
        speeds = sorted(row.batch * row.seq_len / s for s in seconds)
        result["tokens_per_second"] = round(statistics.median(speeds), 1)
        result.update(p10=round(quantile(speeds, 0.1), 1), p90=round(quantile(speeds, 0.9), 1))
        result["first_loss"] = round(losses[0], 6)
        if row.method.startswith("octavo"):
            add_note_(result, import_module("octavo_method").flops_note(row, result["tokens_per_second"]))
        if not all(abs(loss) < float("inf") for loss in losses):
            add_note_(result, "a loss is not finite")
    result.update(memory(device, load_reserved))


def _restrict_(gpu: str) -> str:
    """The types, kernels, attention and memory of a GPU from now on, for peers too; its name."""
    import torch

    from octavo.hardware import capabilities_of, pick, pretend_

    hardware = pretend_(gpu, pick())
    if not capabilities_of(hardware.device).flash_attention:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return hardware.name


def _build(row: Setting, device: torch.device, result: dict[str, Any]) -> Trainable:
    """Loads the method of a row from octavo_method.py, unsloth_method.py or peers.py, by the prefix of its name."""
    import torch

    from octavo.hardware import capabilities_of, memory_limit_bytes

    if row.method.startswith("octavo"):
        ours = import_module("octavo_method")
        result["scheme"] = row.method.removeprefix("octavo").strip("-")
        cap = memory_limit_bytes(device)
        options = {"device": device, "tiny": row.tiny, "batch": row.batch, "seq_len": row.seq_len, "cap_bytes": cap}
        trainable = ours.build(row.method, row.model, seed=row.seed, **options)
        add_note_(result, f"forecast {trainable.plan.peak_bytes / GIB:.3f} GiB")
        octavo: Trainable = trainable
        return octavo
    if row.method.startswith("unsloth"):
        theirs = import_module("unsloth_method")
        result["scheme"] = theirs.scheme_of(row.method)
        if row.seq_len > theirs.MAX_SEQ_LEN:
            raise ValueError(f"rows of {row.seq_len} tokens: unsloth_method.py supports {theirs.MAX_SEQ_LEN}")
        add_note_(result, theirs.versions())
        peer: Trainable = theirs.build(row.method, row.model, seed=row.seed, device=device, tiny=row.tiny)
        return peer
    import peers

    result["scheme"] = peers.scheme_of(row.method)
    old = device.type == "cuda" and "bfloat16" not in capabilities_of(device).dtypes
    half = torch.float16 if old else torch.bfloat16
    return peers.build(row.method, row.model, seed=row.seed, device=device, tiny=row.tiny, half=half)


def timed(
    trainable: Trainable, ids: Sequence[Tensor], warmup: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """(losses of all steps, seconds of each step after `warmup`, from the end of the previous step to its end)."""
    import torch

    losses = [trainable.step(batch) for batch in ids[:warmup]]
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for batch in ids[warmup:]:
            losses.append(trainable.step(batch))
            marks.append(time.perf_counter())
        return [float(loss) for loss in losses], [b - a for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(ids) - warmup + 1)]
    events[0].record()
    for batch, event in zip(ids[warmup:], events[1:], strict=True):
        losses.append(trainable.step(batch))
        event.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]
    return [float(loss) for loss in losses], seconds


def quantile(values: Sequence[float], q: float) -> float:
    """The quantile q of sorted values, with linear interpolation."""
    index = q * (len(values) - 1)
    low = int(index)
    high = min(low + 1, len(values) - 1)
    return values[low] + (index - low) * (values[high] - values[low])


# The gate: loss and gradients against the float32 reference.


def _gate_(row: Setting, result: dict[str, Any], trainable: Trainable, ids: Tensor) -> None:
    """Writes the reference's loss and gradients, or compares with them; adds a note if they differ too much.

    The file of dequantized weights has their difference from the original weights, which is noted for every row.
    """
    import torch

    assert row.reference
    file = Path(row.reference)
    loss, gradients = trainable.gradients(ids)
    result["first_loss"] = round(float(loss), 6)
    if row.is_reference:
        saved: dict[str, Any] = {name: gradient.float().cpu() for name, gradient in gradients.items()}
        difference = ""
        if row.original:
            original = torch.load(row.original, weights_only=True)
            cosine = compare_gradients(original["gradients"], saved)["cosine"]
            difference = f"quantization alone: cosine {cosine:.5f}, loss {float(loss) / original['loss'] - 1:+.2e}"
            add_note_(result, difference)
        torch.save({"loss": float(loss), "gradients": saved, "difference": difference}, file)
        return
    if not file.is_file():
        add_note_(result, "the reference failed: not compared")
        return
    reference = torch.load(file, weights_only=True)
    comparison = compare_gradients(reference["gradients"], gradients)
    result["loss_gap"] = round(float(loss) / reference["loss"] - 1, 6)
    if reference["difference"]:
        add_note_(result, reference["difference"])
    note_gradients_(result, comparison)


def note_gradients_(result: dict[str, Any], comparison: Mapping[str, Any]) -> None:
    """Writes the result of `compare_gradients` into a row."""
    result.update({name: round(comparison[name], 5) for name in ("cosine", "cosine_min", "cosine_median")})
    if comparison["missing"]:
        add_note_(result, f"{len(comparison['missing'])} adapters without a gradient, as {comparison['missing'][0]}")
    all_min, adapter_min = MIN_COSINES.get(str(result["scheme"]).removesuffix("-no-offload"), MIN_COSINES_DEFAULT)
    if comparison["cosine"] < all_min:
        add_note_(result, f"gradient cosine {comparison['cosine']:.3f}")
    if comparison["cosine_min"] < adapter_min:
        add_note_(result, f"gradient cosine {comparison['cosine_min']:.3f} at {comparison['worst']}")


def compare_gradients(reference: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compares gradients with the reference's, as one vector and by adapter; keys are names of PEFT's adapter file.

    cosine: of all adapters as one vector; cosine_min, cosine_median: over the adapters; worst: name of the minimum;
    ratio_min, ratio_max: norms, ours / reference. missing: names that `ours` lacks or whose gradient is zero, not
    finite or of another shape; each has cosine 0 and counts as zeros in `cosine`. Names only in `ours` are ignored.
    """
    cosines: dict[str, float] = {}
    ratios: list[float] = []
    missing = []
    dot_product = ours_squared = theirs_squared = 0.0
    for name, theirs in reference.items():
        expected = theirs.detach().cpu().flatten().double()
        gradient = ours.get(name)
        if gradient is None or gradient.shape != theirs.shape:
            gradient = expected.new_zeros(1)
        actual = gradient.detach().cpu().flatten().double()
        norm, expected_norm = float(actual.norm()), float(expected.norm())
        theirs_squared += expected_norm**2
        if not 0 < norm < float("inf") or expected_norm == 0:
            missing.append(name)
            cosines[name] = 0.0
            continue
        dot = float(actual @ expected)
        dot_product, ours_squared = dot_product + dot, ours_squared + norm**2
        cosines[name] = dot / (norm * expected_norm)
        ratios.append(norm / expected_norm)
    worst = min(cosines, key=lambda name: cosines[name])
    return {
        "cosine": dot_product / (ours_squared * theirs_squared) ** 0.5 if dot_product else 0.0,
        "cosine_min": cosines[worst],
        "cosine_median": statistics.median(cosines.values()),
        "worst": worst,
        "ratio_min": min(ratios, default=0.0),
        "ratio_max": max(ratios, default=0.0),
        "missing": missing,
    }


# The device and its memory. On a CPU the three memory columns are the peak RAM of the process.


def device_name(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    import torch

    from octavo.hardware import read_cpu

    return torch.cuda.get_device_name(device) if device.type == "cuda" else read_cpu()[0]


def reserved_gib(device: torch.device) -> float:
    """Peak of the memory that PyTorch reserved since the last reset."""
    from octavo.hardware import peak_memory_bytes

    return peak_memory_bytes(device) / GIB


def reset_peaks(device: torch.device) -> None:
    """Resets the peaks. Empties the allocator's cache first, since cached blocks of loading count as reserved."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device, load_reserved: float) -> dict[str, float | None]:
    """Peak memory of training in GiB; load_reserved_gib is the peak of loading and training.

    device_used_gib: memory in use on the GPU at the end, from the driver, with CUDA's context.
    pinned_gib: peak of page-locked CPU memory.
    """
    import torch

    train_reserved = reserved_gib(device)
    columns: dict[str, float | None] = {
        "peak_allocated_gib": round(train_reserved, 3),
        "peak_reserved_gib": round(train_reserved, 3),
        "load_reserved_gib": round(max(load_reserved, train_reserved), 3),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        columns["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        columns["device_used_gib"] = round((total - free) / GIB, 3)
        columns["pinned_gib"] = pinned_gib()
    return columns


def pinned_gib() -> float | None:
    """Peak of page-locked CPU memory that PyTorch allocated; None if this version does not count it."""
    import torch

    try:
        peak = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
    except (AttributeError, RuntimeError):
        return None
    return round(peak / GIB, 3) if peak is not None else None
