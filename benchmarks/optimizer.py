"""Measures an optimizer step on a GPU: `python benchmarks/optimizer.py [--parameters 33030144]`.

Compares octavo's 8-bit Adam, gradient norm and zeroing of gradients with bitsandbytes' 8-bit Adam and PyTorch's fused
AdamW on the same parameters. Prints milliseconds, the median of 50 runs, measured with CUDA events.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from octavo.layers.lora import flatten_
from octavo.train.optim import Adam, OptimizerSettings
from timing import milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=33_030_144, help="default: GPT-J-6B, rank 16 on six linears")
    args = parser.parse_args()
    parameter = nn.Parameter(torch.randn(1, args.parameters, device="cuda"))
    ours = Adam(flatten_({"a": parameter}), OptimizerSettings())
    values = ours.groups[0].values
    assert values.grad is not None
    values.grad.normal_()
    norm = ours.gradient_norm()
    theirs, fused = nn.Parameter(values.detach().clone()), nn.Parameter(values.detach().clone())
    theirs.grad, fused.grad = values.grad.clone(), values.grad.clone()
    adam8, adamw = AdamW8bit([theirs], lr=1e-4), torch.optim.AdamW([fused], lr=1e-4, fused=True)
    operations: dict[str, Callable[[], object]] = {
        "octavo 8-bit Adam": lambda: ours.step(1e-4, gradient_norm=norm),
        "octavo gradient norm": ours.gradient_norm,
        "octavo norm and step": lambda: ours.step(1e-4, gradient_norm=ours.gradient_norm()),
        "bitsandbytes 8-bit Adam": adam8.step,
        "PyTorch fused AdamW": adamw.step,
        "octavo zeroing": ours.zero_gradients,
    }
    for name, run in operations.items():
        sys.stdout.write(f"{name:24} {milliseconds(run, 50):7.3f} ms\n")


if __name__ == "__main__":
    main()
