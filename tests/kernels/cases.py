"""Cases of every Triton kernel: odd shapes, strided columns, in-slot results. What they cover is in domains.py."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from octavo import ops
from octavo.ops import adam, inference, matmul8, softcap
from octavo.ops.attention import PLAIN, AttentionSpec, find_documents
from octavo.ops.linear import LoraSlice
from octavo.ops.lora_backward import LoraOperands
from octavo.ops.quantize import SCHEMES
from octavo.ops.rotary import rotary_table
from octavo.ops.tiles import Phase

for module in iter_modules(ops.__path__):
    import_module(f"octavo.ops.{module.name}")  # so that the table of kernels is whole, whatever a test imports

Case = Callable[[torch.dtype], tuple[tuple[object, ...], dict[str, object], Tensor]]
ON_GPU = torch.cuda.is_available()
# The interpreter runs one program after another, in milliseconds each: sizes are just larger than a tile.
ROWS, OUTPUTS, HEADS, TALL, BROAD = (130, 140, 9, 300, 1040) if ON_GPU else (66, 70, 2, 140, 272)
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1.5e-3}  # float16 rounds to a relative 2^-11 = 4.9e-4
if ON_GPU:  # its exp has an error of some units in the last slot
    TOLERANCES = {torch.float32: 2e-5, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def columns(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """(m, n) random values that are columns of a wider matrix."""
    return torch.randn(m, n + 5).to(dtype)[:, 2 : n + 2]


def norm(*, centred: bool, heads: int = 1, plus_one: bool = False, over: bool = False) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, out = columns(7, heads * 100, dtype), columns(7, heads * 100, dtype)
        out = x if over else out
        bias = torch.randn(100) if centred else None
        return (x, torch.randn(100), bias, 1e-5, out), {"zero_centred_weight": plus_one}, out

    return make


def add_norm(*, centred: bool, plus_one: bool = False, scale: float = 1.0, over: str = "") -> Case:
    """`over` says which operand the result overwrites: "x", "residual" or none."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, residual, out = (columns(7, 100, dtype) for _ in range(3))
        out = {"x": x, "residual": residual}.get(over, out)
        bias = torch.randn(100) if centred else None
        named: dict[str, object] = {"scale": scale, "zero_centred_weight": plus_one}
        return (x, torch.randn(100), bias, 1e-5, residual, out), named, out

    return make


def norm_backward(
    *, centred: bool, heads: int = 1, plus_one: bool = False, scale: float = 1.0, residual: str = "", over: str = ""
) -> Case:
    """`residual` is "given" or ""; `over` says which operand the result overwrites: "x", "residual" or none."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, dy, added, out = (columns(7, heads * 100, dtype) for _ in range(4))
        out = {"x": x, "residual": added}.get(over, out)
        named: dict[str, object] = {"centred": centred, "zero_centred_weight": plus_one, "scale": scale}
        return (x, torch.randn(100), 1e-5, dy, added if residual else None, out), named, out

    return make


def activation(
    inputs: int, outputs: int, *, backward: bool = False, large: bool = False, scale: float = 3, **named: object
) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        both = columns(3, inputs + outputs + 3, dtype)  # with columns of neither between them
        x, other = both[:, :inputs].mul_(scale), both[:, inputs + 3 :]
        if large:
            x[:, :outputs:3] *= 300
        return (x, other), named, both if backward else other

    return make


def pitches(inputs: int, outputs: int, *, over: str) -> Case:
    """An activation's backward; rows of one matrix start at multiples of 16 elements, those of the other do not."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, dy = aligned(64, inputs, dtype), aligned(64, outputs + 8, dtype)[:, :outputs]
        return (x, dy), {}, x if over == "x" else dy

    return make


def lora_backward(parts: int, f: int, *, rank: int, rank_after: int, to_t: bool = True, **named: object) -> Case:
    """An activation's backward with LoRA gradients, by separate kernels."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        m = 70
        x, dy = aligned(m, parts * f, dtype), aligned(m, f, dtype)
        b = torch.randn(parts * f, rank).to(dtype) * f**-0.5 if to_t else None
        t, after = (aligned(m, n, dtype).mul_(m**-0.5) for n in (parts * rank, rank_after))
        return (x, dy, LoraOperands(t, b, after)), named, x

    return make


def rotation(form: str, rotary: int, *, heads: int = 3, rows: int = 1, over: bool = False, back: bool = False) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, out = columns(10, heads * 24, dtype), columns(10, heads * 24, dtype)
        out = x if over else out
        positions = torch.tensor([[9, 10, 11, 12, 13], [0, 1, 0, 1, 2]])[:rows]
        table = rotary_table(positions, torch.rand(rotary // 2))
        return (x, *table, 24, form, out), {"back": True} if back else {}, out

    return make


def norm_rotation(
    form: str, *, of_all: bool = False, heads: int = 3, size: int = 24, rows: int = 1, plus_one: bool = False,
    backward: bool = False, over: bool = False,
) -> Case:  # fmt: skip
    """`of_all`: one norm of all heads. `over`: the gradient overwrites x."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, dy, out = (columns(10, heads * size, dtype) for _ in range(3))
        out = x if over else out
        positions = torch.tensor([[9, 10, 11, 12, 13], [0, 1, 0, 1, 2]])[:rows]
        weight, table = torch.randn(heads * size if of_all else size), rotary_table(positions, torch.rand(size // 2))
        given = (x, weight, 1e-5, *table, size, form, *((dy, out) if backward else (out,)))
        return given, {"zero_centred_weight": plus_one}, out

    return make


def packed_b(n: int, c: int, spans: list[tuple[int, int, int, float]]) -> Case:
    """Adapters by (start, stop, rank, scaling)."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        out = columns(n, c, dtype)
        pairs = [
            LoraSlice(start, stop, torch.empty(rank, 1), torch.randn(stop - start, rank), scaling)
            for start, stop, rank, scaling in spans
        ]
        return (out, pairs), {}, out

    return make


def dequantized(scheme: str, n: int = 9, k: int = 1111) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        parts = SCHEMES[scheme].quantize(torch.randn(n, k))
        out = columns(n, k, dtype)
        return (*(parts[part] for part in parts), out), {}, out

    return make


def int8_values(n: int, k: int, step: float) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        out = columns(n, k, dtype)
        return (torch.randint(-127, 128, (n, k), dtype=torch.int8), step, out), {}, out

    return make


def losses(
    vocabulary: int, labels: list[int], *, gradient: bool, hidden: bool = False, softcap: float | None = None
) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        logits = columns(len(labels), vocabulary, dtype).mul_(4)
        if hidden:
            logits[:, 1::2] = float("-inf")
        return (logits, torch.tensor(labels)), {"gradient": gradient, "softcap": softcap}, logits

    return make


def matmul(
    m: int, k: int, n: int, *, bias: bool = False, rank: int = 0, residual: bool = False, phase: Phase = Phase.DECODE,
    weight: str = "int8", wide: bool = False,
) -> Case:  # fmt: skip
    """A matmul of m rows; with `rank` two names, and the base model and two adapters. `wide`: its result is float32."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        # The reference rounds each term. Sums that cancel have a larger relative error, so values are small.
        x, size = columns(m, k, dtype), 0.3 if m * n > 4000 else 1.0
        matrix = torch.randn(n, k) * k**-0.5 * size
        parts = SCHEMES["int8"].quantize(matrix)
        given = (parts["weight"], parts["absmax"]) if weight == "int8" else (matrix.to(dtype), None)
        named: dict[str, object] = {"phase": phase} | ({"dtype": torch.float32} if wide else {})
        if bias:
            named |= {"bias": torch.randn(n // 2), "bias_start": n // 4}
        if rank:
            adapter_ids, b, names = torch.arange(m) % 3, torch.randn(3, rank, n).to(dtype), torch.zeros(n).int()
            b[0], names[n // 3 :] = 0, 1
            inner = torch.randn(m, 2 * rank).mul_(rank**-0.5 * size)
            named["lora"] = inference.BatchedLora(inner, b, adapter_ids, names, ((0, n // 3), (n // 3, n)))
        if residual:
            named["residual"] = columns(m, n, dtype).mul_(size)
        return (x, *given), named, x

    return make


def aligned(m: int, n: int, dtype: torch.dtype) -> Tensor:
    """As `columns`, with rows that start at multiples of 16 bytes, for TMA."""
    return torch.randn(m, n + 32).to(dtype)[:, 16 : n + 16]


def quantized(
    m: int, k: int, kind: torch.dtype, *, prescale: bool = False, outliers: bool = False, groups: bool = False
) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        quantized, scale = (
            aligned(m, k, torch.float32).to(kind),
            torch.full((m, -(-k // matmul8.GROUP_SIZE)) if groups else (m,), 7.0),
        )
        factors = torch.full((k,), 127.0).index_fill_(0, torch.arange(0, k, 7), 0) if outliers else torch.rand(k) + 0.5
        return (columns(m, k, dtype), quantized, scale, factors if prescale or outliers else None), {}, quantized

    return make


def transposed(n: int, k: int, kind: torch.dtype = matmul8.FP8) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        out = aligned(k, n, torch.float32).to(kind)
        return (torch.randint(-127, 128, (n, k), dtype=torch.int8), out), {}, out

    return make


def matmul_8bit(
    m: int,
    k: int,
    n: int,
    kind: torch.dtype,
    *,
    scaled: bool = False,
    bias: bool = False,
    rank: int = 0,
    residual: str = "",
    groups: bool = False,
) -> Case:  # fmt: skip
    """An 8-bit matmul; `residual` is "out", which is overwritten, or another matrix."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, w = (matmul8.quantize_rows(torch.randn(rows, k) * k**-0.25, kind, groups=groups) for rows in (m, n))
        out = aligned(m, n, dtype)
        named: dict[str, object] = {"absmax": w.scale * 127} if scaled else {}
        if bias:
            named |= {"bias": torch.randn(n // 2), "bias_start": n // 4}
        if rank:
            named["low_rank"] = matmul8.LowRankTerm(aligned(m, rank, dtype), aligned(n, rank, dtype).mul_(rank**-0.5))
        if residual:
            named["residual"] = out if residual == "out" else aligned(m, n, dtype)
        return (x.values, x.scale if scaled else x.scale * 0.01, w.values, out), named, out

    return make


def nf4_to_int8(n: int, k: int) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        parts, out = SCHEMES["nf4"].quantize(torch.randn(n, k)), columns(n, k, torch.float32).to(torch.int8)
        return (parts["weight"], parts["absmax"], parts["absmax"].view(n, -1).amax(dim=1), out), {}, out

    return make


def shrink(m: int, k: int, j: int) -> Case:
    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        x, a = columns(m, k, dtype), (torch.randn(3, j, k) * k**-0.5).to(dtype)
        a[0] = 0
        return (x, a, torch.arange(m) % 3, Phase.DECODE), {}, x

    return make


def decode(
    lengths: list[int], max_len: int, *, heads: int, groups: int, size: int, spec: AttentionSpec = PLAIN
) -> Case:
    """Slots of one layer of a cache of two; what is rank_after their lengths is far from anything."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        m = len(lengths)
        cache = torch.randn(2, 2, m + 1, max_len, groups, size).to(dtype)
        for slot, length in enumerate(lengths):
            cache[:, :, slot, max(length, 0) :] = 1000  # none if the positions have wrapped around
        q, k, v = columns(m, (heads + 2 * groups) * size, dtype).split([heads * size, groups * size, groups * size], 1)
        given = q.unflatten(1, (heads, size)), k.unflatten(1, (groups, size)), v.unflatten(1, (groups, size))
        keys, values = cache[:, 1, :m]
        arguments = (*given, keys, values, torch.tensor(lengths), max(lengths), spec)
        return arguments, {}, cache.flatten(0, 2).flatten(1)

    return make


def prefill(
    length: int, starts: list[int], slots: list[int] | None = None, *, heads: int, groups: int, size: int,
    spec: AttentionSpec = PLAIN, held: int = 0,
) -> Case:  # fmt: skip
    """New positions of some slots of one layer of a cache of two; what is rank_after them is far from anything."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        slot_ids, max_len = slots or list(range(len(starts))), held or max(starts) + length + 9
        cache = torch.randn(2, 2, max(slot_ids) + 1, max_len, groups, size).to(dtype)
        for slot, start in zip(slot_ids, starts, strict=True):
            cache[:, :, slot, start + length :] = 1000
        u = columns(len(starts) * length, (heads + 2 * groups) * size, dtype)[:, : heads * size]
        q = u.unflatten(0, (len(starts), length)).unflatten(-1, (heads, size))
        # Columns of a wider tensor, as in the one input of a CUDA graph.
        wide = torch.tensor([starts, slot_ids]).T.contiguous()
        return (q, *cache[:, 1], wide[:, 0], None if slots is None else wide[:, 1], spec), {}, u

    return make


def softcapped(
    lengths: list[list[int]], *, heads: int, groups: int, size: int, spec: softcap.CappedSpec, backward: bool = False
) -> Case:
    """Soft-capped attention over rows of documents with these lengths; q, k and v are columns of one matrix."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        rows, length = len(lengths), sum(lengths[0])
        sizes = [heads * size, groups * size, groups * size]
        u = columns(rows * length, sum(sizes), dtype)
        parts = [x.unflatten(1, (-1, size)).unflatten(0, (rows, length)) for x in u.split(sizes, dim=1)]
        numbers = [[n for n, count in enumerate(row) for _ in range(count)] for row in lengths]
        documents = find_documents(torch.tensor(numbers, device="cpu"), u.device)  # as a loader passes it
        extents = None if documents is None else documents.extents
        if not backward:
            return (*parts, spec, extents), {}, u
        saved = softcap.softcapped_forward.__wrapped__(*parts, spec, extents)  # type: ignore[attr-defined]
        grad = columns(rows * length, heads * size, dtype).mul_(0.3)  # sums that cancel have a larger relative error
        grad = grad.unflatten(1, (heads, size)).unflatten(0, (rows, length))
        return (*parts, *saved, grad, spec, extents), {}, u

    return make


# Attention over one document and over several: of one position, of the sizes of blocks, and after their ends.
SOFTCAPPED: list[tuple[list[list[int]], dict[str, Any]]] = [
    ([[70], [70]], {"heads": 2, "groups": 1, "size": 16, "spec": softcap.CappedSpec(0.5, 2.0)}),
    ([[1, 31, 33, 5], [64, 6]], {"heads": 4, "groups": 2, "size": 24, "spec": softcap.CappedSpec(0.2, 5.0)}),
    ([[1, 31, 33, 5], [64, 6]], {"heads": 4, "groups": 1, "size": 16, "spec": softcap.CappedSpec(0.5, 2.0, 17)}),
    ([[40]], {"heads": 1, "groups": 1, "size": 104, "spec": softcap.CappedSpec(0.1, 0.7, 1)}),
]


def step_of_adam(n: int) -> Case:
    """A step from moments that are not zero; the parameters are columns of a wider row."""

    def make(dtype: torch.dtype) -> tuple[tuple[object, ...], dict[str, object], Tensor]:
        values, gradient = columns(1, n, torch.float32)[0], torch.randn(n)
        moments = adam.no_moments(values)
        for codes, absmax in zip(moments[:2], moments[2:], strict=True):
            codes.copy_(torch.randint(20, 256, (n,)))
            absmax.copy_(torch.rand(len(absmax)) + 0.1)
        return (values, gradient, moments, torch.tensor(0.5), adam.Rates(0.9, 0.99, 1e-8, 0.99, 0.1, 0.5)), {}, values

    return make


CASES: dict[str, list[Case]] = {
    "adam.adam8_": [step_of_adam(5000), step_of_adam(255)],
    "inference.matmul": [
        matmul(1, 1300, 70), matmul(1, 70, 33, bias=True, rank=3, residual=True), matmul(2, 1300, 70, bias=True),
        matmul(5, 2100, 70, residual=True), matmul(17, 1300, 70, rank=5), matmul(5, 700, 70, rank=5),
        matmul(33, 520, 70, bias=True, rank=3, residual=True), matmul(70, 200, 70, residual=True),
        matmul(ROWS, 200, OUTPUTS, rank=5, residual=True),
        matmul(3, 300, 70, weight="float", bias=True, residual=True),
        matmul(3, 2100, 70, wide=True), matmul(5, 300, 70, phase=Phase.PREFILL, rank=5, residual=True),
        matmul(ROWS, 1300, OUTPUTS, phase=Phase.PREFILL, weight="float"),
        matmul(ROWS, 200, OUTPUTS, phase=Phase.PREFILL, rank=3, bias=True, residual=True),
        matmul(40 if ON_GPU else ROWS, 1300, OUTPUTS, phase=Phase.DECODE_ANY_ORDER, rank=5, residual=True),
        matmul(70, 200, OUTPUTS, phase=Phase.DECODE_ANY_ORDER),
    ],
    "inference.shrink": [shrink(1, 1300, 6), shrink(7, 70, 9)],
    "cached_attention.prefill_attention": [
        prefill(5, [0, 9], heads=4, groups=2, size=24),
        prefill(70, [64, 0, 3], [4, 0, 2], heads=3, groups=1, size=16),
        prefill(70, [0, 200, 9], heads=4, groups=2, size=24, spec=AttentionSpec(window=33)),
        prefill(70, [0, 150, 9], [1, 3, 0], heads=2, groups=1, size=16, spec=AttentionSpec(window=17), held=128),
        prefill(40, [3, 70], heads=2, groups=1, size=16, spec=AttentionSpec(0.5, softcap=2.0)),
        prefill(40, [3, 70], heads=2, groups=2, size=16, spec=AttentionSpec(0.5, softcap=2.0, window=1)),
        prefill(1, [130], heads=2, groups=2, size=8), prefill(64, [0], [1], heads=2, groups=1, size=136),
    ],
    "cached_attention.decode_attention": [
        decode([0, 5, -1, 299, 127, 128, 31, 32], 300, heads=4, groups=2, size=24),
        decode([0, 5, -1, 299, 127, 128, 31, 32], 300, heads=4, groups=2, size=24, spec=AttentionSpec(window=40)),
        decode([700, 64, 3, 63], 64, heads=2, groups=1, size=16, spec=AttentionSpec(window=64)),
        decode([90, 5, 33], 100, heads=2, groups=1, size=16, spec=AttentionSpec(1.5, softcap=3.0, window=1)),
        decode([90, 5, 31], 100, heads=2, groups=2, size=16, spec=AttentionSpec(0.5, softcap=3.0)),
        decode([3], 40, heads=2, groups=2, size=16), decode([260, 7], 288, heads=6, groups=1, size=16),
        decode([70, -1, 63, 64], 90, heads=2 * HEADS, groups=2, size=8), decode([600], 640, heads=2, groups=1, size=8),
        decode([130, 127, 128], 150, heads=15 if ON_GPU else 3, groups=3 if ON_GPU else 1, size=8),
    ],
    "softcap.softcapped_forward": [softcapped(lengths, **named) for lengths, named in SOFTCAPPED],
    "softcap.softcapped_backward": [softcapped(lengths, backward=True, **named) for lengths, named in SOFTCAPPED],
    "matmul8.quantize_rows_into": [
        quantized(5, 100, torch.int8), quantized(3, 2100, torch.int8, prescale=True),
        quantized(3, 2100, torch.int8, outliers=True), quantized(5, 100, matmul8.FP8),
        quantized(3, 2100, matmul8.FP8, prescale=True), quantized(3, 2100, torch.int8, prescale=True, groups=True),
        quantized(5, 100, torch.int8, groups=True), quantized(2, 384, torch.int8, groups=True),
        quantized(2, 16400, torch.int8), quantized(3, 20000, torch.int8, outliers=True),
        quantized(3, 20000, matmul8.FP8, prescale=True),
    ],
    "matmul8.transpose_into": [transposed(144, 272), transposed(16, 48), transposed(48, 144, torch.int8)],
    "matmul8.matmul_8bit_into": [
        matmul_8bit(130, 272, 144, torch.int8, scaled=True, bias=True, rank=24, residual="other"),
        matmul_8bit(7, 48, 16, torch.int8, scaled=True), matmul_8bit(9, 48, 32, torch.int8, scaled=True, rank=80),
        matmul_8bit(2, 144, 288, torch.int8, scaled=True, residual="out"),
        matmul_8bit(130, 272, 144, matmul8.FP8, rank=16),
        matmul_8bit(TALL, 32, BROAD, matmul8.FP8, scaled=True, bias=True, rank=8),
        matmul_8bit(130, 400, 144, torch.int8, rank=16, groups=True), matmul_8bit(7, 128, 32, torch.int8, groups=True),
        matmul_8bit(9, 272, 48, torch.int8, bias=True, residual="out", groups=True),
        matmul_8bit(TALL, 1040, 400 if ON_GPU else 144, torch.int8, scaled=True, bias=True, rank=80, residual="out"),
    ],
    "quantize.int8_values_into": [int8_values(9, 1111, 1.0), int8_values(2, 4500, 2.0**-7)],
    "quantize.int8_into": [dequantized("int8"), dequantized("int8", 2, 4500)],
    "quantize.dynamic8_into": [dequantized("dynamic8"), dequantized("dynamic8", 2, 4500)],
    "quantize4.nf4_as_int8_into": [nf4_to_int8(3, 128), nf4_to_int8(2, 4544)],
    "quantize4.nf4_into": [dequantized("nf4"), dequantized("nf4", 2, 4500), dequantized("nf4", 1, 1)],
    "quantize4.nf4_double_into": [
        dequantized("nf4-double"), dequantized("nf4-double", 4, 4500), dequantized("nf4-double", 1, 1),
        dequantized("nf4-double", 5, 4544), dequantized("nf4-double", 3, 64),
    ],
    "pointwise.norm_into": [
        norm(centred=True), norm(centred=False), norm(centred=False, plus_one=True, over=True),
        norm(centred=False, heads=3), norm(centred=False, heads=2, plus_one=True),
    ],
    "pointwise.add_norm_into": [
        add_norm(centred=True, scale=0.3), add_norm(centred=False), add_norm(centred=False, plus_one=True, over="x"),
        add_norm(centred=False, plus_one=True, scale=0.3, over="residual"),
    ],
    "pointwise.norm_backward_into": [
        norm_backward(centred=True, residual="given"), norm_backward(centred=False, residual="given"),
        norm_backward(centred=True, residual="given", over="residual"), norm_backward(centred=False, plus_one=True),
        norm_backward(centred=False, heads=3, over="x"),
        norm_backward(centred=False, heads=2, plus_one=True, residual="given"),
        norm_backward(centred=False, plus_one=True, scale=0.3, over="x"),
        norm_backward(centred=True, residual="given", scale=3.0),
    ],
    "pointwise.copy_into": [activation(2100, 2100)],
    "pointwise.gelu_into": [
        activation(2100, 2100), activation(2100, 2100, large=True), activation(2100, 2100, approximate="none"),
        activation(70, 70, large=True, approximate="none"),
    ],
    "pointwise.gelu_backward_": [
        activation(2100, 2100, backward=True), activation(70, 70, backward=True, large=True),
        activation(2100, 2100, backward=True, approximate="none"),
        activation(70, 70, backward=True, large=True, approximate="none"),
        pitches(2048, 2048, over="x"), pitches(2048, 2048, over="dy"),
    ],
    "pointwise.swiglu_into": [activation(4200, 2100), activation(4200, 2100, large=True)],
    "pointwise.swiglu_backward_": [
        activation(4200, 2100, backward=True), activation(70, 35, backward=True, large=True),
        pitches(4096, 2048, over="x"), pitches(4096, 2048, over="dy"),
    ],
    "pointwise.geglu_into": [activation(4200, 2100), activation(4200, 2100, large=True)],
    "pointwise.geglu_backward_": [
        # Its reference has 1 + tanh(z), which loses digits where the gate is under -4: times `up` they would show.
        activation(4200, 2100, backward=True, scale=1), activation(70, 35, backward=True, large=True, scale=1),
        pitches(4096, 2048, over="x"), pitches(4096, 2048, over="dy"),
    ],
    "rotary.rotate_into": [
        rotation("interleaved", 8), rotation("half", 24), rotation("interleaved", 24, heads=11, rows=2, over=True),
        rotation("half", 24, heads=9, rows=2, over=True), rotation("interleaved", 8, heads=9, over=True, back=True),
        rotation("interleaved", 12, rows=2, back=True), rotation("half", 24, over=True, back=True),
    ],
    "rotary.norm_rotate_into": [
        norm_rotation("half", heads=5), norm_rotation("half", heads=3, size=160, rows=2, plus_one=True),
        norm_rotation("half", of_all=True, rows=2), norm_rotation("interleaved", heads=11, rows=2),
        norm_rotation("interleaved", of_all=True, plus_one=True), norm_rotation("half", heads=19, size=128),
    ],
    "rotary.norm_rotate_backward_into": [
        norm_rotation("half", heads=5, backward=True, over=True),
        norm_rotation("half", heads=3, size=160, rows=2, plus_one=True, backward=True),
        norm_rotation("half", of_all=True, rows=2, backward=True, over=True),
        norm_rotation("interleaved", heads=11, rows=2, backward=True),
        norm_rotation("interleaved", of_all=True, plus_one=True, backward=True, over=True),
        norm_rotation("half", heads=19, size=128, backward=True, over=True),
    ],
    "lora_backward.gelu_lora_backward_": [
        lora_backward(1, 200, rank=16, rank_after=8), lora_backward(1, 200, rank=5, rank_after=40, to_t=False),
        lora_backward(1, 200, rank=40, rank_after=5), lora_backward(1, 72, rank=5, rank_after=8, approximate="none"),
    ],
    "lora_backward.swiglu_lora_backward_": [
        lora_backward(2, 200, rank=16, rank_after=8), lora_backward(2, 72, rank=5, rank_after=40),
        lora_backward(2, 72, rank=5, rank_after=40, to_t=False),
    ],
    "lora_backward.geglu_lora_backward_": [
        lora_backward(2, 200, rank=16, rank_after=8), lora_backward(2, 72, rank=5, rank_after=40),
        lora_backward(2, 72, rank=5, rank_after=40, to_t=False),
    ],
    "lora_factors.pack_b_into": [
        packed_b(70, 48, [(0, 30, 8, 2.0), (30, 50, 16, 0.5), (60, 70, 5, 3.0)]),
        packed_b(300, 16, [(0, 300, 16, 1.7)]),
        packed_b(20, 8, []), packed_b(5, 2100, [(1, 3, 2000, 1.0)]),
    ],
    "loss.cross_entropy_": [
        losses(9001, [0, 9000, -100, 5000], gradient=True), losses(9001, [0, 9000, -100, 5000], gradient=False),
        losses(37, [36, -100, 0], gradient=True), losses(37, [-100, -100], gradient=True),
        losses(9001, [0, 9000, 8192], gradient=True, hidden=True),
        losses(9001, [0, 9000, -100, 5000], gradient=True, softcap=5.0),
        losses(37, [36, -100, 0], gradient=True, softcap=30.0), losses(37, [5, 0], gradient=False, softcap=0.5),
    ],
}  # fmt: skip
