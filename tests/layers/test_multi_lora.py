"""Adapters side by side on one layer, against each pair on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.layers.multi_lora import RANKS, AdapterBank, ServedAdapters
from octavo.ops.inference import matmul
from octavo.ops.tiles import Phase

K = 12
OUTPUTS = {"q": 5, "k": 3, "v": 4}
N = sum(OUTPUTS.values())
SavedAttention = dict[tuple[int, str], tuple[Tensor, Tensor, float]]


def bank() -> AdapterBank:
    return AdapterBank(K, OUTPUTS, torch.float32, torch.device("cpu"))


def alone(held: SavedAttention, x: Tensor, number: int) -> Tensor:
    """(T, N): what one adapter makes of x (T, K)."""
    parts = []
    for name, rows in OUTPUTS.items():
        if (number, name) in held:
            a, b, scaling = held[number, name]
            parts.append(F.linear(F.linear(x, a), b) * scaling)
        else:
            parts.append(torch.zeros(len(x), rows))
    return torch.cat(parts, dim=-1)


PUTS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 4), st.sampled_from(list(OUTPUTS)), st.integers(1, 6)),
        st.tuples(st.integers(1, 4)),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=60, deadline=None)
@given(steps=PUTS, seed=st.integers(0, 99))
def test_each_row_gets_its_own_adapter_whatever_came_and_went(
    steps: list[tuple[int] | tuple[int, str, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    here = bank()
    held: SavedAttention = {}
    steps = [(1, "q", 2), *steps]
    for step in steps:
        if len(step) == 1:
            here.clear(step[0])
            held = {key: pair for key, pair in held.items() if key[0] != step[0]}
        elif (step[0], step[1]) not in held:
            number, name, rank = step
            held[number, name] = torch.randn(rank, K), torch.randn(OUTPUTS[name], rank), float(rank)
            here.put(number, name, *held[number, name])
    here.make_room(5)
    adapter_ids = torch.tensor([0, 3, 1, 4, 2, 3])
    x = torch.randn(len(adapter_ids), 2, K)
    wanted = torch.stack([alone(held, own, int(number)) for own, number in zip(x, adapter_ids, strict=True)])
    assert here.rank % RANKS == 0
    for position in range(2):
        lora = here.lora(x[:, position], adapter_ids, Phase.DECODE)
        y = matmul(x[:, position], torch.zeros(N, K), phase=Phase.DECODE, residual=torch.ones(len(x), N), lora=lora)
        torch.testing.assert_close(y - 1, wanted[:, position], rtol=1e-5, atol=1e-5)
        assert torch.equal(y[0], torch.ones(N))  # the base's row
        assert [lora.names[start:stop].unique().tolist() for start, stop in lora.spans] == [[0], [1], [2]]
        for place, (start, stop) in enumerate(lora.spans):
            inner = lora.inner[:, place * here.rank : (place + 1) * here.rank]
            own = torch.einsum("mr,mrn->mn", inner, lora.b[adapter_ids])[:, start:stop]
            torch.testing.assert_close(own, wanted[:, position, start:stop], rtol=1e-5, atol=1e-5)


def test_rows_of_a_table_get_their_own_adapter() -> None:
    here = AdapterBank(30, {"embed": 6}, torch.float32, torch.device("cpu"))
    pairs = {number: (torch.randn(number, 30), torch.randn(6, number), 0.5 * number) for number in (1, 2)}
    for number, pair in pairs.items():
        here.put(number, "embed", *pair)
    ids, adapter_ids = torch.randint(30, (4, 3)), torch.tensor([2, 0, 1, 2])
    y = torch.zeros(4, 3, 6)
    here.add_rows_(y, ids, adapter_ids)
    for row, number in enumerate(adapter_ids.tolist()):
        if number:
            a, b, scaling = pairs[number]
            torch.testing.assert_close(y[row], scaling * (b @ a[:, ids[row]]).T)
        else:
            assert not y[row].any()


def test_numbers_are_the_lowest_that_are_free_and_never_the_bases() -> None:
    routing = ServedAdapters()
    for name in "abc":
        routing.served[name] = routing.free_id()
    assert routing.served == {"a": 1, "b": 2, "c": 3}
    del routing.served["b"]
    assert routing.free_id() == 2
