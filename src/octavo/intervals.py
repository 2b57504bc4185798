"""95 % intervals of a mean loss, by bootstrap (Efron 1979): how far it would differ on other text of the same kind.

The tokens of a document depend on each other, so the unit that is drawn is a whole document. n of n documents are drawn
with replacement, DRAWS times; each draw gives its sum of losses over its sum of tokens, and the interval is between two
percentiles of these means. Text of fewer than MIN_UNITS documents, such as the end of a novel, is drawn in blocks of
consecutive rows instead, about the cube root of the number of rows long (Künsch 1989): neighbouring rows depend on each
other too. Such an interval is about other parts of these documents, not about other documents.

The percentiles are those that give a mean of n normal values its t interval (Hesterberg 2015, arXiv 1411.5279, expanded
percentiles): with few units the plain percentiles are too narrow.

Two models are compared on the same units: an interval of the difference within each draw is much narrower than those of
both losses, since the units that are difficult for one model are difficult for the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from octavo.runs.events import Interval

CONFIDENCE = 0.95
DRAWS, SEED = 2000, 0
MIN_UNITS = 10
DOCUMENTS, BLOCKS = "documents", "blocks of rows"
_CHUNK = 2**21  # units drawn at a time


@dataclass(frozen=True, eq=False)
class Units:
    """The sums of the losses of units of a text that has `documents` documents in `rows` rows."""

    over: str  # DOCUMENTS or BLOCKS
    nats: npt.NDArray[np.float64]  # (n,)
    tokens: npt.NDArray[np.int64]  # (n,), each at least 1
    documents: int
    rows: int

    @property
    def described(self) -> str:
        """The units in words: "120 documents"."""
        return f"{len(self.nats):,} {self.over}"


def units_of(
    nats: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
) -> Units:
    """The units of a text from its parts (P,): losses, tokens, and the numbers of the document and of the row."""
    of_document, n_documents = _numbered(documents[tokens > 0])
    of_row, n_rows = _numbered(rows[tokens > 0])
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    over, numbers = DOCUMENTS, of_document
    if n_documents < MIN_UNITS:
        length = max(1, min(round(n_rows ** (1 / 3)), n_rows // MIN_UNITS))
        over, numbers = BLOCKS, of_row * (n_rows // length) // max(1, n_rows)  # of one length, to within a row
    token_sums = np.bincount(numbers, weights=tokens).astype(np.int64)
    return Units(
        over, np.bincount(numbers, weights=nats).astype(np.float64), token_sums, documents=n_documents, rows=n_rows
    )


def interval(units: Units) -> Interval | None:
    """The interval of the mean loss of a token; None with fewer than MIN_UNITS units or a loss that is not finite."""
    n = len(units.nats)
    if n < MIN_UNITS or not np.isfinite(units.nats).all():
        return None
    generator = np.random.Generator(np.random.PCG64(SEED))
    means: list[npt.NDArray[np.float64]] = []
    at_once = max(1, _CHUNK // n)
    for start in range(0, DRAWS, at_once):
        drawn = generator.integers(0, n, (min(at_once, DRAWS - start), n))
        means.append(units.nats[drawn].sum(axis=1) / units.tokens[drawn].sum(axis=1))
    tail = _tail(n)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(low), float(high), n, units.over, CONFIDENCE)


def difference(before: Units, after: Units) -> Interval | None:
    """The interval of the mean loss before minus that after. None if the units are not the same, or as `interval`."""
    if not np.array_equal(before.tokens, after.tokens):
        return None
    if not (np.isfinite(before.nats).all() and np.isfinite(after.nats).all()):
        return None  # numpy warns of inf - inf
    units = Units(after.over, before.nats - after.nats, after.tokens, after.documents, after.rows)
    return interval(units)


def _numbered(values: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
    """The values as numbers from 0 in the order of their size, and how many there are."""
    unique, numbers = np.unique(values, return_inverse=True)
    return numbers.reshape(-1), len(unique)


def _tail(n: int) -> float:
    """The share of the draws below the interval: Phi(-sqrt(n / (n - 1)) t), t the quantile of n - 1 degrees."""
    normal, degrees = NormalDist(), n - 1
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    # Cornish and Fisher's expansion of Student's t, to 0.001 from 9 degrees of freedom on.
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return normal.cdf(-math.sqrt(n / degrees) * t)
