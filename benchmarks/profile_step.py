"""Profiles a training step of octavo on a GPU: `python benchmarks/profile_step.py --method octavo-int8-8bit`.

Prints milliseconds per step by kind of kernel, the kernels with the most time, and the time without a kernel.
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

import octavo_method
from shapes import MODELS

KINDS = {  # kind: pattern of the kernel's name; the first match counts
    "8-bit matmuls": r"^_matmul_8bit",
    "attention": r"cudnn|flash|fmha|sdpa|sdp",
    "matmuls": r"gemm|nvjet|cutlass|xmma|splitKreduce|cublas",
    "quantization and transposes": r"^_quantize_rows|^_quantize_long_rows|^_transpose",
    "dequantization": r"^_int8$|^_nf4|^_dynamic8",
    "loss": r"^_cross_entropy|^_loss",
    "optimizer": r"^_adam8|Optimizer",
    "elementwise": r"",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", default="octavo-int8")
    add("--model", choices=MODELS, default="gptj")
    add("--batch", type=int, default=1)
    add("--seq-len", type=int, default=2048)
    add("--cap-gib", type=float)
    add("--steps", type=int, default=3)
    args = parser.parse_args()
    cap = int(args.cap_gib * 2**30) if args.cap_gib else None
    trainable = octavo_method.build(
        args.method, args.model, seed=0, device=torch.device("cuda"), tiny=False, batch=args.batch,
        seq_len=args.seq_len, cap_bytes=cap,
    )  # fmt: skip
    ids = torch.randint(0, 30000, (args.batch, args.seq_len))
    for _ in range(3):  # eager, captured, replayed
        trainable.step(ids)
    torch.cuda.synchronize()
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        trainable.step(ids)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(args.steps):
            trainable.step(ids)
        torch.cuda.synchronize()
    report(args, trainable, statistics.median(seconds), profiler)


def report(args: argparse.Namespace, trainable: Any, seconds: float, profiler: Any) -> None:
    """Prints the table."""
    milliseconds: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total / 1e3 / args.steps
        if spent > 0:
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, event.key))
            milliseconds[kind] += spent
            kernels[event.key] = spent, event.count // args.steps
    busy, step = sum(milliseconds.values()), seconds * 1e3
    write = sys.stdout.write
    tokens = args.batch * args.seq_len
    write(f"{args.method}, {args.model}, {args.batch} x {args.seq_len}: {step:.1f} ms per step")
    write(f", {tokens / seconds:,.0f} tok/s,")
    write(f" {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved;")
    write(f" micro-batches of {trainable.plan.rows} sequences, {trainable.plan.describe()}\n")
    for kind in KINDS:
        if milliseconds[kind]:
            write(f"  {milliseconds[kind]:8.2f} ms  {milliseconds[kind] / step:6.1%}  {kind}\n")
    write(f"  {step - busy:8.2f} ms  {(step - busy) / step:6.1%}  no kernel\n")
    for name, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:24]:
        write(f"    {spent:8.2f} ms {count:5d} x  {name[:100]}\n")


if __name__ == "__main__":
    main()
