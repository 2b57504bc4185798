"""The table of scores of `octavo evaluate` and `octavo finetune`: bits per byte with 95 % intervals, and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.data.packing import Row, trained_bytes
from octavo.intervals import MIN_UNITS, Units, difference, interval
from octavo.metrics import Score, score
from octavo.models import Decoder
from octavo.ops.scheme import Scheme
from octavo.reporting import Report, shown
from octavo.runs.events import Difference, Event, FileDifference, ScoreRow
from octavo.runs.loss_unit import NATS, LossUnit, unit_of
from octavo.runs.probe_sentences import probe_table
from octavo.runs.verdict import Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


MAX_FILES = 1000  # whose differences are recorded
# Names of rows: the model before training in full precision, the same with quantized weights, and after training.
BASE, QUANTIZED_BASE, TUNED = "base", "quantized base", "tuned"


@dataclass(frozen=True)
class ScoreTable:
    """The rows, the differences between some of them, and the units of the text; None if no row was computed now."""

    rows: Sequence[ScoreRow] = ()
    differences: Sequence[Difference] = ()
    units: Units | None = None
    files: Sequence[FileDifference] = ()  # of the last difference


def score_rows(
    model: Decoder,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch: int,
    label: str,
    report: Report,
    tiled_head: bool = False,
) -> Score:
    """The score of packed rows, with a progress bar."""
    n_bytes = trained_bytes(rows, tokenizer)
    with report.progress(len(rows), label) as bar:
        return score(model, rows, n_bytes=n_bytes, batch_size=batch, tiled_head=tiled_head, progress=bar.advance)


def score_row(
    name: str,
    scheme: Scheme,
    folder: Path | None,
    result: Score,
    *,
    context: int | None = None,
    stride: int | None = None,
) -> ScoreRow:
    """One row of the perplexity table; `context` is the length of the rows that were scored."""
    return ScoreRow(
        name,
        scheme.name,
        str(folder) if folder else None,
        result.perplexity,
        result.bits_per_byte,
        result.tokens,
        loss=result.loss,
        interval=interval(result.units) if result.units else None,
        context=context,
        stride=stride,
    )


def loss_difference(
    before: ScoreRow, after: ScoreRow, units_before: Units | None, units_after: Units | None
) -> Difference:
    """How much lower the loss of the row `after` is. Without the units of both there is no interval."""
    loss = None if before.loss is None or after.loss is None else before.loss - after.loss
    paired = difference(units_before, units_after) if units_before and units_after else None
    return Difference(before.name, before.scheme, after.name, after.scheme, loss, paired)


def file_differences(before: Mapping[str, Units], after: Mapping[str, Units]) -> list[FileDifference]:
    """How much lower the loss is in each file, the largest MAX_FILES files. Empty if the files are not the same."""
    if before.keys() != after.keys():
        return []
    differences = [
        FileDifference(
            name,
            int(units.tokens.sum()),
            float((before[name].nats.sum() - units.nats.sum()) / units.tokens.sum()),
            difference(before[name], units),
        )
        for name, units in after.items()
    ]
    return sorted(differences, key=lambda one: -one.tokens)[:MAX_FILES]


def show_verdict(verdict: Verdict, report: Report) -> None:
    """Prints the sentences of the verdict, one a line."""
    for sentence in verdict.sentences:
        report.result(sentence)


def show_probes(found: Sequence[Event], report: Report) -> None:
    """Prints the table of what a model learned, forgot and copies, as far as it was measured."""
    rows = probe_table(found)
    if rows:
        columns = ["measure", "before", "after", "change"]
        report.table("Learned, forgot and copied", columns, rows, result=True)


def show_scores(table: ScoreTable, report: Report, verdict: Verdict | None = None) -> None:
    """Prints the table of scores, with the size of the frozen weights if all rows have one, and the differences.

    The last difference is left out if `verdict`, which is printed after it, says it.
    """
    rows = table.rows
    columns = ["name", "scheme", "bits per byte", "perplexity", "tokens"]
    cells: list[list[object]] = [[row.name, row.scheme, row.bits_per_byte, row.perplexity, row.tokens] for row in rows]
    has_intervals = table.units is not None and any(row.interval for row in rows)
    if has_intervals:
        columns.insert(3, "95% interval")
        for line, row in zip(cells, rows, strict=True):
            line.insert(3, _bounds(row))
    shares = [row.also_in_training for row in rows if row.also_in_training is not None]
    if len(shares) == len(rows):
        columns = [*columns, "also in training"]
        cells = [[*line, f"{share:.1%}"] for line, share in zip(cells, shares, strict=True)]
    sizes = [row.size_bytes for row in rows if row.size_bytes is not None]
    if len(sizes) == len(rows):
        columns = [*columns, "MiB"]
        cells = [[*line, size / 2**20] for line, size in zip(cells, sizes, strict=True)]
    over = f"; intervals over {table.units.described}" if table.units and has_intervals else ""
    report.table(f"Scores{context_text(rows)}{over}", columns, cells, result=True)
    _show_differences(table, report, stated=verdict is not None and verdict.gain is not None)
    for row in rows:
        if row.perplexity is None or not math.isfinite(row.perplexity):
            report.warn(
                f"The perplexity of {row.name} ({row.scheme}) is not finite (null in JSON): its weights or its "
                "adapter are broken, or the scheme is too coarse."
            )


def context_text(rows: Sequence[ScoreRow]) -> str:
    """How much of the text a prediction reads: " in rows of 512 tokens"; "" if the rows differ or do not have it."""
    if len({(row.context, row.stride) for row in rows}) != 1 or (context := rows[0].context) is None:
        return ""
    if (stride := rows[0].stride) is None:
        return f" in rows of {context:,} tokens"
    return f" with a sliding window of {context:,} tokens, stride {stride:,}"


def _show_differences(table: ScoreTable, report: Report, *, stated: bool) -> None:
    """Prints why there are no intervals, and the differences; without the last one if it is `stated` elsewhere."""
    units = table.units
    if units is None or all(row.loss is None for row in table.rows):
        return
    if len(units.nats) < MIN_UNITS:
        documents = f"{units.documents:,} document{'s' * (units.documents != 1)}"
        report.result(
            f"There is no 95% interval: it needs {MIN_UNITS} documents or rows, and the text has {documents} in "
            f"{units.rows:,} row{'s' * (units.rows != 1)}."
        )
    by_name = {(row.name, row.scheme): row for row in table.rows}
    for one in table.differences[: len(table.differences) - stated]:
        if one.lower_by is not None and math.isfinite(one.lower_by):
            row = by_name.get((one.before, one.before_scheme))
            report.result(difference_text(one, units, unit_of(row)))


def difference_text(one: Difference, units: Units, unit: LossUnit) -> str:
    """A difference as a sentence, in the unit of the text."""
    assert one.lower_by is not None
    lower_by = unit.of(one.lower_by)
    sign, word = (-1, "higher") if one.lower_by < 0 else (1, "lower")
    same_scheme = one.before_scheme == one.after_scheme
    before, after = (
        name if same_scheme else f"{name} ({scheme})"
        for name, scheme in ((one.before, one.before_scheme), (one.after, one.after_scheme))
    )
    text = f"The loss of {after} is {shown(abs(lower_by))} {unit.name} {word} than that of {before}"
    if no_difference := abs(lower_by) < 5e-4:
        digits = " to three decimals" if lower_by else ""
        sign, text = 1, f"There is no difference between the losses of {after} and {before}{digits}"
    if one.interval is None:
        reason = "the losses before training are not in the checkpoint"
        return f"{text}." if len(units.nats) < MIN_UNITS else f"{text}; it has no interval: {reason}."
    low, high = sorted(sign * bound for bound in unit.bounds(one.interval))
    text = f"{text} (95% interval {shown(low)} to {shown(high)}, over the same {units.described})."
    clear = no_difference or low > 0
    return text if clear else f"{text} The interval contains 0: this text does not show which is better."


def _bounds(row: ScoreRow) -> str:
    """The interval of the bits per byte."""
    unit = unit_of(row)
    if row.interval is None or unit is NATS:
        return ""
    low, high = unit.bounds(row.interval)
    return f"{shown(low)} to {shown(high)}"
