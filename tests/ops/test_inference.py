"""Matmuls of inference, against dequantized weights; and no bit of a row depends on the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.inference import BatchedLora, matmul, shrink
from octavo.ops.quantize import SCHEMES, dequantize
from octavo.ops.tiles import PREFILL_TILE, Phase, decode_tile, matmul_in_tiles

K, N, R = 96, 40, 3
SPANS = ((0, 15), (15, N))
# of the sum of the terms' sizes: roundings of the matmul, of its scaling and of each added term to the type
TOLERANCE = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def weights() -> tuple[dict[str, Tensor], Tensor]:
    parts = SCHEMES["int8"].quantize(torch.randn(N, K) * torch.logspace(-2, 2, N)[:, None])
    return parts, dequantize(SCHEMES["int8"], parts, (N, K))


def adapters(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, the number of each row): the base and two adapters."""
    a, b = torch.randn(3, 2 * R, K).to(dtype), torch.randn(3, R, N).to(dtype)
    a[0], b[0] = 0, 0
    return a, b, torch.arange(m) % 3


NAMES = torch.tensor([0] * 15 + [1] * (N - 15), dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("m", [1, 17, 65])
@pytest.mark.parametrize("added", [False, True])
def test_a_matmul_of_int8_weights_is_that_of_the_dequantized_matrix(
    dtype: torch.dtype, phase: Phase, m: int, added: bool
) -> None:
    torch.manual_seed(m)
    parts, matrix = weights()
    x = (torch.randn(m, K + 7) * 2).to(dtype)[:, 3 : K + 3]
    wanted, size = F.linear(x.float(), matrix), F.linear(x.float().abs(), matrix.abs())
    named: dict[str, Any] = {}
    if added:
        bias, residual, (a, b, numbers) = torch.randn(11), torch.randn(m, N).to(dtype), adapters(m, dtype)
        lora = BatchedLora(shrink(x, a, numbers, phase), b, numbers, NAMES, SPANS)
        named = {"bias": bias, "bias_start": 5, "lora": lora, "residual": residual}
        wanted[:, 5:16] += bias
        for row in range(m):
            inner = a[numbers[row]].float() @ x[row].float()
            for (start, stop), t in zip(SPANS, inner.split(R), strict=True):
                wanted[row, start:stop] += t @ b[numbers[row]].float()[:, start:stop]
        wanted += residual.float()
        size += residual.float().abs() + bias.abs().max() + (lora.t.abs().sum(1) * b.abs().max())[:, None]
    actual = matmul(x, parts["weight"], parts["absmax"], phase=phase, **named)
    assert actual.dtype == dtype
    assert ((actual.float() - wanted).abs() / size).max() < TOLERANCE[dtype]


def test_int8_values_that_sum_past_float16_are_no_infinity() -> None:
    codes, absmax = torch.full((2, 4096), 127, dtype=torch.int8), torch.tensor([1.0, 0.01])
    actual = matmul(torch.ones(1, 4096, dtype=torch.float16), codes, absmax, phase=Phase.DECODE)
    torch.testing.assert_close(actual.float(), torch.tensor([[4096.0, 40.96]]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["int8", "float"])
def test_float32_results_of_shorter_inputs_are_not_rounded_to_their_type(kind: str) -> None:
    """bfloat16 has 8 digits (binary), so the same result rounded to it would be 2^-9 off, a thousand times as far."""
    torch.manual_seed(0)
    parts, matrix = weights()
    weight, absmax = (parts["weight"], parts["absmax"]) if kind == "int8" else (matrix.bfloat16(), None)
    x = torch.randn(5, K).bfloat16()
    wanted = x.double() @ (matrix.double() if kind == "int8" else weight.double()).T
    size = x.double().abs() @ matrix.double().abs().T
    actual = matmul(x, weight, absmax, phase=Phase.DECODE, dtype=torch.float32)
    assert actual.dtype == torch.float32
    assert ((actual - wanted).abs() / size).max() < 8 * torch.finfo(torch.float32).eps


def test_other_rows_adapters_leave_no_trace() -> None:
    parts, _ = weights()
    x, (a, b, numbers) = torch.randn(7, K), adapters(7, torch.float32)
    both = []
    for change in (1.0, 1e6):  # of every adapter but the first
        b[2] *= change
        lora = BatchedLora(shrink(x, a, numbers, Phase.DECODE), b, numbers, NAMES, SPANS)
        both.append(matmul(x, parts["weight"], parts["absmax"], phase=Phase.DECODE, lora=lora))
    other = numbers != 2
    assert torch.equal(both[0][other], both[1][other])
    assert not torch.equal(both[0][~other], both[1][~other])


BLOCKED_SHAPE = 576, 320  # inputs and outputs of matrices that a BLAS library does block


def matmul_of(dtype: torch.dtype, kind: str) -> Callable[[Tensor, Tensor, Phase], Tensor]:
    """A matmul with adapters, bias and residual over one weight; its arguments are rows, their adapters, the phase."""
    k, n = BLOCKED_SHAPE
    weight, absmax = torch.randn(n, k).to(dtype), None
    if kind == "int8":
        parts = SCHEMES["int8"].quantize(weight.float())
        weight, absmax = parts["weight"], parts["absmax"]
    a, b, bias = torch.randn(3, 32, k).to(dtype), torch.randn(3, 16, n).to(dtype), torch.randn(n)
    names, spans = torch.tensor([0] * 64 + [1] * (n - 64), dtype=torch.int32), ((0, 64), (64, n))

    def run(x: Tensor, numbers: Tensor, phase: Phase) -> Tensor:
        lora = BatchedLora(shrink(x, a, numbers, phase), b, numbers, names, spans)
        return matmul(x, weight, absmax, phase=phase, bias=bias, lora=lora, residual=x[:, :n])

    return run


KINDS = [(torch.float32, "float"), (torch.bfloat16, "float"), (torch.float32, "int8"), (torch.bfloat16, "int8")]


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
@pytest.mark.parametrize("m", [2, 3, 5, 8, 16, 17, 64, 65])
def test_a_decoded_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, kind: str, m: int) -> None:
    torch.manual_seed(m)
    run = matmul_of(dtype, kind)
    x, numbers = torch.randn(m, BLOCKED_SHAPE[0]).to(dtype), torch.arange(m) % 3
    together = run(x, numbers, Phase.DECODE)
    order = torch.randperm(m)
    assert torch.equal(run(x[order], numbers[order], Phase.DECODE), together[order])
    for row in {0, 1, m // 2, m - 1}:
        assert torch.equal(run(x[row, None], numbers[row, None], Phase.DECODE), together[row, None])


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
def test_a_prefilled_tile_has_the_same_bits_in_any_chunk(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    run = matmul_of(dtype, kind)
    x, numbers = torch.randn(3 * PREFILL_TILE + 10, BLOCKED_SHAPE[0]).to(dtype), torch.full((3 * PREFILL_TILE + 10,), 2)
    whole = run(x, numbers, Phase.PREFILL)
    for cut in (PREFILL_TILE, 2 * PREFILL_TILE, 3 * PREFILL_TILE):
        parts = [run(x[part], numbers[part], Phase.PREFILL) for part in (slice(cut), slice(cut, None))]
        assert torch.equal(torch.cat(parts), whole)


def test_a_decode_tile_is_called_with_one_number_of_rows_only() -> None:
    """What makes the property hold by construction: any number of rows is computed in matmuls of the same shape."""
    heights: set[int] = set()

    def watched(rows: Tensor) -> Tensor:
        heights.add(len(rows))
        return rows

    for m in (1, 4, 7, 33):
        x = torch.randn(m, 8)
        assert torch.equal(matmul_in_tiles(x, Phase.DECODE, watched), x)
    assert heights == {decode_tile(torch.float32)}
