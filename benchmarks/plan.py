"""Compares the planner's memory forecast with a GPU's peak memory: `python benchmarks/plan.py [--out plan.csv]`.

For every setting the script makes a plan, builds the model with random weights and trains four steps, the last from a
CUDA graph. The peak is the memory that PyTorch reserved. Prints one line per setting, with the error in per cent.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
import traceback
from pathlib import Path

import torch

from octavo.layers.context import Save
from octavo_method import TrainableOctavo, planner_of, random_model, with_adapters_
from shapes import batch_ids

GIB = 2**30
# (model, scheme, batch size, seq_len, limit of reserved memory in GiB; None: all of the GPU)
SETTINGS = (
    ("gptj", "int8", 1, 2048, None),
    ("gptj", "int8", 1, 2048, 11.0),
    ("gptj", "int8", 1, 2048, 8.0),
    ("gptj", "int8", 4, 512, 9.0),
    ("gptj", "nf4", 1, 2048, 6.0),
    ("gptj", "nf4", 1, 512, None),
    ("gptj", "int8", 8, 2048, None),
    ("llama", "int8", 1, 8192, 16.0),
    ("llama", "int8", 4, 2048, 17.9),
    ("llama", "nf4", 1, 8192, 10.0),
    ("llama", "nf4", 4, 2048, 6.7),
    ("llama", "int8", 1, 512, None),
)
COLUMNS = (
    "model", "scheme", "batch", "seq_len", "budget_gib", "rows", "all", "attention", "input",
    "forecast_gib", "reserved_gib", "error_percent", "forecast_seconds", "seconds", "gpu", "torch",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for setting in SETTINGS:
        try:
            rows.append(measured(*setting))
            sys.stdout.write(" ".join(f"{name}={rows[-1][name]}" for name in COLUMNS[:-2]) + "\n")
        except Exception:
            traceback.print_exc()
            sys.stdout.write(f"{setting} failed\n")
        sys.stdout.flush()
        gc.collect()
        torch.cuda.empty_cache()
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def measured(model: str, scheme: str, batch: int, seq_len: int, budget: float | None) -> dict[str, object]:
    """Plans, builds and trains one setting; returns its row."""
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget * GIB / total) if budget else 1.0, 0)
    planner = planner_of(model, scheme, dtype=torch.bfloat16, tiny=False, batch=batch, seq_len=seq_len)
    plan = planner.best(budget * GIB if budget else total)
    if plan is None:
        raise RuntimeError(f"no plan fits: the smallest needs {planner.smallest().peak_bytes / GIB:.2f} GiB")
    torch.cuda.set_per_process_memory_fraction(1.0, 0)  # random_model quantizes a full embedding matrix at once
    decoder = random_model(model, scheme, device=device, dtype=torch.bfloat16, tiny=False, seed=0)
    with_adapters_(decoder, seed=0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget * GIB / total) if budget else 1.0, 0)
    torch.cuda.reset_peak_memory_stats()
    trainable = TrainableOctavo(decoder, plan, planner)
    ids = batch_ids(model, batch, seq_len, seed=0, device="cpu")
    for _ in range(4):
        trainable.step(ids)
    peak = torch.cuda.max_memory_reserved()
    seconds = trainable.last.seconds
    trainable.micro_step.release()
    levels = {level.name.lower(): plan.save.count(level) for level in Save}
    return {
        "model": model, "scheme": scheme, "batch": batch, "seq_len": seq_len, "budget_gib": budget or "",
        "rows": plan.rows, **levels,
        "forecast_gib": round(plan.peak_bytes / GIB, 3), "reserved_gib": round(peak / GIB, 3),
        "error_percent": round(100 * (plan.peak_bytes / peak - 1), 2),
        "forecast_seconds": round(plan.seconds or 0.0, 4), "seconds": round(seconds, 4),
        "gpu": torch.cuda.get_device_name(device), "torch": torch.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
