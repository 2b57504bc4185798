"""What an optimizer step takes on a card: `python benchmarks/optimizer.py [--numbers 33030144]`.

octavo's 8-bit Adam, its gradient norm and its zeroed gradients, beside bitsandbytes' 8-bit Adam and PyTorch's fused
AdamW on the same numbers, in milliseconds: the median of 50 by CUDA events.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from octavo.layers.lora import flatten_
from octavo.train.optim import Adam, OptimizerSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=33_030_144, help="GPT-J-6B: rank 16 on the six linears")
    asked = parser.parse_args()
    card = torch.device("cuda")
    parameter = nn.Parameter(torch.randn(1, asked.numbers, device=card))
    ours = Adam(flatten_({"a": parameter}), OptimizerSettings())
    values = ours.groups[0].values
    assert values.grad is not None
    values.grad.normal_()
    norm = ours.gradient_norm()
    theirs, fused = nn.Parameter(values.detach().clone()), nn.Parameter(values.detach().clone())
    theirs.grad, fused.grad = values.grad.clone(), values.grad.clone()
    eight, adamw = AdamW8bit([theirs], lr=1e-4), torch.optim.AdamW([fused], lr=1e-4, fused=True)
    ways: dict[str, Callable[[], object]] = {
        "octavo 8-bit Adam": lambda: ours.step(1e-4, gradient_norm=norm),
        "octavo gradient norm": ours.gradient_norm,
        "octavo norm and step": lambda: ours.step(1e-4, gradient_norm=ours.gradient_norm()),
        "bitsandbytes 8-bit Adam": eight.step,
        "PyTorch fused AdamW": adamw.step,
        "octavo zeroing": ours.zero_gradients,
    }
    for name, run in ways.items():
        sys.stdout.write(f"{name:24} {milliseconds(run):7.3f} ms\n")


def milliseconds(run: Callable[[], object], times: int = 50) -> float:
    for _ in range(3):
        run()
    spent = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)


if __name__ == "__main__":
    main()
