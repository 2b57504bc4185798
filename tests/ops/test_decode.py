"""What one new token of a few requests takes, against what each row gets alone from dequantised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.decode import FEW_ON_A_CPU, Thin, int8_rows, shrink, slot_attention
from octavo.ops.quantize import SCHEMES, dequantise

K, N, R = 96, 40, 3
SPANS = ((0, 15), (15, N))
# of the sum of the terms' sizes: roundings to the type of the product, of its scaling and of each thing added
TOLERANCE = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def weights() -> tuple[dict[str, Tensor], Tensor]:
    parts = SCHEMES["int8"].quantise(torch.randn(N, K) * torch.logspace(-2, 2, N)[:, None])
    return parts, dequantise(SCHEMES["int8"], parts, (N, K))


def adapters(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, the number of each row): the base and two adapters."""
    a, b = torch.randn(3, 2 * R, K).to(dtype), torch.randn(3, R, N).to(dtype)
    a[0], b[0] = 0, 0
    return a, b, torch.arange(m) % 3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("m", [1, 3, FEW_ON_A_CPU, FEW_ON_A_CPU + 1, 65])
@pytest.mark.parametrize("added", [False, True])
def test_a_product_from_codes_is_that_of_the_dequantised_matrix(dtype: torch.dtype, m: int, added: bool) -> None:
    torch.manual_seed(m)
    parts, matrix = weights()
    x = (torch.randn(m, K + 7) * 2).to(dtype)[:, 3 : K + 3]
    wanted, size = F.linear(x.float(), matrix), F.linear(x.float().abs(), matrix.abs())
    named: dict[str, Any] = {}
    if added:
        bias, onto, (a, b, numbers) = torch.randn(11), torch.randn(m, N).to(dtype), adapters(m, dtype)
        names = torch.tensor([0] * 15 + [1] * (N - 15), dtype=torch.int32)
        thin = Thin(shrink(x, a, numbers), b, numbers, names, SPANS)
        named = {"bias": bias, "bias_start": 5, "thin": thin, "onto": onto}
        wanted[:, 5:16] += bias
        for row in range(m):
            inner = a[numbers[row]].float() @ x[row].float()
            for (start, stop), own in zip(SPANS, inner.split(R), strict=True):
                wanted[row, start:stop] += own @ b[numbers[row]].float()[:, start:stop]
        wanted += onto.float()
        size += onto.float().abs() + bias.abs().max() + (thin.inner.abs().sum(1) * b.abs().max())[:, None]
    found = int8_rows(x, parts["weight"], parts["absmax"], **named)
    assert found.dtype == dtype
    assert ((found.float() - wanted).abs() / size).max() < TOLERANCE[dtype]


def test_codes_that_sum_past_float16_are_no_infinity() -> None:
    codes, absmax = torch.full((2, 4096), 127, dtype=torch.int8), torch.tensor([1.0, 0.01])
    found = int8_rows(torch.ones(1, 4096, dtype=torch.float16), codes, absmax)
    torch.testing.assert_close(found.float(), torch.tensor([[4096.0, 40.96]]), rtol=2e-3, atol=0)


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    """In float32 up to the order of sums; adapters of others leave no trace at all."""
    parts, _ = weights()
    x, (a, b, numbers) = torch.randn(7, K), adapters(7, torch.float32)
    names = torch.tensor([0] * 15 + [1] * (N - 15), dtype=torch.int32)
    both = []
    for change in (1.0, 1e6):  # of every adapter but the first
        b[2] *= change
        thin = Thin(shrink(x, a, numbers), b, numbers, names, SPANS)
        both.append(int8_rows(x, parts["weight"], parts["absmax"], thin=thin))
    other = numbers != 2
    assert torch.equal(both[0][other], both[1][other])
    assert not torch.equal(both[0][~other], both[1][~other])


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_a_slots_token_looks_at_what_its_slot_holds_and_itself(heads: int, groups: int) -> None:
    torch.manual_seed(heads)
    lengths, room, size = [0, 4, -1, 9, 1], 10, 8
    m = len(lengths)
    q, k, v = torch.randn(m, heads, size), torch.randn(m, groups, size), torch.randn(m, groups, size)
    keys, values = torch.randn(2, m, room, groups, size)
    before = keys.clone(), values.clone()
    found = slot_attention(q, k, v, keys, values, torch.tensor(lengths), max(lengths))
    for slot, length in enumerate(lengths):
        if length < 0:
            assert not found[slot].any()
        for store, old, new in ((keys, before[0], k), (values, before[1], v)):
            wanted = old[slot].clone()
            if length >= 0:
                wanted[length] = new[slot]
            assert torch.equal(store[slot], wanted)  # and nothing else was written
        if length < 0:
            continue
        for head in range(heads):
            group = head // (heads // groups)
            share = (keys[slot, : length + 1, group] @ q[slot, head] / size**0.5).softmax(0)
            torch.testing.assert_close(found[slot, head], share @ values[slot, : length + 1, group])
