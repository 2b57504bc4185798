"""Whether the held-out text is large enough for an interval, which the run says before it trains.

Of fewer than MIN_UNITS documents and rows there is no interval, and the verdict is that nothing can be told. Of fewer
than FEW_UNITS there is one, but it is wide: of 10 documents about 1.5 times as wide as of 20, and 5 times as wide
as of 200 (Student's t over the square root of their number).
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.config import Config, RunOptions, TrainingData
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.intervals import MIN_UNITS
from octavo.reporting import Report

FEW_UNITS = 20


def counts_of(rows: Sequence[Row]) -> tuple[int, int]:
    """(documents that have a label, rows) of held-out text."""
    documents = {row.documents[piece] for row in rows for piece in set(row.piece[row.labels != IGNORE_INDEX].tolist())}
    return len(documents), len(rows)


def warn_if_small(config: Config, rows: Sequence[Row], report: Report) -> None:
    """Warns of held-out text without an informative interval, with the options that give more of it."""
    documents, n_rows = counts_of(rows)
    units = documents if documents >= MIN_UNITS else n_rows  # as `units_of` chooses them
    if not rows or units >= FEW_UNITS:
        return
    name = "passage" if rows[0].passages else "document"
    size = f"{documents:,} {name}{'s' * (documents != 1)} in {n_rows:,} row{'s' * (n_rows != 1)}"
    if units < MIN_UNITS:
        what = (
            f"too little for an interval, which needs {MIN_UNITS} {name}s or rows: the run cannot show whether the "
            "model gets better"
        )
    else:
        what = f"little: the interval will be wide, and hides a small gain. {FEW_UNITS} {name}s or more are better"
    report.warn(f"The held-out text has {size}. That is {what}. {_remedy(config, n_rows)}")


def _remedy(config: Config, n_rows: int) -> str:
    data, limit = config[TrainingData], config[RunOptions].eval_rows
    if limit and n_rows == limit:
        return f"--eval-rows {limit} takes no more rows of it: leave the option out, or raise it."
    if data.test_data:
        return "Give more with --test-data."
    return f"Give more with --test-data, or raise --test-fraction, which is {data.test_fraction:g}."
