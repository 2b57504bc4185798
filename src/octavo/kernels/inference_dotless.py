"""Matmuls of decode on GPUs whose tensor cores Triton does not use. Reference: ops/inference.py.

Below compute capability 8.0 Triton compiles a dot of matrices into multiplications of single elements, with operands
that go through shared memory and registers that spill. Decode needs no dot: with few rows a matmul is bound by reading
its weight. Here a program reads a strip of the weight once, multiplies it in float32 with ROWS rows, element by
element, and sums at the end. A T4 multiplies 12 pairs in the time in which it reads a byte, so four rows cost no more
than one.

The order of the sums of a row is a function of the shape of the weight: a program has ROWS rows for any number of rows,
and missing ones are zeros. Prompts, and more than MOST_ROWS rows whose sums may have any order, are multiplied by
cuBLAS, in the reference; a kernel adds bias, LoRA terms and residual.

Legend as in kernels/inference.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.inference_epilogue import EXACT, add_parts, epilogue_of, finish, split
from octavo.ops.inference import BatchedLora
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import KERNELS

ROWS, STRIP, WIDTH = 4, 8, 256  # rows and outputs of a program, and inputs that it multiplies at once
PROGRAMS = 160  # that occupy a GPU: four for each multiprocessor of a T4
MOST_ROWS = 16  # computed here in any order: more are bound by multiplications


def matmul(
    x: Tensor, weight: Tensor, absmax: Tensor | None, phase: Phase, bias: Tensor | None, bias_start: int,
    lora: BatchedLora | None, residual: Tensor | None, dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """`ops.inference.matmul`."""
    (m, k), n = x.shape, len(weight)
    if phase is Phase.PREFILL or (phase is Phase.DECODE_ANY_ORDER and m > MOST_ROWS):
        y: Tensor = KERNELS["inference.matmul"](x, weight, absmax, phase=phase, dtype=dtype)  # (M, N)
        if bias is not None or lora is not None or residual is not None:
            # For LoRA terms the reference would wait for the GPU, to learn which adapters the rows have.
            add_parts(y[None], y, epilogue_of(x, n, None, bias, bias_start, lora, residual))
        return y
    out = x.new_empty(m, n, dtype=dtype or x.dtype)
    after = epilogue_of(x, n, absmax, bias, bias_start, lora, residual)
    parts, span = parts_for(n, k)
    sums = x.new_empty(parts, m, n, dtype=torch.float32) if parts > 1 else out
    _matmul[(triton.cdiv(m, ROWS), parts, triton.cdiv(n, STRIP))](
        x, weight, sums, out, *after.arguments, m, k, span, x.stride(0), weight.stride(0),
        *after.has, parts > 1, after.levels, ROWS, STRIP, WIDTH, num_warps=4, **EXACT,
    )  # fmt: skip
    if parts > 1:
        add_parts(sums, out, after)
    return out


def parts_for(n: int, k: int) -> tuple[int, int]:
    """(number of partial sums, inputs of each) for a weight (n, k): a function of the weight's shape alone."""
    return split(n, k, strip=STRIP, width=WIDTH, programs=PROGRAMS)


@triton.jit(do_not_specialize=["m", "j", "adapters", "bias_start", "bias_stop"])
def _matmul(
    x, weight, sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids, names, residual,
    j, adapters, n, residual_stride, m, k, span, x_stride, weight_stride,
    BIAS: tl.constexpr, R: tl.constexpr, RESIDUAL: tl.constexpr, PARTED: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, STRIP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # Programs of the same strip are neighbours: their weights come from cache.
    strip = tl.program_id(2) * STRIP + tl.arange(0, STRIP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * span
    last = tl.minimum(first + span, k)
    place = weight + strip[:, None].to(tl.int64) * weight_stride
    source = x + row[:, None].to(tl.int64) * x_stride
    partial = tl.zeros((ROWS, STRIP, WIDTH), dtype=tl.float32)
    for start in range(first, last, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        value = tl.load(place + column, mask=(strip[:, None] < n) & (column < last), other=0).to(tl.float32)
        inputs = tl.load(source + column, mask=(row[:, None] < m) & (column < last), other=0).to(tl.float32)
        partial += inputs[:, None, :] * value[None, :, :]
    finish(
        tl.sum(partial, axis=2), row, strip, sums, out, absmax, bias, bias_start, bias_stop, lora_t, b, adapter_ids,
        names, residual, j, adapters, m, n, residual_stride, BIAS, R, RESIDUAL, PARTED, LEVELS, 0,
    )  # fmt: skip
