"""The results in a report: the verdict, the perplexity table, the differences by file, the overlap."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.html_report.elements import section, table, text
from octavo.html_report.header import MINUS, finite, rows_of
from octavo.html_report.paths import last_name, without_folders
from octavo.reporting import shown
from octavo.runs.events import Difference, Evaluation, Event, FileDifference, Overlap, last
from octavo.runs.interval import Interval
from octavo.runs.loss_unit import NATS, LossUnit, unit_of
from octavo.runs.verdict import Verdict

FILES_SHOWN = 12  # rows of the table by file; the others are folded


def verdict_section(verdict: Verdict) -> str:
    """The sentences of the verdict."""
    items = "".join(f"<li>{text(without_folders(sentence))}</li>" for sentence in verdict.sentences)
    return section("Verdict", f'<div class="card"><ul>{items}</ul></div>' if items else "")


def perplexities(events: Sequence[Event]) -> str:
    """The perplexity table with what belongs to it; "" before the run's end."""
    rows = rows_of(events)
    if not rows:
        return ""
    cells: list[list[object]] = []
    for row in rows:
        unit = unit_of(row)
        bounds = _interval(row.interval, unit) if unit is not NATS else ""
        values = [row.name, row.scheme, row.bits_per_byte, bounds, row.perplexity]
        cells.append(["" if value is None else value for value in values])
    columns = "model", "scheme", "bits per byte", "95 % interval", "perplexity"
    parts = table(columns, cells, text_columns=2) + _measured_on(events) + _differences(events) + _overlap(events)
    return section("Held-out text", parts + _files(events))


def _measured_on(events: Sequence[Event]) -> str:
    row = rows_of(events)[-1]
    tokens = f"On {row.tokens:,} tokens" if row.tokens is not None else ""
    context = f", each predicted from up to {row.context:,} tokens before it" if tokens and row.context else ""
    stride = f", by a window that moves {row.stride:,} tokens" if context and row.stride else ""
    return f'<p class="caption">{text(tokens + context + stride)}.</p>' if tokens else ""


def _differences(events: Sequence[Event]) -> str:
    """How much lower the loss of the tuned model is."""
    evaluation = last(events, Evaluation)
    rows = {(row.name, row.scheme): row for row in (evaluation.rows if evaluation else ())}
    sentences = [
        _difference(one, unit_of(rows.get((one.before, one.before_scheme))))
        for one in (evaluation.differences if evaluation else ())
    ]
    found = "; ".join(sentence for sentence in sentences if sentence)
    return f'<p class="caption">{text(found)}.</p>' if found else ""


def _difference(one: Difference, unit: LossUnit) -> str:
    if one.lower_by is None or one.interval is None:
        return ""
    return (
        f"loss of {one.before} {MINUS} loss of {one.after}: {shown(unit.of(one.lower_by))} {unit.name} (95 % "
        f"interval {_interval(one.interval, unit)}, over {one.interval.units:,} {one.interval.over})"
    )


def _overlap(events: Sequence[Event]) -> str:
    """How much of the held-out text the training text contains."""
    overlap = last(events, Overlap)
    if overlap is None:
        return ""
    sentences = [
        f"{100 * overlap.share:.1f} % of the held-out text is also in the training text, in runs of {overlap.ngram} "
        "tokens"
    ]
    for count, label in ((overlap.removed_documents, "removed from training"), (overlap.near_copies, "near copies")):
        if count:
            sentences.append(f"{label}: {count:,} {'document' if count == 1 else 'documents'}")
    return f'<p class="caption">{text("; ".join(sentences))}.</p>'


def _files(events: Sequence[Event]) -> str:
    """The differences by file, the largest files first; "" for a single file."""
    evaluation = last(events, Evaluation)
    files = (
        sorted((one for one in evaluation.files if finite(one.lower_by) is not None), key=lambda one: -one.tokens)
        if evaluation
        else []
    )
    if len(files) < 2:
        return ""
    assert evaluation is not None
    unit = unit_of(evaluation.rows[-1] if evaluation.rows else None)
    columns = "held-out file", "tokens", f"gain in {unit.name}", "95 % interval"
    lines = [_file(one, unit) for one in files]
    first, rest = lines[:FILES_SHOWN], lines[FILES_SHOWN:]
    parts = "<h3>By file</h3>" + table(columns, first, text_columns=1)
    if rest:
        more = table(columns, rest, text_columns=1)
        parts += f"<details><summary>{text(f'{len(rest):,} smaller files')}</summary>{more}</details>"
    return parts


def _file(one: FileDifference, unit: LossUnit) -> list[object]:
    assert one.lower_by is not None
    return [last_name(one.source), one.tokens, unit.of(one.lower_by), _interval(one.interval, unit)]


def _interval(bounds: Interval | None, unit: LossUnit) -> str:
    if bounds is None:
        return ""
    low, high = unit.bounds(bounds)
    return f"{shown(low)} to {shown(high)}"
