"""Where a training step of octavo spends a card's time: `python benchmarks/profile_step.py --way octavo-int8-8bit`.

Prints milliseconds a step by kind of kernel, the largest kernels, and what is left of the step in which no kernel ran.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch

import octavo_way
from shapes import MODELS

KINDS = {  # the first that fits a kernel's name
    "8-bit matmuls": r"^_matmul_8bit",
    "attention": r"cudnn|flash|fmha|sdpa|sdp",
    "matmuls": r"gemm|nvjet|cutlass|xmma|splitKreduce|cublas",
    "quantization and transposition": r"^_quantize_rows|^_quantize_long_rows|^_transpose",
    "dequantized weights": r"^_int8$|^_nf4|^_dynamic8",
    "loss": r"^_cross_entropy|^_loss",
    "optimizer": r"^_adam8|Optimizer",
    "elementwise": r"",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--way", default="octavo-int8")
    add("--model", choices=MODELS, default="gptj")
    add("--batch", type=int, default=1)
    add("--seq-len", type=int, default=2048)
    add("--cap-gib", type=float)
    add("--steps", type=int, default=3)
    asked = parser.parse_args()
    cap = int(asked.cap_gib * 2**30) if asked.cap_gib else None
    way = octavo_way.build(
        asked.way, asked.model, seed=0, device=torch.device("cuda"), tiny=False, batch=asked.batch,
        seq_len=asked.seq_len, cap_bytes=cap,
    )  # fmt: skip
    ids = torch.randint(0, 30000, (asked.batch, asked.seq_len))
    for _ in range(3):  # launched, recorded, replayed
        way.step(ids)
    torch.cuda.synchronize()
    seconds = []
    for _ in range(asked.steps):
        began = time.perf_counter()
        way.step(ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(asked.steps):
            way.step(ids)
        torch.cuda.synchronize()
    tell(asked, way, statistics.median(seconds), profiler)


def tell(asked: argparse.Namespace, way: Any, seconds: float, profiler: Any) -> None:
    """The table."""
    each: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total / 1e3 / asked.steps
        if spent > 0:
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.key))
            each[kind] += spent
            kernels[event.key] = spent, event.count // asked.steps
    busy, step = sum(each.values()), seconds * 1e3
    say = sys.stdout.write
    tokens = asked.batch * asked.seq_len
    say(f"{asked.way}, {asked.model}, {asked.batch} x {asked.seq_len}: {step:.1f} ms a step")
    say(f", {tokens / seconds:,.0f} tok/s,")
    say(f" {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved; {way.plan.rows} rows, {way.plan.describe()}\n")
    for kind in KINDS:
        if each[kind]:
            say(f"  {each[kind]:8.2f} ms  {each[kind] / step:6.1%}  {kind}\n")
    say(f"  {step - busy:8.2f} ms  {(step - busy) / step:6.1%}  no kernel\n")
    for name, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:24]:
        say(f"    {spent:8.2f} ms {count:5d} x  {name[:100]}\n")


if __name__ == "__main__":
    main()
