"""Compares the planner's memory forecast with a GPU's peak memory: `python benchmarks/plan.py [--out plan.csv]`.

For every setting the script makes a plan, builds the model with random weights and trains four steps, the first eagerly
and the last from a CUDA graph. The peak is the memory that PyTorch reserved; `eager_gib` is that of the first step.
Prints one line per setting, with the error in per cent, and at the end the largest error.

With --families the settings are four of each family that octavo supports: whole rows and packed documents, int8 weights
with 8-bit matmuls and nf4 weights with exact ones, all memory and a limit halfway between the fastest plan and the
smallest one. `--tiny` runs them with two narrow layers, on a CPU too, where the peak is not measured.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from family_shapes import BATCH, BATCHES, FAMILY_SHAPES
from octavo.hardware import peak, pick
from octavo.layers.context import Save
from octavo.train.memory import MARGIN, MemoryPlan, Planner
from octavo.train.precision import all_8bit
from octavo_method import TrainableOctavo, planner_of, random_model, with_adapters_
from shapes import batch_ids

GIB = 2**30
STEPS = 4
LIMIT_PERCENT = 5.0  # of the error: settings beyond it are listed at the end
TINY_TOKENS = 32  # of a row
DOCUMENT = 300  # tokens of a packed document; the last one of a row is shorter
HALFWAY = -1.0  # a budget: halfway between the smallest plan and the fastest one


@dataclass(frozen=True)
class Setting:
    """What is planned and measured."""

    model: str
    scheme: str
    batch: int
    seq_len: int
    budget_gib: float | None = None  # limit of reserved memory; None: all of the GPU; or HALFWAY
    matmul: str = "exact"  # or 8bit
    document: int | None = None  # tokens of a packed document; None: one document a row
    offload: bool = False  # whether plans may offload


SETTINGS = (
    Setting("gptj", "int8", 1, 2048),
    Setting("gptj", "int8", 1, 2048, 11.0),
    Setting("gptj", "int8", 1, 2048, 8.0),
    Setting("gptj", "int8", 4, 512, 9.0),
    Setting("gptj", "nf4", 1, 2048, 6.0),
    Setting("gptj", "nf4", 1, 512),
    Setting("gptj", "nf4", 1, 2048, 7.1, offload=True),
    Setting("gptj", "int8", 1, 2048, 10.3, offload=True),
    Setting("gptj", "int8", 8, 2048),
    Setting("llama", "int8", 1, 8192, 16.0),
    Setting("llama", "int8", 4, 2048, 17.9),
    Setting("llama", "nf4", 1, 8192, 10.0),
    Setting("llama", "nf4", 4, 2048, 6.7),
    Setting("llama", "int8", 1, 512),
)
COLUMNS = (
    "model", "scheme", "matmul", "batch", "seq_len", "document", "budget_gib", "rows", "all", "attention", "input",
    "offload", "transposed", "tiled_head", "forecast_gib", "reserved_gib", "error_percent", "forecast_seconds",
    "seconds", "gpu", "torch", "eager_gib",
)  # fmt: skip


def family_settings() -> Iterator[Setting]:
    """Four settings of each family. The second fits by recomputation or offload, the fourth by recomputation."""
    for model in FAMILY_SHAPES:
        batch, seq_len = BATCHES.get(model, BATCH)
        eight, four = Setting(model, "int8", batch, seq_len, matmul="8bit"), Setting(model, "nf4", batch, seq_len)
        yield eight
        yield replace(eight, budget_gib=HALFWAY, document=DOCUMENT, offload=True)
        yield replace(four, document=DOCUMENT)
        yield replace(four, budget_gib=HALFWAY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", action="store_true", help="the settings of every family")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models or, with --families, their model_type")
    parser.add_argument("--tiny", action="store_true", help="a test of the script: two narrow layers, on a CPU too")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that make plans")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command line does
    settings = list(family_settings() if args.families else SETTINGS)
    if args.only:
        settings = [setting for setting in settings if {setting.model, _model_type(setting)} & {*args.only}]
    if args.tiny:
        settings = [replace(s, seq_len=TINY_TOKENS, document=s.document and TINY_TOKENS // 3) for s in settings]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), _hide_gpus) as pool:
        rows = measure_all(settings, pool, tiny=args.tiny, out=args.out)
    sys.stdout.write(summary(rows, failed=len(settings) - len(rows)))


def measure_all(
    settings: list[Setting], pool: Executor, *, tiny: bool = False, out: Path | None = None
) -> list[dict[str, Any]]:
    """The rows of all settings that did not fail, also written to `out` after each. `pool` makes the plans."""
    hardware = pick()
    total = hardware.capabilities.memory_bytes if hardware.capabilities.is_gpu else None
    rows: list[dict[str, Any]] = []
    planned = [pool.submit(plan_of, s, hardware.name, total, hardware.dtype, tiny=tiny) for s in settings]
    for setting, plan in zip(settings, planned, strict=True):
        started = time.perf_counter()
        try:
            rows.append(measured(setting, *plan.result(), tiny=tiny))
            line = " ".join(f"{name}={rows[-1][name]}" for name in COLUMNS if name not in ("gpu", "torch"))
            sys.stdout.write(f"{line} took={time.perf_counter() - started:.1f}s\n")
        except Exception:
            traceback.print_exc()
            sys.stdout.write(f"{setting} failed\n")
        sys.stdout.flush()
        _free()
        if out:
            with out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    return rows


def summary(rows: list[dict[str, Any]], *, failed: int) -> str:
    """The largest error, and the settings whose error is beyond the limit."""
    measured = [row for row in rows if row["error_percent"] != "unmeasured"]
    worst = max(measured, key=lambda row: abs(row["error_percent"]), default=None)
    beyond = [row for row in measured if abs(row["error_percent"]) > LIMIT_PERCENT]
    lines = [f"{len(rows)} settings, {failed} failed, {len(measured)} measured"]
    if worst is not None:
        lines += [f"largest error {worst['error_percent']} % ({_label(worst)})"]
        lines += [f"{len(beyond)} beyond {LIMIT_PERCENT:g} %: " + "; ".join(map(_label, beyond))]
    return "\n".join(lines) + "\n"


def plan_of(
    setting: Setting, gpu: str, total_bytes: int | None, dtype: torch.dtype, *, tiny: bool = False
) -> tuple[MemoryPlan, float]:
    """(the fastest plan of a setting on `gpu`, the budget in bytes). It is made without a GPU.

    The plans of tiny models hardly differ in memory: halfway is then the smallest one.
    """
    planner = planner_for(setting, gpu, dtype, tiny=tiny)
    budget: float = total_bytes or sys.maxsize
    if setting.budget_gib == HALFWAY:
        smallest, fastest = planner.smallest(), planner.best(budget)
        if tiny:
            return smallest, budget
        assert fastest is not None
        budget = (fastest.peak_bytes + smallest.peak_bytes) / 2 / MARGIN
    elif setting.budget_gib is not None:
        budget = setting.budget_gib * GIB
    plan = planner.best(budget)
    if plan is None:
        raise RuntimeError(f"no plan fits: the smallest needs {planner.smallest().peak_bytes / GIB:.2f} GiB")
    return plan, budget


def planner_for(setting: Setting, gpu: str, dtype: torch.dtype, *, tiny: bool) -> Planner:
    """The planner of `octavo finetune` for a setting."""
    planner = planner_of(
        setting.model, setting.scheme, dtype=dtype, tiny=tiny, batch=setting.batch, seq_len=setting.seq_len
    )
    return replace(
        planner,
        gpu=peak(gpu),
        offloads=(False, True) if setting.offload else (False,),
        # With fewer rows at once most plans would fit halfway, and none would recompute.
        micro_batch_size=setting.batch if setting.budget_gib == HALFWAY else None,
        documents=math.ceil(setting.seq_len / setting.document) if setting.document else 1,
        precision=all_8bit(planner.model) if setting.matmul == "8bit" else planner.precision,
    )


def measured(setting: Setting, plan: MemoryPlan, budget: float, *, tiny: bool = False) -> dict[str, Any]:
    """Builds and trains one setting; returns its row."""
    hardware = pick()
    device, is_gpu = hardware.device, hardware.capabilities.is_gpu
    decoder = random_model(setting.model, setting.scheme, device=device, dtype=hardware.dtype, tiny=tiny, seed=0)
    with_adapters_(decoder, seed=0)
    _free()
    if is_gpu:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / hardware.capabilities.memory_bytes), 0)
        torch.cuda.reset_peak_memory_stats()
    planner = planner_for(setting, hardware.name, hardware.dtype, tiny=tiny)
    trainable = TrainableOctavo(decoder, plan, planner, limited=is_gpu and setting.budget_gib is not None)
    ids = batch_ids(setting.model, setting.batch, setting.seq_len, seed=0, device="cpu", tiny=tiny)
    peaks = []
    for _ in range(STEPS):
        trainable.step(ids, document=setting.document)
        peaks.append(torch.cuda.max_memory_reserved() if is_gpu else 0)
        if is_gpu:  # cached blocks of the eager step would count as reserved by the next
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    peak_bytes = max(peaks)
    seconds = trainable.last.seconds
    trainable.micro_step.release()
    levels = {level.name.lower(): plan.save.count(level) for level in Save}
    error = round(100 * (plan.peak_bytes / peak_bytes - 1), 2) if is_gpu else "unmeasured"
    return {
        "model": setting.model, "scheme": setting.scheme, "matmul": setting.matmul, "batch": setting.batch,
        "seq_len": setting.seq_len, "document": setting.document or "",
        "budget_gib": round(budget / GIB, 3) if setting.budget_gib and is_gpu else "",
        "rows": plan.rows, **levels, "offload": int(plan.offload),
        "transposed": int(plan.transposed), "tiled_head": int(plan.tiled_head),
        "forecast_gib": round(plan.peak_bytes / GIB, 3),
        "reserved_gib": round(peak_bytes / GIB, 3) if is_gpu else "unmeasured",
        "error_percent": error, "forecast_seconds": round(plan.seconds or 0.0, 4),
        "seconds": round(seconds, 4),
        "gpu": hardware.name, "torch": torch.__version__,
        "eager_gib": round(peaks[0] / GIB, 3) if is_gpu else "unmeasured",
    }  # fmt: skip


def _free() -> None:
    """Frees what a setting, or its failure, has left in device memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0, 0)  # random_model quantizes a full embedding matrix at once
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _hide_gpus() -> None:
    """In a process that makes plans: a CUDA context takes device memory."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _model_type(setting: Setting) -> str:
    return str(FAMILY_SHAPES.get(setting.model, {}).get("model_type", setting.model))


def _label(row: dict[str, Any]) -> str:
    names = ("model", "scheme", "matmul", "document", "budget_gib", "error_percent")
    return " ".join(f"{name}={row[name]}" for name in names if row[name] != "")


if __name__ == "__main__":
    main()
