"""The tables of docs/design/gpu-times.md: `python benchmarks/gpu_times.py [--write]`. They are computed, on a CPU too.

The first table has the rates of hardware/rates.py, the second compares computed speeds with published ones of
torchtune. The third has the plan and the time of one job on each GPU: GPT-J-6B with int8 weights (nf4 where they do not
fit) and LoRA of rank 16, 2 MB of text once. Without --write the tables are printed; --only limits the third.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from octavo.commands.run_plan import GIB, range_text
from octavo.hardware import GPUS, gpu_named, gpus_with, nearest, other_sizes, rates_of
from octavo.hardware.rates import Rate
from octavo.layers.context import Save
from octavo.train.memory import MemoryPlan, Planner
from octavo.train.precision import all_8bit
from octavo_method import planner_of

PAGE = Path(__file__).parents[1] / "docs/design/gpu-times.md"
NAMES = (
    "T4", "P100", "GTX 1080 Ti", "Quadro RTX 5000", "RTX A6000", "RTX 3060", "RTX 4090", "RTX 5090", "RTX 3090",
    "A100 40GB",
)  # fmt: skip
BATCH, LENGTH = 4, 2048  # rows of an optimizer step, tokens of a row
TEXT_BYTES, BYTES_PER_TOKEN = 2_000_000, 4
ROWS = math.ceil(TEXT_BYTES / BYTES_PER_TOKEN / LENGTH)  # 245
RATES = (
    "| GPU | 16-bit matmuls, TFLOP/s | 8-bit matmuls, TOP/s | attention, TFLOP/s | memory, GB/s |\n"
    "|---|---|---|---|---|\n"
)
# torchtune's README: GPU, octavo's scheme with the same weights, its method, tokens/s.
PEERS = (("RTX 4090", "none", "LoRA", 3083), ("RTX 4090", "nf4", "QLoRA", 2413), ("RTX A6000", "none", "LoRA", 4699))
STEPS = "| GPU | torchtune's method | published tokens/s | computed for octavo's step |\n|---|---|---|---|\n"
JOB = (
    "| GPU | weights | rows x tokens | micro-batch | recomputed layers | offload | peak GiB | tokens/s | minutes |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="GPUs of the third table")
    parser.add_argument("--write", action="store_true", help="write all tables into the page")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write writes all GPUs: leave --only out.")
    try:
        names = [gpu_key(name) for name in args.only or NAMES]
    except ValueError as error:
        parser.error(str(error))
    tables = {"rates": rates_table(), "steps": steps_table(), "job": JOB + "\n".join(job_row(name) for name in names)}
    if args.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        sys.stdout.write("\n\n".join(tables.values()) + "\n")


def gpu_key(name: str) -> str:
    """The key of GPUS that `name` means. ValueError for an unknown or ambiguous name, or if its memory is not known."""
    key = gpu_named(name)
    if key is None:
        several = gpus_with(name)
        if len(several) > 1:
            raise ValueError(f"--only: {name!r} can be several GPUs. Use one of {', '.join(several)}.")
        near = nearest(name)
        names = f"Similar names: {', '.join(near)}." if near else f"Supported are {', '.join(GPUS)}."
        raise ValueError(f"--only: octavo has no data of the GPU {name!r}. {names}")
    if GPUS[key].memory_gib is None:
        sizes = ", ".join(other_sizes(key))
        raise ValueError(f"--only: the memory of the {key} is not known, as it has several sizes. Use one of {sizes}.")
    return key


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with other tables between its markers: <!-- NAME --> and <!-- end of NAME -->."""
    for name, table in tables.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"\n<!-- end of {name} -->")
        assert begin, f"no table {name}"
        assert end, f"no end of {name}"
        page = before + begin + table + end + after
    return page


def rates_table() -> str:
    """The rates of all GPUs of the page."""
    lines = []
    for name in NAMES:
        rates = rates_of(GPUS[name])
        eight = _ends(rates.matmul8, 1e12) if GPUS[name].matmul_8bit else "-"
        cells = (name, _ends(rates.matmul, 1e12), eight, _ends(rates.attention, 1e12), _ends(rates.memory, 1e9))
        lines.append(f"| {' | '.join(cells)} |")
    return RATES + "\n".join(lines)


def _ends(rate: Rate, unit: float) -> str:
    return range_text(rate.at(-1) / unit, rate.at(1) / unit)


def steps_table() -> str:
    """Published tokens/s of Llama-3.1-8B, and those computed for octavo's step with the same recomputation."""
    lines = []
    for name, scheme, method, published in PEERS:
        planner = planner_of("llama-128k", scheme, dtype=torch.bfloat16, tiny=False, batch=2, seq_len=LENGTH)
        planner = replace(planner, gpu=GPUS[name], ampere=GPUS[name].ampere)
        plan = planner.plan((Save.INPUT,) * len(planner.model.blocks), 2)
        assert plan.seconds_range is not None
        low, high = (2 * LENGTH / end for end in reversed(plan.seconds_range))
        lines.append(f"| {name} | {method} | {published:,} | {range_text(low, high)} |")
    return STEPS + "\n".join(lines)


def job_row(name: str) -> str:
    """The line of the job on one GPU."""
    scheme, plan = job_plan(name)
    assert plan.seconds_range is not None
    low, high = plan.seconds_range
    tokens, steps = BATCH * LENGTH, ROWS / BATCH
    recomputing = sum(save != Save.ALL for save in plan.save)
    cells = (
        name,
        scheme,
        f"{BATCH} x {LENGTH:,}",
        str(plan.rows),
        str(recomputing),
        "yes" if plan.offload else "no",
        f"{plan.peak_bytes / GIB:.1f}",
        range_text(tokens / high, tokens / low),
        range_text(steps * low / 60, steps * high / 60),
    )
    return f"| {' | '.join(cells)} |"


def job_plan(name: str) -> tuple[str, MemoryPlan]:
    """The scheme and the plan that `octavo plan` chooses for the job on a GPU with all of its usable memory free."""
    budget = GPUS[name].usable_bytes
    assert budget is not None
    for scheme in ("int8", "nf4"):
        plan = job_planner(name, scheme).best(budget)
        if plan is not None:
            return scheme, plan
    raise SystemExit(f"The job does not fit a {name}.")


def job_planner(name: str, scheme: str) -> Planner:
    gpu = GPUS[name]
    planner = planner_of("gptj", scheme, dtype=torch.float16, tiny=False, batch=BATCH, seq_len=LENGTH)
    planner = replace(planner, gpu=gpu, offloads=(False, True), ampere=gpu.ampere)
    if not gpu.matmul_8bit:
        return planner
    return replace(planner, precision=all_8bit(planner.model, forward_only=not gpu.backward_8bit))


if __name__ == "__main__":
    main()
