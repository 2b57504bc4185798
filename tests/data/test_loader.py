from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.data.loader import Batch, Position, batches, batches_per_epoch, order
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.errors import DataError, UsageError

# Written down once: an order that changes breaks every run that is to be resumed.
EXPECTED = [3, 4, 2, 6, 0, 7, 1, 5]


def rows(count: int) -> list[Row]:
    def row(number: int) -> Row:
        ids = np.array([number, number], dtype=np.int32)
        labels = np.array([number, IGNORE_INDEX], dtype=np.int32)
        zeros = np.zeros(2, dtype=np.int32)
        return Row(ids, labels, zeros, zeros, (f"f:{number}", "f:0"), (0,))

    return [row(number) for number in range(count)]


def numbers(batch: Batch) -> list[int]:
    return [int(number) for number in batch.ids[:, 0]]


@given(n_rows=st.integers(0, 50), seed=st.integers(), epoch=st.integers(0, 9))
def test_an_epochs_order_holds_each_row_once(n_rows: int, seed: int, epoch: int) -> None:
    assert sorted(order(n_rows, seed=seed, epoch=epoch)) == list(range(n_rows))
    assert order(n_rows, seed=seed, epoch=epoch, shuffle=False) == list(range(n_rows))


def test_the_order_is_fixed_for_all_versions_and_differs_by_seed_and_epoch() -> None:
    assert order(8, seed=0, epoch=0) == EXPECTED
    assert order(8, seed=0, epoch=1) != EXPECTED
    assert order(8, seed=1, epoch=0) != EXPECTED


def test_the_order_does_not_use_global_generators() -> None:
    random.seed(1)
    states = random.getstate(), torch.get_rng_state()
    first = order(100, seed=5, epoch=2)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(2)
    torch.manual_seed(3)
    assert order(100, seed=5, epoch=2) == first


@given(n_rows=st.integers(1, 20), batch_size=st.integers(1, 7), epochs=st.integers(1, 3))
def test_each_epoch_gives_each_row_once(n_rows: int, batch_size: int, epochs: int) -> None:
    actual = list(batches(rows(n_rows), batch_size=batch_size, seed=1, epochs=epochs))
    assert len(actual) == epochs * batches_per_epoch(n_rows, batch_size)
    for epoch in range(epochs):
        of_epoch = [batch for batch in actual if batch.epoch == epoch]
        assert [batch.index for batch in of_epoch] == list(range(len(of_epoch)))
        assert sorted(number for batch in of_epoch for number in numbers(batch)) == list(range(n_rows))


@given(n_rows=st.integers(1, 12), batch_size=st.integers(1, 5), taken=st.integers(0, 30), shuffle=st.booleans())
def test_a_resumed_run_reads_the_batches_of_an_uninterrupted_one(
    n_rows: int, batch_size: int, taken: int, shuffle: bool
) -> None:
    data = rows(n_rows)
    whole = list(islice(batches(data, batch_size=batch_size, seed=7, shuffle=shuffle), taken + 10))
    start = whole[taken - 1].following if taken else Position()
    resumed = islice(batches(data, batch_size=batch_size, seed=7, start=start, shuffle=shuffle), 10)
    for expected, batch in zip(whole[taken:], resumed, strict=True):
        assert (batch.epoch, batch.index) == (expected.epoch, expected.index)
        assert torch.equal(batch.ids, expected.ids)
        assert batch.sources == expected.sources


def test_a_fraction_of_an_epoch_counts_from_the_very_first_batch() -> None:
    data = rows(10)
    assert len(list(batches(data, batch_size=2, seed=0, epochs=1.5))) == 8
    assert len(list(batches(data, batch_size=2, seed=0, epochs=0.01))) == 1
    rest = list(batches(data, batch_size=2, seed=0, epochs=1.5, start=Position(1, 1)))
    assert [(batch.epoch, batch.index) for batch in rest] == [(1, 1), (1, 2)]
    assert list(batches(data, batch_size=2, seed=0, epochs=1, start=Position(1, 3))) == []


def test_a_batch_is_int64_and_has_its_documents_and_trained_tokens() -> None:
    (batch,) = batches(rows(3), batch_size=3, seed=0, epochs=1, shuffle=False)
    for tensor in (batch.ids, batch.labels, batch.positions, batch.piece):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (3, 2)
    assert batch.labels.tolist() == [[0, IGNORE_INDEX], [1, IGNORE_INDEX], [2, IGNORE_INDEX]]
    assert (batch.trained_tokens, batch.sources) == (3, ("f:0", "f:1", "f:2"))


def test_invalid_arguments_of_batches_are_refused_at_the_call() -> None:
    with pytest.raises(DataError, match="no rows"):
        batches([], batch_size=1, seed=0)
    with pytest.raises(UsageError, match="batch of 0"):
        batches(rows(2), batch_size=0, seed=0)
    with pytest.raises(UsageError, match="batch 4 of epoch 0 does not exist: an epoch has 3 batches"):
        batches(rows(3), batch_size=1, seed=0, start=Position(0, 4))
