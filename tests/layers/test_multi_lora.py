"""Several adapters on one layer, compared with each one alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.layers.multi_lora import RANK_MULTIPLE, AdapterBank, ServedAdapters
from octavo.ops.inference import matmul
from octavo.ops.tiles import Phase

K = 12
OUTPUTS = {"q": 5, "k": 3, "v": 4}
N = sum(OUTPUTS.values())
Loras = dict[tuple[int, str], tuple[Tensor, Tensor, float]]  # (adapter id, name) -> A, B, scaling


def new_bank() -> AdapterBank:
    return AdapterBank(K, OUTPUTS, torch.float32, torch.device("cpu"))


def alone(loras: Loras, x: Tensor, adapter_id: int) -> Tensor:
    """The term of one adapter for x (T, K): (T, N)."""
    parts = []
    for name, rows in OUTPUTS.items():
        if (adapter_id, name) in loras:
            a, b, scaling = loras[adapter_id, name]
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
def test_each_row_gets_the_term_of_its_adapter_after_any_loads_and_removals(
    steps: list[tuple[int] | tuple[int, str, int]], seed: int
) -> None:
    torch.manual_seed(seed)
    bank = new_bank()
    loras: Loras = {}
    steps = [(1, "q", 2), *steps]
    for step in steps:
        if len(step) == 1:
            bank.clear(step[0])
            loras = {key: lora for key, lora in loras.items() if key[0] != step[0]}
        elif (step[0], step[1]) not in loras:
            adapter_id, name, rank = step
            loras[adapter_id, name] = torch.randn(rank, K), torch.randn(OUTPUTS[name], rank), float(rank)
            bank.put(adapter_id, name, *loras[adapter_id, name])
    bank.reserve(5)
    adapter_ids = torch.tensor([0, 3, 1, 4, 2, 3])
    x = torch.randn(len(adapter_ids), 2, K)
    expected = torch.stack([alone(loras, row, int(row_id)) for row, row_id in zip(x, adapter_ids, strict=True)])
    assert bank.rank % RANK_MULTIPLE == 0
    for position in range(2):
        lora = bank.lora(x[:, position], adapter_ids, Phase.DECODE)
        y = matmul(x[:, position], torch.zeros(N, K), phase=Phase.DECODE, residual=torch.ones(len(x), N), lora=lora)
        torch.testing.assert_close(y - 1, expected[:, position], rtol=1e-5, atol=1e-5)
        assert torch.equal(y[0], torch.ones(N))  # the base's row
        assert [lora.names[start:stop].unique().tolist() for start, stop in lora.spans] == [[0], [1], [2]]
        for index, (start, stop) in enumerate(lora.spans):
            t = lora.t[:, index * bank.rank : (index + 1) * bank.rank]  # (M, R)
            term = torch.einsum("mr,mrn->mn", t, lora.b[adapter_ids])[:, start:stop]
            torch.testing.assert_close(term, expected[:, position, start:stop], rtol=1e-5, atol=1e-5)


def test_rows_of_an_embedding_get_the_term_of_their_adapter() -> None:
    bank = AdapterBank(30, {"embed": 6}, torch.float32, torch.device("cpu"))
    loras = {n: (torch.randn(n, 30), torch.randn(6, n), 0.5 * n) for n in (1, 2)}
    for adapter_id, lora in loras.items():
        bank.put(adapter_id, "embed", *lora)
    ids, adapter_ids = torch.randint(30, (4, 3)), torch.tensor([2, 0, 1, 2])
    y = torch.zeros(4, 3, 6)
    bank.add_rows_(y, ids, adapter_ids)
    for row, adapter_id in enumerate(adapter_ids.tolist()):
        if adapter_id:
            a, b, scaling = loras[adapter_id]
            torch.testing.assert_close(y[row], scaling * (b @ a[:, ids[row]]).T)
        else:
            assert not y[row].any()


def test_free_id_is_the_lowest_unused_id_and_never_that_of_the_base() -> None:
    adapters = ServedAdapters()
    for name in "abc":
        adapters.ids[name] = adapters.free_id()
    assert adapters.ids == {"a": 1, "b": 2, "c": 3}
    del adapters.ids["b"]
    assert adapters.free_id() == 2
