"""95 % intervals of a mean loss: how far it would differ on other text of the same kind.

The mean loss of a token is m = sum d_i / sum t_i, with d_i the loss in nats and t_i the tokens of unit i. Its error is
that of sum r_i / sum t_i with the residuals r_i = d_i - m t_i, and the interval is m +- t(df) SE, t(df) the quantile of
Student's distribution with df degrees of freedom. Two models are compared on the same units, with d_i their difference:
that interval is much narrower than those of both losses, since what is difficult for one model is so for the other.

**Documents.** The tokens of a document depend on each other, so the unit is a whole document. SE and df are those of
Bell and McCaffrey (2002) for clusters of unequal size: each r_i^2 is divided by its expectation over its variance, so
that SE^2 is unbiased, and df matches the variance of SE^2 (Satterthwaite). The assumed variance of a residual is
t_i^VARIANCE_POWER: with independent tokens it is proportional to t_i, with an effect of the document on all of its
tokens to t_i^2, and the power is between: a higher one covers more of 20 documents with wider intervals.
Assumed and true variance need not agree: SE uses the residuals themselves.
Percentiles of bootstrap draws of documents, which were here before, are too narrow where few long documents have most
of the tokens: of documents with lengths spread as exp(N(0, 1)) they covered 88 % at 20 documents and 90 % at 50, BCa
less, and studentized draws 90 and 91 %. `python benchmarks/interval_coverage.py` measures the coverage and the width.

**Passages.** Of few long texts one passage is held out at a random place of each stretch (octavo.data.passages). SE is
from the differences of neighbours, which leave out what distant stretches differ by: so does the mean, since each
stretch is in it (successive differences, Wolter, Introduction to Variance Estimation, 2007, chapter 8). An interval
over passages is about other parts of these texts.

**Rows in order.** Other text of fewer than MIN_UNITS documents, such as one given play, has its rows as units, whose
neighbours depend on each other. SE is from the means of squares of the first nu cosine-weighted sums of residuals,
df = nu = 0.4 n^(2/3) (Lazarus, Lewis, Stock and Watson 2018): waves that are long against the dependence have the
variance of the mean. Means of blocks of consecutive rows, drawn or not, cover less: 88 to 92 % for 50 rows with a
correlation of 0.5 to 0.6, against 94 to 95 %. Such an interval is about other parts of these documents, not about other
documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from octavo.runs.events import Interval

CONFIDENCE = 0.95
MIN_UNITS = 10
DOCUMENTS, PASSAGES, ROWS = "documents", "passages", "rows in order"
VARIANCE_POWER = 1.3
MAX_WAVES = 200  # of rows in order: more degrees of freedom make no interval narrower by 1 %

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Units:
    """The sums of the losses of units of a text that has `documents` documents or passages in `rows` rows."""

    over: str  # DOCUMENTS, PASSAGES or ROWS
    nats: Floats  # (n,)
    tokens: npt.NDArray[np.int64]  # (n,), each at least 1
    documents: int
    rows: int

    @property
    def described(self) -> str:
        """The units in words: "120 documents"."""
        return f"{len(self.nats):,} {self.over}"


def units_of(
    nats: Floats,
    tokens: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    *,
    passages: bool = False,
) -> Units:
    """The units of a text from its parts (P,): losses, tokens, and the numbers of the document and of the row.

    With `passages` the documents are passages of fewer documents.
    """
    of_document, n_documents = _numbered(documents[tokens > 0])
    of_row, n_rows = _numbered(rows[tokens > 0])
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    whole = PASSAGES if passages else DOCUMENTS
    over, numbers = (whole, of_document) if n_documents >= MIN_UNITS else (ROWS, of_row)
    token_sums = np.bincount(numbers, weights=tokens).astype(np.int64)
    return Units(over, np.bincount(numbers, weights=nats).astype(np.float64), token_sums, n_documents, n_rows)


def interval(units: Units) -> Interval | None:
    """The interval of the mean loss of a token; None with fewer than MIN_UNITS units or a loss that is not finite."""
    n = len(units.nats)
    if n < MIN_UNITS or not np.isfinite(units.nats).all():
        return None
    total = units.tokens.sum()
    mean = float(units.nats.sum() / total)
    residuals = units.nats - mean * units.tokens  # (n,)
    if units.over == PASSAGES:
        variance, degrees = _by_passages(residuals)
    elif units.over == ROWS:
        variance, degrees = _by_rows(residuals)
    else:
        variance, degrees = _by_documents(residuals, units.tokens / total)
    half = t_quantile((1 + CONFIDENCE) / 2, degrees) * math.sqrt(variance) / float(total)
    return Interval(mean - half, mean + half, n, units.over, CONFIDENCE)


def difference(before: Units, after: Units) -> Interval | None:
    """The interval of the mean loss before minus that after. None if the units are not the same, or as `interval`."""
    if before.over != after.over or not np.array_equal(before.tokens, after.tokens):
        return None
    if not (np.isfinite(before.nats).all() and np.isfinite(after.nats).all()):
        return None  # numpy warns of inf - inf
    units = Units(after.over, before.nats - after.nats, after.tokens, after.documents, after.rows)
    return interval(units)


def _by_documents(residuals: Floats, weights: Floats) -> tuple[float, float]:
    """(variance of the sum of independent residuals, its degrees of freedom); `weights` are the shares of tokens.

    With assumed variances v_i = w_i^VARIANCE_POWER and S their sum, residuals of a weighted mean have the covariances
    V_ij = w_i u_j + u_i w_j, u_i = S w_i / 2 - v_i, plus v_i if i = j. Then with k_i = V_ii / v_i

        variance = sum r_i^2 / k_i,    df = S^2 / sum_ij V_ij^2 / (k_i k_j),

    whose double sum factors into sums over i.
    """
    v = weights**VARIANCE_POWER  # (n,)
    total = v.sum()
    u = total * weights / 2 - v
    k = np.maximum(1 + 2 * weights * u / v, 1e-12)  # (n,)
    variance = float((residuals**2 / k).sum())
    if k.min() < 1e-5:  # one document has nearly all tokens: its degree of freedom, where the sums below would cancel
        return variance, 1.0
    cross = (weights**2 / k).sum() * (u**2 / k).sum() + (weights * u / k).sum() ** 2
    squares = 2 * cross + (v**2 - (2 * weights * u / k) ** 2).sum()
    return variance, max(1.0, float(total**2 / squares))


def _by_passages(residuals: Floats) -> tuple[float, float]:
    """(variance of the sum of residuals of n stretches in order, its degrees of freedom): with independent residuals
    of equal variance s^2 the sum of (r_i+1 - r_i)^2 has the mean 2 (n - 1) s^2 and the variance 4 (3 n - 4) s^4."""
    n = len(residuals)
    return n / (2 * (n - 1)) * float((np.diff(residuals) ** 2).sum()), 2 * (n - 1) ** 2 / (3 * n - 4)


def _by_rows(residuals: Floats) -> tuple[float, float]:
    """(variance of the sum of residuals in order, its degrees of freedom)."""
    n = len(residuals)
    degrees = min(max(3, round(0.4 * n ** (2 / 3))), MAX_WAVES)
    angles = (np.arange(n) + 0.5) * (math.pi / n)  # (n,)
    sums = [math.sqrt(2) * float(np.cos(wave * angles) @ residuals) for wave in range(1, degrees + 1)]
    return sum(each**2 for each in sums) / degrees, float(degrees)


def t_quantile(p: float, degrees: float) -> float:
    """The quantile of Student's t for p > 1/2, at any real number of degrees of freedom of at least 1.

    With t = sqrt(df) tan(a) the density becomes cos(a)^(df - 1) over a constant, which is integrated numerically.
    """
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    nodes, weights = _legendre()
    low, high = 0.0, 1e4
    for _ in range(50):
        middle = (low + high) / 2
        angle = math.atan(middle / math.sqrt(degrees))
        density = np.cos(angle * (nodes + 1) / 2) ** (degrees - 1)
        if constant * angle / 2 * float(weights @ density) < p - 0.5:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@cache
def _legendre() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    return nodes, weights


def _numbered(values: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """The values as numbers from 0 in the order of their size, and how many there are."""
    unique, numbers = np.unique(values, return_inverse=True)
    return numbers.reshape(-1), len(unique)
