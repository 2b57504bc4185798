"""The domain of every Triton kernel: the dtypes and layouts of its operands, exactly as the cases cover them.

A kernel must not run what its reference cannot: tests/kernels/test_parity.py runs both on every case. This table says
what the cases cover. test_domains.py compares it with them, and with the calls of training steps and of requests. A new
kernel without cases or without a domain fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.ops.matmul8 import FP8
from octavo.runtime.dispatch import KERNELS

# Layouts, each with those before it: contiguous; the last axis contiguous, so that a matrix may be columns of a wider
# one; any strides.
LAYOUTS = ("contiguous", "rows", "any")
F32, F16, BF16, I8, U8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8
COMPUTE = (F32, F16, BF16)  # compute dtypes; bfloat16 is tested on GPUs only, since Triton's interpreter has none


@dataclass(frozen=True)
class Operand:
    """A tensor of a kernel. `align`: address and row pitch are multiples of so many bytes. `optional`: None too."""

    dtypes: tuple[torch.dtype, ...]
    layout: str = "contiguous"
    align: int = 1
    optional: bool = False

    def fault(self, tensor: Tensor | None) -> str:
        """What puts a tensor outside of the domain; "" if nothing does."""
        if tensor is None:
            return "" if self.optional else "None"
        if tensor.dtype not in self.dtypes:
            return str(tensor.dtype)
        if LAYOUTS.index(layout_of(tensor)) > LAYOUTS.index(self.layout):
            return f"{layout_of(tensor)} layout {tuple(tensor.shape)} {tensor.stride()}"
        pitches = [stride * tensor.itemsize for stride in tensor.stride()[:-1]]
        return "" if all(n % self.align == 0 for n in (tensor.data_ptr(), *pitches)) else f"not aligned to {self.align}"


def rows(*dtypes: torch.dtype, align: int = 1, optional: bool = False) -> Operand:
    return Operand(dtypes, "rows", align, optional)


def contiguous(*dtypes: torch.dtype, align: int = 1, optional: bool = False) -> Operand:
    return Operand(dtypes, align=align, optional=optional)


X, OUT, SCALES, SCALES_OR_NONE = rows(*COMPUTE), rows(*COMPUTE), contiguous(F32), contiguous(F32, optional=True)
INDEX = Operand((torch.int64,), "any")
LORA_BACKWARD = {
    "x": X,
    "dy": X,
    "operands.t": X,
    "operands.b": contiguous(*COMPUTE, optional=True),
    "operands.after": X,
}

SOFTCAPPED = {
    "q": X, "k": X, "v": X, "extents": Operand((), optional=True), "extents.start": contiguous(torch.int32),
    "extents.stop": contiguous(torch.int32),
}  # fmt: skip

DOMAINS: dict[str, dict[str, Operand]] = {
    "adam.adam8_": {
        "values": SCALES, "gradient": SCALES, "moments.first": contiguous(U8), "moments.second": contiguous(U8),
        "moments.first_absmax": SCALES, "moments.second_absmax": SCALES, "factor": SCALES,
    },
    "rotary.norm_rotate_backward_into": {
        "x": X, "weight": SCALES, "cos": SCALES, "sin": SCALES, "dy": X, "out": OUT,
    },
    "rotary.norm_rotate_into": {"x": X, "weight": SCALES, "cos": SCALES, "sin": SCALES, "out": OUT},
    "rotary.rotate_into": {"x": X, "cos": SCALES, "sin": SCALES, "out": OUT},
    "cached_attention.decode_attention": {
        "q": X, "k": X, "v": X, "keys": contiguous(*COMPUTE), "values": contiguous(*COMPUTE),
        "lengths": contiguous(torch.int64),
    },
    "cached_attention.prefill_attention": {
        "q": X, "keys": contiguous(*COMPUTE), "values": contiguous(*COMPUTE), "starts": INDEX,
        "slots": Operand((torch.int64,), "any", optional=True),
    },
    "inference.matmul": {
        "x": X, "weight": contiguous(*COMPUTE, I8), "absmax": SCALES_OR_NONE, "bias": SCALES_OR_NONE,
        "residual": rows(*COMPUTE, optional=True),
        "lora": Operand((), optional=True), "lora.t": SCALES, "lora.b": contiguous(*COMPUTE),
        "lora.adapter_ids": contiguous(torch.int64), "lora.names": contiguous(torch.int32),
    },
    "inference.shrink": {"x": X, "a": contiguous(*COMPUTE), "adapter_ids": contiguous(torch.int64)},
    "lora_backward.geglu_lora_backward_": LORA_BACKWARD,
    "lora_backward.gelu_lora_backward_": LORA_BACKWARD,
    "lora_backward.swiglu_lora_backward_": LORA_BACKWARD,
    "lora_factors.pack_b_into": {"out": OUT, "loras[].a": SCALES, "loras[].b": SCALES},
    "loss.cross_entropy_": {"logits": X, "labels": contiguous(torch.int64), "softcap": Operand((), optional=True)},
    "matmul8.matmul_8bit_into": {
        "quantized": contiguous(I8, FP8, align=16), "scale": SCALES, "weight": contiguous(I8, FP8, align=16),
        "out": OUT,
        "absmax": SCALES_OR_NONE, "bias": SCALES_OR_NONE, "low_rank": Operand((), optional=True),
        "low_rank.t": X, "low_rank.b": X, "residual": rows(*COMPUTE, optional=True),
    },
    "matmul8.quantize_rows_into": {
        "x": X, "quantized": contiguous(I8, FP8), "scale": SCALES, "prescale": SCALES_OR_NONE,
    },
    "matmul8.transpose_into": {"weight": contiguous(I8), "out": contiguous(I8, FP8)},
    "pointwise.add_norm_into": {"x": X, "weight": SCALES, "bias": SCALES_OR_NONE, "residual": X, "out": OUT},
    "pointwise.copy_into": {"x": X, "out": OUT},
    "pointwise.geglu_backward_": {"x": X, "dy": X},
    "pointwise.geglu_into": {"x": X, "out": OUT},
    "pointwise.gelu_backward_": {"x": X, "dy": X},
    "pointwise.gelu_into": {"x": X, "out": OUT},
    "pointwise.norm_backward_into": {
        "x": X, "weight": SCALES, "dy": X, "residual": rows(*COMPUTE, optional=True), "out": OUT,
    },
    "pointwise.norm_into": {"x": X, "weight": SCALES, "bias": SCALES_OR_NONE, "out": OUT},
    "pointwise.swiglu_backward_": {"x": X, "dy": X},
    "pointwise.swiglu_into": {"x": X, "out": OUT},
    "softcap.softcapped_forward": SOFTCAPPED,
    "softcap.softcapped_backward": {**SOFTCAPPED, "out": contiguous(*COMPUTE), "lse": contiguous(F32), "grad": X},
    "quantize.int8_values_into": {"weight": contiguous(I8), "out": OUT},
    "quantize.dynamic8_into": {"codes": contiguous(U8), "absmax": SCALES, "code": SCALES, "out": OUT},
    "quantize.int8_into": {"weight": contiguous(I8), "absmax": SCALES, "out": OUT},
    "quantize4.nf4_as_int8_into": {
        "codes": contiguous(U8), "absmax": SCALES, "row_absmax": SCALES, "out": contiguous(I8),
    },
    "quantize4.nf4_double_into": {
        "codes": contiguous(U8), "absmax": contiguous(U8), "nested_absmax": SCALES, "nested_offset": SCALES,
        "code": SCALES, "out": OUT,
    },
    "quantize4.nf4_into": {"codes": contiguous(U8), "absmax": SCALES, "out": OUT},
}  # fmt: skip


def layout_of(tensor: Tensor) -> str:
    if tensor.is_contiguous():
        return "contiguous"
    return "rows" if tensor.stride(-1) == 1 else "any"


def operands(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Iterator[tuple[str, Tensor | None]]:
    """(name, tensor or None) of every operand in a call of a kernel; those in tuples too."""
    bound = inspect.signature(KERNELS[name]).bind(*arguments, **named)
    bound.apply_defaults()
    for key, value in bound.arguments.items():
        if key not in ("dtype", "spec"):  # spec: numbers alone
            yield from _flat(key, value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor | None]]:
    if value is None or isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "_fields"):
        for key in value._fields:
            yield from _flat(f"{name}.{key}", getattr(value, key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flat(f"{name}[]", item)


def faults(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[str]:
    """What puts a call outside of the domain of a kernel."""
    domain, found = DOMAINS[name], []
    for key, tensor in operands(name, arguments, named):
        fault = domain[key].fault(tensor) if key in domain else "not in the domain"
        found += [f"{name} {key}: {fault}"] if fault else []
    return found
