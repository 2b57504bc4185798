"""Calls of every operation that has a kernel, in the shapes of models that people train and serve.

They are for compilation (tests/kernels/compiled.py) and have no values (real_arguments.py). Correctness has small
cases of its own (cases.py).

GPT-J-6B: d 4096, 16 heads of 256 of which 64 are rotated, q, k, v and fc_in stacked (28672 x 4096), vocabulary 50400.
Llama-8B: d 4096, 14336 between the two linears of an MLP, 32 heads of 128 with 8 key heads, vocabulary 128256. Gemma 2
9B: d 3584, 16 heads of 256 with 8 key heads, soft-capped scores, vocabulary 256000. A training batch is one row of 2048
tokens. LoRA has rank 16, or 64 where a rank is a side of a tile.

FLOP are additions and multiplications of the formula; an exponential, a division and a root count as one each. Bytes
are those of each operand, once if it is read or written and twice if both.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

from tests.kernels import real_arguments as real
from tests.kernels.real_arguments import MLP, STACKED, TOKENS, D, Make, on_rows
from torch import Tensor

from octavo.hardware import Capabilities
from octavo.ops.attention import PLAIN, AttentionSpec
from octavo.ops.tiles import Phase


class Call(NamedTuple):
    """A call of an operation; `shown`: it is a row of docs/design/kernels-by-gpu.md."""

    operation: str
    text: str  # the shape
    make: Make
    flops: float
    shown: bool = False
    twice: tuple[int, ...] = ()  # arguments that are read and written
    bytes: float | None = None  # where the bytes are not those of the operands

    def moved_bytes(self, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> float:
        if self.bytes is not None:
            return self.bytes
        counted = [arguments, list(named.values()), result, *(arguments[n] for n in self.twice)]
        return sum(float(prod(x.shape)) * x.itemsize for x in tensors_of(counted))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)


# What runs in place of a kernel on a GPU whose dots Triton would not compile for tensor cores.
REFERENCES = {
    "inference.matmul": "cuBLAS",
    "cached_attention.prefill_attention": "reference in PyTorch",
    "softcap.softcapped_forward": "reference in PyTorch",
    "softcap.softcapped_backward": "reference in PyTorch",
}


def not_called(operation: str, text: str, device: Capabilities) -> str:
    """Why no command makes a call on a device; "" if one does."""
    if not operation.startswith("matmul8.") or device.backward_8bit:
        return ""
    if not device.matmul_8bit:
        return "not called: no 8-bit matmuls"
    backward = operation == "matmul8.transpose_into" or text.startswith("gradients")
    return "not called: no 8-bit matmuls in backward" if backward else ""


GPTJ_HEADS, LLAMA_HEADS, SMALL_HEADS, GEMMA_HEADS = (16, 16, 256), (32, 8, 128), (32, 8, 64), (16, 8, 256)
GEMMA = AttentionSpec(256**-0.5, 50.0, 4096)
WEIGHT, SCORES = float(STACKED * D), float(TOKENS**2 / 2)  # elements of a weight; scores of a head that a query sees
X = float(TOKENS * D)  # elements of the residual stream
SMOOTH, GATED = float(TOKENS * MLP), float(TOKENS * 14336)  # results of an activation


def attention(heads: tuple[int, int, int], scores: float, matmuls: int) -> float:
    return 2 * matmuls * scores * heads[0] * heads[2]


def linear(m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k


ANY, PROMPT = Phase.DECODE_ANY_ORDER, Phase.PREFILL
INFERENCE = [
    Call("inference.matmul", "1 row, int8 28672 x 4096", real.matmul(1, STACKED, D, bias=MLP),
         linear(1, STACKED, D), True),
    Call("inference.matmul", "8 rows, int8 28672 x 4096, rank 16", real.matmul(8, STACKED, D, rank=16, bias=MLP),
         linear(8, STACKED, D + 16), True),
    Call("inference.matmul", "32 rows, int8 28672 x 4096, rank 16", real.matmul(32, STACKED, D, rank=16, bias=MLP),
         linear(32, STACKED, D + 16), True),
    Call("inference.matmul", "1 row, int8 4096 x 16384, rank 16",
         real.matmul(1, D, MLP, rank=16, names=1, bias=D, residual=True), linear(1, D, MLP + 16), True),
    Call("inference.matmul", "32 rows, int8 4096 x 14336, rank 64",
         real.matmul(32, D, 14336, rank=64, names=1, residual=True), linear(32, D, 14336 + 64)),
    Call("inference.matmul", "8 rows, nf4 28672 x 4096, rank 16",
         real.matmul(8, STACKED, D, weight="nf4", rank=16, names=2), linear(8, STACKED, D + 16), True),
    Call("inference.matmul", "32 rows, nf4 28672 x 4096, rank 64",
         real.matmul(32, STACKED, D, weight="nf4", rank=64, names=2), linear(32, STACKED, D + 64)),
    Call("inference.matmul", "32 rows, int8 50400 x 4096", real.matmul(32, 50400, D, bias=50400, logits=True),
         linear(32, 50400, D), True),
    Call("inference.matmul", "8 rows, int8 128256 x 4096", real.matmul(8, 128256, D, logits=True),
         linear(8, 128256, D)),
    Call("inference.matmul", "64 rows in any order, int8 28672 x 4096, rank 16",
         real.matmul(64, STACKED, D, ANY, rank=16, bias=MLP), linear(64, STACKED, D + 16), True),
    Call("inference.matmul", "128 rows in any order, int8 28672 x 4096, rank 64",
         real.matmul(128, STACKED, D, ANY, rank=64, names=2), linear(128, STACKED, D + 64)),
    Call("inference.matmul", "128 rows in any order, int8 28672 x 4096", real.matmul(128, STACKED, D, ANY),
         linear(128, STACKED, D)),
    Call("inference.matmul", "prompt of 512, int8 28672 x 4096, rank 16",
         real.matmul(512, STACKED, D, PROMPT, rank=16, bias=MLP), linear(512, STACKED, D + 16), True),
    Call("inference.matmul", "prompt of 64, int8 4096 x 16384, rank 16",
         real.matmul(64, D, MLP, PROMPT, rank=16, names=1, bias=D, residual=True), linear(64, D, MLP + 16)),
    Call("inference.matmul", "prompt of 512, nf4 28672 x 4096", real.matmul(512, STACKED, D, PROMPT, weight="nf4"),
         linear(512, STACKED, D)),
    Call("inference.shrink", "8 rows, 4 x 16 of 4096", real.shrink(8, 64), linear(8, 64, D), True),
    Call("inference.shrink", "32 rows, 4 x 64 of 4096", real.shrink(32, 256), linear(32, 256, D)),
    Call("cached_attention.prefill_attention", "prompt of 512, 16 heads of 256", real.prefill(*GPTJ_HEADS, PLAIN),
         attention(GPTJ_HEADS, 512**2 / 2, 2), True, bytes=2.0 * 512 * 4 * D),
    Call("cached_attention.prefill_attention", "prompt of 512, 32 heads of 128", real.prefill(*LLAMA_HEADS, PLAIN), 0),
    Call("cached_attention.prefill_attention", "prompt of 512, 32 heads of 64", real.prefill(*SMALL_HEADS, PLAIN), 0),
    Call("cached_attention.prefill_attention", "prompt of 512, Gemma 2", real.prefill(*GEMMA_HEADS, GEMMA), 0),
    Call("cached_attention.decode_attention", "8 rows of 2048, 16 heads of 256", real.decode(*GPTJ_HEADS, PLAIN),
         attention(GPTJ_HEADS, 8 * 2048, 2), True),
    Call("cached_attention.decode_attention", "8 rows of 2048, 32 heads of 128", real.decode(*LLAMA_HEADS, PLAIN), 0),
    Call("cached_attention.decode_attention", "8 rows of 2048, 32 heads of 64", real.decode(*SMALL_HEADS, PLAIN), 0),
    Call("cached_attention.decode_attention", "8 rows of 4096, Gemma 2",
         real.decode(*GEMMA_HEADS, GEMMA, held=4096), 0),
]  # fmt: skip
SOFTCAP = [
    Call("softcap.softcapped_forward", "Gemma 2, 16 heads of 256", real.softcapped(*GEMMA_HEADS, backward=False),
         attention(GEMMA_HEADS, SCORES, 2), True),
    Call("softcap.softcapped_backward", "Gemma 2, 16 heads of 256", real.softcapped(*GEMMA_HEADS, backward=True),
         attention(GEMMA_HEADS, SCORES, 5), True),
]  # fmt: skip
for _heads, _text, _named in (
    (GEMMA_HEADS, "16 heads of 256, one document", {"documents": False}),
    (GEMMA_HEADS, "16 heads of 256, window of 4096 in 8192", {"tokens": 8192, "window": 4096}),
    (LLAMA_HEADS, "32 heads of 128", {}), (SMALL_HEADS, "32 heads of 64", {}),
):  # fmt: skip
    for _name, _backward in (("forward", False), ("backward", True)):
        _make = real.softcapped(*_heads, backward=_backward, **_named)
        SOFTCAP.append(Call(f"softcap.softcapped_{_name}", _text, _make, 0))
MATMUL8 = [
    Call("matmul8.quantize_rows_into", "2048 x 4096", real.quantized(D), 4 * X, True),
    Call("matmul8.quantize_rows_into", "2048 x 16384, outliers", real.quantized(MLP, prescale=True), 5 * SMOOTH, True),
    Call("matmul8.quantize_rows_into", "gradients, 2048 x 28672",
         real.quantized(STACKED, gradient=True, prescale=True), 5.0 * TOKENS * STACKED, True),
    Call("matmul8.quantize_rows_into", "gradients, 2048 x 4096", real.quantized(D, gradient=True, prescale=True), 0),
    Call("matmul8.transpose_into", "28672 x 4096", real.transposed(STACKED, D), 0, True),
    Call("matmul8.matmul_8bit_into", "2048 x 4096 x 28672, rank 64", real.matmul_8bit(D, STACKED, rank=64, bias=MLP),
         linear(TOKENS, STACKED, D + 64), True),
    Call("matmul8.matmul_8bit_into", "2048 x 16384 x 4096, rank 32",
         real.matmul_8bit(MLP, D, rank=32, bias=D, residual=True), linear(TOKENS, D, MLP + 32), True),
    Call("matmul8.matmul_8bit_into", "gradients, 2048 x 28672 x 4096, rank 64",
         real.matmul_8bit(STACKED, D, rank=64, gradient=True), linear(TOKENS, D, STACKED + 64), True),
    Call("matmul8.matmul_8bit_into", "2048 x 4096 x 28672, rank 128", real.matmul_8bit(D, STACKED, rank=128), 0),
]  # fmt: skip
WEIGHTS = [
    Call("quantize.int8_into", "28672 x 4096", real.dequantized("int8", STACKED, D), WEIGHT, True),
    Call("quantize.int8_into", "4096 x 14336", real.dequantized("int8", D, 14336), 0),
    Call("quantize.int8_values_into", "28672 x 4096", real.int8_values, WEIGHT, True),
    Call("quantize.dynamic8_into", "28672 x 4096", real.dequantized("dynamic8", STACKED, D), WEIGHT, True),
    Call("quantize4.nf4_as_int8_into", "28672 x 4096", real.nf4_as_int8, 4 * WEIGHT, True),
    Call("quantize4.nf4_into", "28672 x 4096", real.dequantized("nf4", STACKED, D), WEIGHT, True),
    Call("quantize4.nf4_into", "4096 x 14336", real.dequantized("nf4", D, 14336), 0),
    Call("quantize4.nf4_double_into", "28672 x 4096", real.dequantized("nf4-double", STACKED, D), WEIGHT, True),
    Call("lora_factors.pack_b_into", "28672 x (4 x 16 + 8)", real.packed_b(16), 16.0 * STACKED, True),
    Call("lora_factors.pack_b_into", "28672 x (4 x 64 + 8)", real.packed_b(64), 0),
    Call("adam.adam8_", "33,030,144 values", real.step_of_adam(33_030_144), 20 * 33_030_144.0, True, (0, 2)),
]
POINTWISE = [
    Call("pointwise.norm_into", "LayerNorm, 2048 x 4096", real.norm(D, centred=True), 7 * X, True),
    Call("pointwise.norm_into", "RMSNorm, 2048 x 4096", real.norm(D), 0),
    Call("pointwise.norm_into", "RMSNorm of Gemma 2, 2048 x 3584", real.norm(3584, plus_one=True), 0),
    Call("pointwise.norm_into", "RMSNorm of heads, 2048 x 32 x 128", real.norm(128, heads=32), 0),
    Call("pointwise.add_norm_into", "2048 x 4096", real.norm(D, residual=True), 5 * X, True),
    Call("pointwise.add_norm_into", "Gemma 2, 2048 x 3584", real.norm(3584, residual=True, plus_one=True), 0),
    Call("pointwise.norm_backward_into", "LayerNorm, 2048 x 4096", real.norm_backward(D, centred=True), 14 * X, True),
    Call("pointwise.norm_backward_into", "RMSNorm, 2048 x 4096", real.norm_backward(D), 0),
    Call("pointwise.norm_backward_into", "Gemma 2, 2048 x 3584", real.norm_backward(3584, plus_one=True), 0),
    Call("pointwise.copy_into", "2048 x 4096", on_rows(D, D, lambda x, out: (x, out)), 0, True),
    Call("pointwise.gelu_into", "2048 x 16384", on_rows(MLP, MLP, lambda x, out: (x, out)), 9 * SMOOTH, True),
    Call("pointwise.gelu_backward_", "2048 x 16384", on_rows(MLP, MLP, lambda x, dy: (x, dy)), 19 * SMOOTH, True,
         (0, 1)),
    Call("pointwise.gelu_into", "erf, 2048 x 16384", on_rows(MLP, MLP, lambda *xs: xs, approximate="none"), 0),
    Call("pointwise.gelu_backward_", "erf, 2048 x 16384", on_rows(MLP, MLP, lambda *xs: xs, approximate="none"), 0),
    Call("rotary.rotate_into", "2048 x 16 heads, 64 of 256", real.rotation(16, 256, 64, "interleaved"),
         3.0 * TOKENS * 16 * 64, True, bytes=4.0 * TOKENS * 16 * 64 + 8.0 * TOKENS * 32),
    Call("rotary.rotate_into", "2048 x 32 heads of 128, back", real.rotation(32, 128, 128, "half", back=True), 0),
    Call("rotary.norm_rotate_into", "2048 x 32 heads of 128", real.norm_rotation(32, 128, backward=False), 7 * X, True),
    Call("rotary.norm_rotate_into", "Gemma 3", real.norm_rotation(16, 256, backward=False, plus_one=True), 0),
    Call("rotary.norm_rotate_into", "OLMo 2", real.norm_rotation(32, 128, backward=False, of_all=True), 0),
    Call("rotary.norm_rotate_backward_into", "2048 x 32 heads of 128", real.norm_rotation(32, 128, backward=True),
         12 * X, True),
    Call("rotary.norm_rotate_backward_into", "Gemma 3", real.norm_rotation(16, 256, backward=True, plus_one=True), 0),
    Call("rotary.norm_rotate_backward_into", "OLMo 2", real.norm_rotation(32, 128, backward=True, of_all=True), 0),
    Call("loss.cross_entropy_", "512 x 50400", real.losses(50400), 7.0 * 512 * 50400, True, bytes=6.0 * 512 * 50400),
    Call("loss.cross_entropy_", "512 x 128256", real.losses(128256), 0),
    Call("loss.cross_entropy_", "Gemma 2, 128 x 256000", real.losses(256000, rows=128, softcap=30.0), 0),
    Call("loss.cross_entropy_", "no gradient, 512 x 50400", real.losses(50400, gradient=False), 0),
]  # fmt: skip
for _name, _each, _back in (("swiglu", 5, 13), ("geglu", 10, 23)):
    POINTWISE += [
        Call(f"pointwise.{_name}_into", "2048 x 14336", on_rows(28672, 14336, lambda x, out: (x, out)),
             _each * GATED, True),
        Call(f"pointwise.{_name}_backward_", "2048 x 14336", on_rows(28672, 14336, lambda x, dy: (x, dy)),
             _back * GATED, True, (0, 1)),
    ]  # fmt: skip
LORA = [
    Call(f"lora_backward.{_name}_lora_backward_", f"{_text}, rank {_rank}", real.lora_backward(_parts, _f, rank=_rank),
         TOKENS * _f * (_each + 2.0 * _rank * (2 * _parts + 1)), _rank == 16, (0,))
    for _name, _text, _parts, _f, _each in (
        ("gelu", "2048 x 16384", 1, MLP, 19), ("swiglu", "2048 x 14336", 2, 14336, 13),
        ("geglu", "2048 x 14336", 2, 14336, 23),
    )
    for _rank in (16, 64)
]  # fmt: skip
CALLS = [*INFERENCE, *SOFTCAP, *MATMUL8, *WEIGHTS, *POINTWISE, *LORA]
