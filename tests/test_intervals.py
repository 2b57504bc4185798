"""Intervals of a mean loss: their coverage, the units of a text, and pairs."""

from __future__ import annotations

import math
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from octavo.intervals import DOCUMENTS, MIN_UNITS, PASSAGES, ROWS, Units, difference, interval, t_quantile, units_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
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


@pytest.mark.parametrize("rows", [3, 10, 64])
def test_the_units_of_few_documents_are_their_rows_in_order(rows: int) -> None:
    numbers = np.arange(rows)
    units = units_of(numbers.astype(float), np.full(rows, 5), numbers * 3 // rows, numbers)
    assert (units.over, units.documents, units.rows) == (ROWS, 3, rows)
    assert units.nats.tolist() == numbers.tolist()
    assert units.tokens.tolist() == [5] * rows


def test_the_interval_of_rows_is_wider_if_they_depend_on_their_neighbours() -> None:
    """An autoregressive series: its mean varies more than that of the same values in another order."""
    generator, values = np.random.default_rng(0), [0.0]
    for _ in range(999):
        values.append(0.7 * values[-1] + generator.standard_normal())
    in_order = np.array(values) + MEAN
    tokens, one, numbers = np.ones(1000, dtype=np.int64), np.zeros(1000, dtype=np.int64), np.arange(1000)
    ordered = interval(units_of(in_order, tokens, one, numbers))
    shuffled = interval(units_of(generator.permutation(in_order), tokens, one, numbers))
    assert ordered is not None
    assert shuffled is not None
    assert ordered.high - ordered.low > 1.5 * (shuffled.high - shuffled.low)


def test_the_interval_of_passages_leaves_out_what_distant_stretches_differ_by() -> None:
    generator, tokens = np.random.default_rng(0), np.full(40, 256)
    noise = tokens * 0.1 * generator.standard_normal(40)
    trend = tokens * np.linspace(2, 3, 40)
    of_passages = interval(Units(PASSAGES, noise + trend, tokens, 40, 40))
    of_noise = interval(Units(PASSAGES, noise, tokens, 40, 40))
    of_documents = interval(by_document(noise + trend, tokens))
    assert of_passages is not None
    assert of_noise is not None
    assert of_documents is not None
    assert of_passages.high - of_passages.low == pytest.approx(of_noise.high - of_noise.low, rel=0.1)
    assert of_documents.high - of_documents.low > 2 * (of_passages.high - of_passages.low)


def test_passages_are_units_as_documents_are() -> None:
    numbers = np.arange(24) // 2
    units = units_of(np.ones(24), np.ones(24, dtype=np.int64), numbers, np.arange(24), passages=True)
    assert (units.over, units.documents, units.described) == (PASSAGES, 12, "12 passages")
    few = units_of(np.ones(24), np.ones(24, dtype=np.int64), numbers // 2, np.arange(24), passages=True)
    assert few.over == ROWS


def test_the_variance_of_documents_is_that_of_the_whole_matrix() -> None:
    """The sums in closed form against Bell and McCaffrey's with matrices (n, n)."""
    generator = np.random.default_rng(0)
    tokens = np.exp(5 + generator.standard_normal(15)).astype(np.int64)
    nats = tokens * generator.standard_normal(15)
    found = interval(by_document(nats, tokens))
    assert found is not None
    shares, mean = tokens / tokens.sum(), nats.sum() / tokens.sum()
    assumed = np.diag(shares**1.3)
    residual = np.eye(15) - np.outer(shares, np.ones(15))
    covariance = residual @ assumed @ residual.T
    scale = np.diag(assumed) / np.diag(covariance)
    variance = float((scale * (nats - mean * tokens) ** 2).sum()) / tokens.sum() ** 2
    scaled = np.sqrt(np.outer(scale, scale)) * covariance
    degrees = np.trace(scaled) ** 2 / (scaled**2).sum()
    half = stats.t.ppf(0.975, degrees) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), rel=1e-9)


@pytest.mark.parametrize("degrees", [1, 1.3, 2.7, 9, 63.5, 1e5])
@pytest.mark.parametrize("p", [0.6, 0.975, 0.999])
def test_the_quantile_is_scipys(p: float, degrees: float) -> None:
    assert t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-7)


def test_a_document_with_nearly_all_tokens_has_a_finite_interval() -> None:
    tokens = np.array([10**9, *[1] * (MIN_UNITS - 1)])
    found = interval(by_document(tokens * np.linspace(2, 3, MIN_UNITS), tokens))
    assert found is not None
    assert math.isfinite(found.high - found.low)


@pytest.mark.parametrize(
    ("pool", "options", "sizes"),
    [
        ("documents", {}, (20, 50, 200)),
        ("rows", {}, (50, 100, 200)),
        ("rows", {"over": PASSAGES}, (20,)),
        ("rows", {"over": PASSAGES, "chapters": 1.0}, (20, 40)),
    ],
)
def test_intervals_of_test_sets_contain_the_difference_of_the_pool(
    pool: str, options: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    """500 test sets, as benchmarks/interval_coverage.py measures them."""
    benchmark = run_path(str(BENCHMARKS / "interval_coverage.py"))
    drawn = benchmark[pool](**options)
    for size in sizes:
        found = benchmark["coverage"](drawn, size, sets=500)
        assert found.as_promised, found


def test_rows_in_order_of_one_chapter_say_nothing_about_the_others() -> None:
    """So held-out text of few documents is spread over all of them (octavo.data.passages)."""
    benchmark = run_path(str(BENCHMARKS / "interval_coverage.py"))
    found = benchmark["coverage"](benchmark["rows"](chapters=1.0), 50, sets=200)
    assert found.share < 0.7


def test_losses_that_are_infinite_under_both_models_have_no_difference_and_warn_of_nothing() -> None:
    """The tests make numpy's RuntimeWarning of inf - inf an error."""
    nats, tokens = losses(np.random.default_rng(1), 30)
    nats[3] = math.inf
    assert difference(by_document(nats, tokens), by_document(nats, tokens)) is None


def test_the_interval_is_the_same_again() -> None:
    units = by_document(*losses(np.random.default_rng(1), 30))
    assert interval(units) == interval(units)
