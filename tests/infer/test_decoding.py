"""Decode steps of several rows, compared with each row alone; and which numbers of rows are captured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from octavo.adapters.served import serve_
from octavo.infer.decoding import DecodeRunner, _graph_rows, step_output
from octavo.layers.multi_lora import ServedAdapters
from octavo.ops.tiles import Phase

if TYPE_CHECKING:
    from tests.infer.conftest import Family

PROMPTS = [[5, 6, 7], [9], [40, 41, 42, 43, 44, 45], [7, 7]]


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_a_step_computes_the_logits_of_each_row_alone(family: Family, scheme: str) -> None:
    model, adapters = family.model(scheme), ServedAdapters()
    serve_(model, adapters, family.adapter("embeddings"), "embeddings")
    cache = model.new_slots(slots=6, max_len=20)
    decoder = DecodeRunner(model, cache, adapters, 260)
    adapter_ids = [0, 1, 1, 0]
    with torch.no_grad():
        for slot, prompt in enumerate(PROMPTS):
            row_ids = torch.tensor(adapter_ids[slot : slot + 1])
            model.hidden(torch.tensor([prompt]), cache=cache.slot(slot), adapter_ids=row_ids)
        output = decoder.step([1, 2, 3, 4], adapter_ids)
        assert cache.lengths == [4, 2, 7, 3, 0, 0]
        assert output.logits.shape == (4, 260)
        for row, prompt in enumerate(PROMPTS):
            row_ids = torch.tensor(adapter_ids[row : row + 1])
            ids, alone = torch.tensor([[*prompt, row + 1]]), model.new_cache(batch=1, max_len=20)
            hidden = model.hidden(ids, cache=alone, adapter_ids=row_ids)
            expected = model.infer_logits(hidden[:, -1:], Phase.DECODE, row_ids)[0, 0, :260]
            torch.testing.assert_close(output.logits[row], expected, rtol=1e-4, atol=1e-4)
            assert output.argmax[row] == int(expected.argmax())
            assert output.max_logits[row] == pytest.approx(float(expected.max()), abs=1e-4)


def test_the_largest_logit_of_a_row_with_nan_or_inf_is_not_finite() -> None:
    logits = torch.randn(3, 11)
    logits[1, 4] = torch.nan
    logits[2, 5] = torch.inf
    output = step_output(logits, 3)
    assert output.argmax[0] == int(logits[0].argmax())
    assert [math.isfinite(largest) for largest in output.max_logits] == [True, False, False]


def test_token_ids_of_a_large_vocabulary_are_exact() -> None:
    logits = torch.zeros(1, 300_001)
    logits[0, 299_999] = 1
    assert step_output(logits, 1).argmax == [299_999]


@pytest.mark.parametrize(
    ("slots", "sizes"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_graphs_have_powers_of_two_rows_and_all_slots(slots: int, sizes: list[int]) -> None:
    assert _graph_rows(slots) == sizes
