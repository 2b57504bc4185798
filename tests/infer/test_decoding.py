"""Steps of many rows over one cache, against each row alone; and which numbers of rows are recorded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from octavo.adapters import serve_
from octavo.infer.decoding import DecodeRunner, _sizes, chosen
from octavo.layers.multi_lora import ServedAdapters
from octavo.ops.tiles import Phase
from octavo.store.peft import read

if TYPE_CHECKING:
    from tests.infer.conftest import Family

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45], [7, 7]]


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_a_step_is_what_each_row_says_alone(family: Family, scheme: str) -> None:
    model, routing = family.model(scheme), ServedAdapters()
    serve_(model, routing, read(family.adapter("tables")), "tables")
    cache = model.new_slots(slots=6, max_len=20)
    decoder = DecodeRunner(model, cache, routing, 260)
    adapter_ids = [0, 1, 1, 0]
    with torch.no_grad():
        for slot, prompt in enumerate(PROMPTS):
            own = torch.tensor(adapter_ids[slot : slot + 1])
            model.hidden(torch.tensor([prompt]), cache=cache.slot(slot), adapter_ids=own)
        found = decoder.step([1, 2, 3, 4], adapter_ids)
        assert cache.lengths == [4, 2, 7, 3, 0, 0]
        assert found.logits.shape == (4, 260)
        for row, prompt in enumerate(PROMPTS):
            own = torch.tensor(adapter_ids[row : row + 1])
            ids, alone = torch.tensor([[*prompt, row + 1]]), model.new_cache(batch=1, max_len=20)
            hidden = model.hidden(ids, cache=alone, adapter_ids=own)
            wanted = model.infer_logits(hidden[:, -1:], Phase.DECODE, own)[0, 0, :260]
            torch.testing.assert_close(found.logits[row], wanted, rtol=1e-4, atol=1e-4)
            assert found.greedy[row] == int(wanted.argmax())
            assert found.best[row] == pytest.approx(float(wanted.max()), abs=1e-4)


def test_what_is_not_a_number_is_found_out() -> None:
    logits = torch.randn(3, 11)
    logits[1, 4] = torch.nan
    logits[2, 5] = torch.inf
    found = chosen(logits, 3)
    assert found.greedy[0] == int(logits[0].argmax())
    assert [math.isfinite(best) for best in found.best] == [True, False, False]


def test_the_numbers_of_any_vocabulary_are_exact() -> None:
    logits = torch.zeros(1, 300_001)
    logits[0, 299_999] = 1
    assert chosen(logits, 1).greedy == [299_999]


@pytest.mark.parametrize(
    ("slots", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_graphs_are_of_powers_of_two_and_all_slots(slots: int, sizes: list[int]) -> None:
    assert _sizes(slots) == sizes
