"""Measures the 8-bit matmul of forward as on Turing, by cuBLAS: `python benchmarks/turing.py [--rows 2048,8192]`.

For each linear of a GPT-J block, on the GPU that is there: milliseconds of the matmul in float16, of dequantization and
that matmul, of quantizing the input and the 8-bit matmul by cuBLAS with its scales, and of the same by the kernel that
this GPU otherwise has; and the relative difference of the two 8-bit results. The median of 20 runs.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F

from octavo.kernels import matmul8_cublas
from octavo.ops.matmul8 import matmul_8bit_into, quantize_rows
from octavo.ops.quantize import scheme_named
from timing import milliseconds

SHAPES = {"qkv": (4096, 12288), "out": (4096, 4096), "up": (4096, 16384), "down": (16384, 4096)}  # (K, N)
INT8 = scheme_named("int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="2048,8192", help="tokens, separated by commas")
    args = parser.parse_args()
    sys.stdout.write("rows  linear  float16  dequantized  cuBLAS int8  kernel  (ms)  difference\n")
    for rows in map(int, args.rows.split(",")):
        for name, (k, n) in SHAPES.items():
            sys.stdout.write(f"{rows:5} {name:6} {measured(rows, k, n)}\n")
            sys.stdout.flush()


@torch.no_grad()
def measured(m: int, k: int, n: int) -> str:
    """The columns of a linear from k to n features for m rows."""
    torch.manual_seed(0)
    x, w = (torch.randn(rows, k, device="cuda") for rows in (m, n))
    weight, absmax = quantize_rows(w, torch.int8)
    absmax, x = absmax * 127, x.half()  # (N,), (M, K)
    half = w.half()
    actual, expected = (torch.empty(m, n, device="cuda", dtype=torch.float16) for _ in range(2))

    def dequantized() -> None:
        INT8.fill({"weight": weight, "absmax": absmax}, half)
        F.linear(x, half)

    def cublas() -> None:
        matmul8_cublas.matmul_8bit_into(*quantize_rows(x, torch.int8), weight, actual, absmax, None, 0, None, None)

    def kernel() -> None:
        matmul_8bit_into(*quantize_rows(x, torch.int8), weight, expected, absmax)

    times = (
        milliseconds(lambda: F.linear(x, half)),
        milliseconds(dequantized),
        milliseconds(cublas),
        milliseconds(kernel),
    )
    difference = float((actual.float() - expected.float()).norm() / expected.float().norm())
    return "  ".join(f"{each:8.3f}" for each in times) + f"  {difference:.1e}"


if __name__ == "__main__":
    main()
