"""Arguments of operations in the shapes of models, without values: `torch.empty`, whose pages are never touched.

A function here makes a `Make`, which takes the compute dtype and the device's capabilities. Calls of them and the
dimensions of the models are in real_calls.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from octavo.hardware import Capabilities
from octavo.ops import adam, matmul8
from octavo.ops.attention import AttentionSpec
from octavo.ops.inference import BatchedLora
from octavo.ops.linear import LoraSlice
from octavo.ops.lora_backward import LoraOperands
from octavo.ops.quantize import SCHEMES
from octavo.ops.softcap import CappedSpec, Extents
from octavo.ops.tiles import Phase

TOKENS, D, STACKED, MLP = 2048, 4096, 28672, 16384  # of a micro-batch; the others of GPT-J-6B
EXTRA = 72  # columns of LoRA (4 x 16) and bias behind those of a stacked weight, a multiple of 8
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Make = Callable[[torch.dtype, Capabilities], Arguments]
float32, int32, int8 = torch.float32, torch.int32, torch.int8


def wide(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """(m, n), the first columns of the input or the weight of a fused GEMM."""
    return torch.empty(m, n + EXTRA, dtype=dtype)[:, :n]


def on_rows(n: int, outputs: int, make: Callable[..., tuple[Any, ...]], **named: Any) -> Make:
    """An operation over x (TOKENS, n) and out (TOKENS, outputs): `make(x, out)` are its arguments."""
    return lambda dtype, _: (make(wide(TOKENS, n, dtype), wide(TOKENS, outputs, dtype)), named)


def matmul(
    m: int, n: int, k: int, phase: Phase = Phase.DECODE, *, weight: str = "int8", rank: int = 0, names: int = 4,
    bias: int = 0, residual: bool = False, logits: bool = False,
) -> Make:  # fmt: skip
    """A matmul of inference with a weight (n, k); an nf4 weight is dequantized before, to the dtype of x."""

    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        w = torch.empty(n, k, dtype=int8 if weight == "int8" else dtype)
        named: dict[str, Any] = {"phase": phase} | ({"dtype": float32} if logits else {})
        if bias:
            named |= {"bias": torch.empty(bias), "bias_start": n - bias}
        if rank:
            t, b = torch.empty(m, names * rank), torch.empty(4, rank, n, dtype=dtype)
            named["lora"] = BatchedLora(t, b, torch.empty(m, dtype=torch.int64), torch.empty(n, dtype=int32), ())
        if residual:
            named["residual"] = torch.empty(m, n, dtype=dtype)
        return (torch.empty(m, k, dtype=dtype), w, torch.empty(n) if weight == "int8" else None), named

    return make


def dequantized(scheme: str, n: int, k: int) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        parts = SCHEMES[scheme].layout((n, k), dtype).values()
        return (*(torch.empty(shape, dtype=kind) for shape, kind in parts), wide(n, k, dtype)), {}

    return make


def nf4_as_int8(dtype: torch.dtype, device: Capabilities) -> Arguments:
    codes, absmax = dequantized("nf4", STACKED, D)(dtype, device)[0][:2]
    return (codes, absmax, torch.empty(STACKED), torch.empty(STACKED, D, dtype=int8)), {}


def decode(heads: int, groups: int, size: int, spec: AttentionSpec, *, rows: int = 8, held: int = 2048) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        u = torch.empty(rows, (heads + 2 * groups) * size, dtype=dtype)
        q, k, v = (x.unflatten(1, (-1, size)) for x in u.split([heads * size, groups * size, groups * size], 1))
        cache = torch.empty(2, 2, rows + 1, held, groups, size, dtype=dtype)[:, 1, :rows]
        return (q, k, v, *cache, torch.empty(rows, dtype=torch.int64), held, spec), {}

    return make


def prefill(heads: int, groups: int, size: int, spec: AttentionSpec, *, tokens: int = 512) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        u = torch.empty(tokens, (heads + 2 * groups) * size, dtype=dtype)[:, : heads * size]
        cache = torch.empty(2, 2, 2, 8192, groups, size, dtype=dtype)[:, 1]
        starts_and_slots = torch.empty(1, 2, dtype=torch.int64)
        q = u.unflatten(0, (1, tokens)).unflatten(-1, (heads, size))
        return (q, *cache, starts_and_slots[:, 0], starts_and_slots[:, 1], spec), {}

    return make


def softcapped(
    heads: int, groups: int, size: int, *, backward: bool, documents: bool = True, tokens: int = TOKENS,
    window: int | None = None,
) -> Make:  # fmt: skip
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        u = torch.empty(tokens, (heads + 2 * groups) * size, dtype=dtype)
        parts = [x.unflatten(1, (-1, size))[None] for x in u.split([heads * size, groups * size, groups * size], 1)]
        extents = Extents(*(torch.empty(1, tokens, dtype=int32) for _ in range(2))) if documents else None
        spec = CappedSpec(size**-0.5, 50.0, window)
        if not backward:
            return (*parts, spec, extents), {}
        out = torch.empty(1, tokens, heads, size, dtype=dtype)
        return (*parts, out, torch.empty(1, heads, tokens), torch.empty_like(out), spec, extents), {}

    return make


def quantized(k: int, *, gradient: bool = False, prescale: bool = False) -> Make:
    """`gradient`: in the dtype of gradients; int8 has a scale for each group of a gradient's row."""

    def make(dtype: torch.dtype, device: Capabilities) -> Arguments:
        kind = matmul8.gradient_type_for(device) if gradient else int8
        shape = (TOKENS, k // matmul8.GROUP_SIZE) if gradient and kind == int8 else (TOKENS,)
        factors = torch.empty(k) if prescale else None
        return (wide(TOKENS, k, dtype), torch.empty(TOKENS, k, dtype=kind), torch.empty(shape), factors), {}

    return make


def transposed(n: int, k: int) -> Make:
    def make(dtype: torch.dtype, device: Capabilities) -> Arguments:
        out = torch.empty(k, n, dtype=matmul8.gradient_type_for(device))
        return (torch.empty(n, k, dtype=int8), out), {}

    return make


def matmul_8bit(k: int, n: int, *, rank: int, bias: int = 0, residual: bool = False, gradient: bool = False) -> Make:
    """The matmul of training of (TOKENS, k) with (n, k); `gradient`: that of backward."""

    def make(dtype: torch.dtype, device: Capabilities) -> Arguments:
        kind = matmul8.gradient_type_for(device) if gradient else int8
        shape = (TOKENS, k // matmul8.GROUP_SIZE) if gradient and kind == int8 else (TOKENS,)
        out = torch.empty(TOKENS, n, dtype=dtype)
        named: dict[str, Any] = {} if gradient else {"absmax": torch.empty(n)}
        named["low_rank"] = matmul8.LowRankTerm(
            torch.empty(TOKENS, rank + 8, dtype=dtype)[:, :rank], torch.empty(n, rank + 8, dtype=dtype)[:, :rank]
        )
        if bias:
            named |= {"bias": torch.empty(bias), "bias_start": n - bias}
        if residual:
            named["residual"] = torch.empty(TOKENS, n, dtype=dtype)
        values = torch.empty(TOKENS, k, dtype=kind), torch.empty(shape), torch.empty(n, k, dtype=kind)
        return (*values, out), named

    return make


def lora_backward(parts: int, f: int, *, rank: int) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        x, dy = torch.empty(TOKENS, 12288 + parts * f, dtype=dtype)[:, 12288:], wide(TOKENS, f, dtype)
        t, after = (torch.empty(TOKENS, n * rank + 8, dtype=dtype)[:, : n * rank] for n in (parts, 1))
        return (x, dy, LoraOperands(t, torch.empty(parts * f, rank, dtype=dtype), after)), {}

    return make


def rotation(heads: int, size: int, rotary: int, form: str, *, back: bool = False) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        u = wide(TOKENS, STACKED, dtype)
        table = (torch.empty(1, TOKENS, 1, rotary // 2) for _ in range(2))
        return (u[:, : heads * size], *table, size, form, u[:, : heads * size]), {"back": back}

    return make


def norm_rotation(heads: int, size: int, *, backward: bool, of_all: bool = False, plus_one: bool = False) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        x = wide(TOKENS, 3 * heads * size, dtype)[:, : heads * size]
        dy, out = (torch.empty(TOKENS, heads * size, dtype=dtype) for _ in range(2))
        table = (torch.empty(1, TOKENS, 1, size // 2) for _ in range(2))
        weight = torch.empty(heads * size if of_all else size)
        given = (x, weight, 1e-6, *table, size, "half", *((dy, x) if backward else (out,)))
        return given, {"zero_centred_weight": plus_one}

    return make


def packed_b(rank: int) -> Make:
    """B of q, k, v and fc_in of GPT-J-6B."""

    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        ends = [0, 4096, 8192, 12288, STACKED]
        loras = [
            LoraSlice(start, stop, torch.empty(rank, D), torch.empty(stop - start, rank), 2.0)
            for start, stop in pairwise(ends)
        ]
        return (torch.empty(STACKED, D + 4 * rank + 8, dtype=dtype)[:, D:], loras), {}

    return make


def losses(vocabulary: int, *, rows: int = 512, softcap: float | None = None, gradient: bool = True) -> Make:
    """Of some rows at a time, as the fused loss computes logits."""

    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        named: dict[str, Any] = {"gradient": gradient, "softcap": softcap}
        return (torch.empty(rows, vocabulary, dtype=dtype), torch.empty(rows, dtype=torch.int64)), named

    return make


def step_of_adam(n: int) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        codes = [torch.empty(n, dtype=torch.uint8) for _ in range(2)]
        moments = adam.Moments(*codes, *(torch.empty(-(-n // adam.BLOCK)) for _ in range(2)))
        rates = adam.Rates(0.9, 0.99, 1e-8, 0.99, 0.1, 0.5)
        return (torch.empty(n), torch.empty(n), moments, torch.empty(()), rates), {}

    return make


def shrink(m: int, j: int) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        a, adapter_ids = torch.empty(4, j, D, dtype=dtype), torch.empty(m, dtype=torch.int64)
        return (torch.empty(m, D, dtype=dtype), a, adapter_ids, Phase.DECODE), {}

    return make


def int8_values(dtype: torch.dtype, _: Capabilities) -> Arguments:
    return (torch.empty(STACKED, D, dtype=int8), 2.0**-7, wide(STACKED, D, dtype)), {}


def norm(d: int, *, heads: int = 1, centred: bool = False, residual: bool = False, plus_one: bool = False) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        x, added = (torch.empty(TOKENS, heads * d, dtype=dtype) for _ in range(2))
        bias = torch.empty(d) if centred else None
        given = (x, torch.empty(d), bias, 1e-5, *((added,) if residual else ()), wide(TOKENS, heads * d, dtype))
        return given, {"zero_centred_weight": plus_one}

    return make


def norm_backward(d: int, *, centred: bool = False, plus_one: bool = False) -> Make:
    def make(dtype: torch.dtype, _: Capabilities) -> Arguments:
        x, residual, out = (torch.empty(TOKENS, d, dtype=dtype) for _ in range(3))
        named = {"centred": centred, "zero_centred_weight": plus_one}
        return (x, torch.empty(d), 1e-5, wide(TOKENS, d, dtype), residual, out), named

    return make
