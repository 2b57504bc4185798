"""One row of the benchmark in this process: load, compare with the reference if asked, warm up, time, read memory.

finetune.py starts a process for each row, which ends in `run_one`. Importing this loads no torch.
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
# Cosine of the gradient with the float32 reference's: of all adapters as one vector, and of any of them alone. A row
# below either says so. In 8 bits an adapter alone may be a little further off, as LLM.int8() is (0.9895 on GPT-J).
# NF4's weights are 9 % off; on the tiny model the least cosine of an adapter is 0.96.
FLOORS = {"nf4": (0.9, 0.9), "nf4-8bit": (0.9, 0.9), "int8-8bit": (0.99, 0.98)}
FLOORS_ELSE = (0.99, 0.99)
REFERENCE = "reference"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Setting:
    """One row to measure. `reference`: a file that the way of this name writes and that others compare with."""

    way: str
    model: str = "gptj"
    batch: int = 1
    seq_len: int = 2048
    cap_gib: float | None = None
    steps: int = 6
    warmup: int = 3
    tiny: bool = False
    seed: int = 0
    reference: str | None = None

    @property
    def command(self) -> str:
        """The command that measures this row again."""
        parts = ["python", "benchmarks/finetune.py", "--model", self.model, "--rows", self.way]
        parts += ["--batch", self.batch, "--seq-len", self.seq_len, "--steps", self.steps, "--warmup", self.warmup]
        parts += ["--cap-gib", self.cap_gib] if self.cap_gib else []
        parts += ["--seed", self.seed] if self.seed else []
        return shlex.join(map(str, parts)) + (" --gate" if self.reference else "") + (" --tiny" if self.tiny else "")


def run_one(row: Setting, *, wait: bool) -> None:
    """Measures a row and prints it as one JSON line, whatever happens. `wait`: once a line comes on stdin."""
    import torch  # noqa: F401

    if not row.way.startswith("unsloth"):  # it replaces parts of transformers: it comes first, and asks for the card
        from transformers.models.gptj import modeling_gptj  # noqa: F401
        from transformers.models.llama import modeling_llama  # noqa: F401

    if wait and not sys.stdin.readline():  # the GPU is another row's until then: the imports do not touch it
        return
    result = measured(row)
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()


def measured(row: Setting) -> dict[str, Any]:
    """The row under table.COLUMNS. What went wrong is its note, and what was known by then is kept."""
    result = blank(row)
    try:
        _measure_(row, result)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        full = "out of memory" in str(error).lower() or "ALLOC_FAILED" in str(error)
        note = f"out of memory at {row.cap_gib:g} GiB" if row.cap_gib else "out of memory"
        add_note_(result, note if full else f"{type(error).__name__}: {first}"[:300])
    return result


def blank(row: Setting) -> dict[str, Any]:
    """A row with what is known before it is measured."""
    known = {name: getattr(row, name) for name in ("way", "model", "batch", "seq_len", "cap_gib", "steps", "warmup")}
    versions = {name: version_of(name) for name in PACKAGES}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {**dict.fromkeys(table.COLUMNS), "date": now, **known, **versions, "command": row.command, "note": ""}


def version_of(package: str) -> str:
    """The installed version, "" if there is none; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def add_note_(result: dict[str, Any], note: str) -> None:
    """One more remark in a row."""
    result["note"] = f"{result['note']}; {note}" if result["note"] else note


def _measure_(row: Setting, result: dict[str, Any]) -> None:
    import torch

    from shapes import batch_ids

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result.update(card=card_of(device), octavo=import_module("octavo").__version__)
    if device.type == "cuda" and row.cap_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, row.cap_gib * GIB / total), torch.cuda.current_device())
    way = _built(row, device, result)
    result["trainable_parameters"] = way.trainable_parameters
    load_reserved = reserved_gib(device)
    ids = [
        batch_ids(row.model, row.batch, row.seq_len, seed=row.seed + n, device=device, tiny=row.tiny)
        for n in range(max(1, row.warmup + row.steps))
    ]
    if row.reference:
        _gate_(row, result, way, ids[0])
    reset_peaks(device)
    if row.steps:
        losses, seconds = timed(way, ids, row.warmup, device)
        speeds = sorted(row.batch * row.seq_len / each for each in seconds)
        result["tokens_per_second"] = round(statistics.median(speeds), 1)
        result.update(p10=round(quantile(speeds, 0.1), 1), p90=round(quantile(speeds, 0.9), 1))
        result["first_loss"] = round(losses[0], 6)
        if not all(abs(loss) < float("inf") for loss in losses):
            add_note_(result, "a loss is not a number")
    result.update(memory(device, load_reserved))


def _built(row: Setting, device: torch.device, result: dict[str, Any]) -> Trainable:
    """The way of a row, loaded. Those called octavo... and unsloth... are of octavo_way.py and unsloth_way.py."""
    if row.way.startswith("octavo"):
        ours = import_module("octavo_way")
        result["scheme"] = row.way.removeprefix("octavo").strip("-")
        cap = int(row.cap_gib * GIB) if row.cap_gib else None
        asked = {"device": device, "tiny": row.tiny, "batch": row.batch, "seq_len": row.seq_len, "cap_bytes": cap}
        way: Trainable = ours.build(row.way, row.model, seed=row.seed, **asked)
        return way
    if row.way.startswith("unsloth"):
        theirs = import_module("unsloth_way")
        result["scheme"] = theirs.scheme_of(row.way)
        if row.seq_len > theirs.LONGEST:
            raise ValueError(f"rows of {row.seq_len} tokens: unsloth_way.py loads the model for {theirs.LONGEST}")
        add_note_(result, theirs.versions())
        peer: Trainable = theirs.build(row.way, row.model, seed=row.seed, device=device, tiny=row.tiny)
        return peer
    import peers

    result["scheme"] = peers.scheme_of(row.way)
    return peers.build(row.way, row.model, seed=row.seed, device=device, tiny=row.tiny)


def timed(way: Trainable, ids: Sequence[Tensor], warmup: int, device: torch.device) -> tuple[list[float], list[float]]:
    """The losses of all steps, and the seconds of each one after `warmup`, from the end of the one before it."""
    import torch

    losses = [way.step(batch) for batch in ids[:warmup]]
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for batch in ids[warmup:]:
            losses.append(way.step(batch))
            marks.append(time.perf_counter())
        return [float(loss) for loss in losses], [b - a for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(ids) - warmup + 1)]
    events[0].record()
    for batch, event in zip(ids[warmup:], events[1:], strict=True):
        losses.append(way.step(batch))
        event.record()
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1000 for a, b in pairwise(events)]
    return [float(loss) for loss in losses], seconds


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, on the line between the two nearest."""
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


# The gate: is it the same function, and its gradient?


def _gate_(row: Setting, result: dict[str, Any], way: Trainable, ids: Tensor) -> None:
    """Writes the reference's loss and gradients, or compares a way's with them; a failure is a note."""
    import torch

    assert row.reference
    file = Path(row.reference)
    loss, found = way.gradients(ids)
    result["first_loss"] = round(float(loss), 6)
    if row.way == REFERENCE:
        torch.save({"loss": float(loss), "gradients": {name: each.float().cpu() for name, each in found.items()}}, file)
        return
    if not file.is_file():
        add_note_(result, "the reference failed: not compared")
        return
    reference = torch.load(file, weights_only=True)
    told = compare_gradients(reference["gradients"], found)
    result["loss_gap"] = round(float(loss) / reference["loss"] - 1, 6)
    note_gradients_(result, told)


def note_gradients_(result: dict[str, Any], told: Mapping[str, Any]) -> None:
    """What `compare_gradients` told, into a row."""
    result.update({name: round(told[name], 5) for name in ("cosine", "cosine_min", "cosine_median")})
    if told["missing"]:
        add_note_(result, f"{len(told['missing'])} adapters without a gradient, as {told['missing'][0]}")
    whole, least = FLOORS.get(str(result["scheme"]).removesuffix("-card"), FLOORS_ELSE)
    if told["cosine"] < whole:
        add_note_(result, f"gradient cosine {told['cosine']:.3f}")
    if told["cosine_min"] < least:
        add_note_(result, f"gradient cosine {told['cosine_min']:.3f} at {told['worst']}")


def compare_gradients(reference: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """How near our gradients are to the reference's, all as one vector and adapter by adapter; names as in PEFT's file.

    cosine is of all; cosine_min, cosine_median, and worst, the name with the least; ratio_min and ratio_max of the
    norms, ours over theirs. missing: names that we lack or whose gradient is zero, not finite or of another shape; they
    count as cosine 0, and as zeros in that of all. What only we have is not looked at.
    """
    cosines: dict[str, float] = {}
    ratios: list[float] = []
    missing = []
    both = ours_squared = theirs_squared = 0.0
    for name, theirs in reference.items():
        wanted = theirs.detach().cpu().flatten().double()
        found = ours.get(name)
        same = found is not None and found.shape == theirs.shape
        got = found.detach().cpu().flatten().double() if same and found is not None else wanted.new_zeros(1)
        norm, target = float(got.norm()), float(wanted.norm())
        theirs_squared += target**2
        if not 0 < norm < float("inf") or target == 0:
            missing.append(name)
            cosines[name] = 0.0
            continue
        joint = float(got @ wanted)
        both, ours_squared = both + joint, ours_squared + norm**2
        cosines[name] = joint / (norm * target)
        ratios.append(norm / target)
    worst = min(cosines, key=lambda name: cosines[name])
    return {
        "cosine": both / (ours_squared * theirs_squared) ** 0.5 if both else 0.0,
        "cosine_min": cosines[worst],
        "cosine_median": statistics.median(cosines.values()),
        "worst": worst,
        "ratio_min": min(ratios, default=0.0),
        "ratio_max": max(ratios, default=0.0),
        "missing": missing,
    }


# The card and its memory. On a CPU the three columns hold the most RAM that the process had.


def card_of(device: torch.device) -> str:
    """The card's name, or the CPU's."""
    import torch

    from octavo.hardware import read_cpu

    return torch.cuda.get_device_name(device) if device.type == "cuda" else read_cpu()[0]


def reserved_gib(device: torch.device) -> float:
    """The most that PyTorch has reserved since the last reset."""
    from octavo.hardware import peak_memory_bytes

    return peak_memory_bytes(device) / GIB


def reset_peaks(device: torch.device) -> None:
    """Peaks count from here. What loading left in the allocator's cache goes back first: it would count as reserved."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device, load_reserved: float) -> dict[str, float | None]:
    """Peaks of training, in GiB; load_reserved_gib is the most over loading and training.

    device_used_gib is what the driver says is taken on the card at the end, CUDA's own context included;
    pinned_gib the page-locked host memory that PyTorch holds for copies.
    """
    import torch

    train_reserved = reserved_gib(device)
    told: dict[str, float | None] = {
        "peak_allocated_gib": round(train_reserved, 3),
        "peak_reserved_gib": round(train_reserved, 3),
        "load_reserved_gib": round(max(load_reserved, train_reserved), 3),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        told["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        told["device_used_gib"] = round((total - free) / GIB, 3)
        told["pinned_gib"] = pinned_gib()
    return told


def pinned_gib() -> float | None:
    """The most page-locked host memory that PyTorch held; None if this version does not count it."""
    import torch

    try:
        peak = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
    except (AttributeError, RuntimeError):
        return None
    return round(peak / GIB, 3) if peak is not None else None
