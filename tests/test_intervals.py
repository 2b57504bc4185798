"""Intervals of a mean loss: their coverage, the units of a text, and pairs."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from octavo.intervals import BLOCKS, DOCUMENTS, MIN_UNITS, Units, difference, interval, units_of

MEAN = 3.0
Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]


def losses(generator: np.random.Generator, n: int, *, spread: float = 0.5) -> Arrays:
    """(nats, tokens) of n documents of 20 to 400 tokens, whose mean losses vary around MEAN."""
    tokens = generator.integers(20, 400, n)
    return tokens * (MEAN + spread * generator.standard_normal(n)), tokens


def by_document(nats: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]) -> Units:
    return Units(DOCUMENTS, nats, tokens, documents=len(nats), rows=len(nats))


@pytest.mark.parametrize("n", [MIN_UNITS, 40])
def test_about_95_of_100_intervals_contain_the_mean(n: int) -> None:
    covered = 0
    for seed in range(400):
        found = interval(by_document(*losses(np.random.default_rng(seed), n)))
        assert found is not None
        covered += found.low < MEAN < found.high
    # 95 % of 400 is 380; three standard deviations of the count are 13. Plain percentiles of 10 documents cover 88 %.
    assert 363 <= covered <= 393


def test_the_interval_of_equal_documents_is_the_t_interval() -> None:
    values = np.random.default_rng(0).standard_normal(50) + MEAN
    found = interval(by_document(100 * values, np.full(50, 100)))
    assert found is not None
    half = 2.0096 * values.std(ddof=1) / math.sqrt(50)  # t with 49 degrees of freedom
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert (found.units, found.over) == (50, DOCUMENTS)


def test_a_difference_is_paired_by_document() -> None:
    generator = np.random.default_rng(0)
    nats, tokens = losses(generator, 60)
    before = by_document(nats, tokens)
    after = by_document(nats - tokens * (0.05 + 0.02 * generator.standard_normal(60)), tokens)
    found, single = difference(before, after), interval(before)
    assert found is not None
    assert single is not None
    assert 0.03 < found.low < 0.05 < found.high < 0.07
    assert found.high - found.low < 0.1 * (single.high - single.low)
    mirrored = difference(after, before)
    assert mirrored is not None
    assert (-mirrored.high, -mirrored.low) == pytest.approx((found.low, found.high), rel=1e-9)


def test_losses_of_other_text_have_no_interval_of_the_difference() -> None:
    nats, tokens = losses(np.random.default_rng(0), 20)
    assert difference(by_document(nats, tokens), by_document(nats, tokens + 1)) is None
    assert difference(by_document(nats[:-1], tokens[:-1]), by_document(nats, tokens)) is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_few_units_or_a_broken_loss_have_no_interval(broken: float) -> None:
    nats, tokens = losses(np.random.default_rng(0), MIN_UNITS)
    assert interval(by_document(nats, tokens)) is not None
    assert interval(by_document(nats[1:], tokens[1:])) is None
    nats[3] = broken
    assert interval(by_document(nats, tokens)) is None


def test_the_parts_of_a_document_are_one_unit() -> None:
    documents = np.array([7, 7, *range(10, 10 + MIN_UNITS), 7, 3])
    nats, tokens = np.arange(1.0, 15.0), np.arange(1, 15)
    tokens[-1] = 0  # a document whose labels are all ignored
    units = units_of(nats, tokens, documents, np.zeros(14, dtype=np.int64))
    assert (units.over, units.documents, units.rows) == (DOCUMENTS, 11, 1)
    assert units.tokens.tolist() == units.nats.tolist() == [1 + 2 + 13, *range(3, 13)]


@pytest.mark.parametrize(("rows", "blocks"), [(3, 3), (10, 10), (19, 19), (27, 13), (40, 13), (64, 16), (1000, 100)])
def test_few_documents_are_drawn_in_blocks_of_consecutive_rows(rows: int, blocks: int) -> None:
    numbers = np.arange(rows)
    units = units_of(np.ones(rows), np.full(rows, 5), numbers * 3 // rows, numbers)
    assert (units.over, units.rows, len(units.nats)) == (BLOCKS, rows, blocks)
    assert (units.nats.sum(), units.tokens.sum()) == (rows, 5 * rows)
    assert np.ptp(units.nats) <= 1, "of one length, to within a row"


def test_blocks_widen_the_interval_of_rows_that_depend_on_their_neighbours() -> None:
    """An autoregressive series: its mean varies more than that of independent rows."""
    generator, values = np.random.default_rng(0), [0.0]
    for _ in range(999):
        values.append(0.7 * values[-1] + generator.standard_normal())
    nats, tokens, numbers = np.array(values) + MEAN, np.ones(1000, dtype=np.int64), np.arange(1000)
    blocks = interval(units_of(nats, tokens, np.zeros(1000, dtype=np.int64), numbers))
    rows = interval(by_document(nats, tokens))
    assert blocks is not None
    assert rows is not None
    assert blocks.high - blocks.low > 1.5 * (rows.high - rows.low)


def test_losses_that_are_infinite_under_both_models_have_no_difference_and_warn_of_nothing() -> None:
    """The tests make numpy's RuntimeWarning of inf - inf an error."""
    nats, tokens = losses(np.random.default_rng(1), 30)
    nats[3] = math.inf
    assert difference(by_document(nats, tokens), by_document(nats, tokens)) is None


def test_the_interval_is_the_same_again() -> None:
    units = by_document(*losses(np.random.default_rng(1), 30))
    assert interval(units) == interval(units)
