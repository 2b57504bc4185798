"""Writes report.html of a run folder: curves, perplexities, token ledger, samples, settings.

The page is self-contained; its content security policy forbids loading resources. All text of the run is escaped.
Sections without data are omitted, so an interrupted or running run also has a report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from octavo.atomic import atomic_write
from octavo.bounded_json import JsonError, parse
from octavo.errors import DataError, UsageError
from octavo.html_report.chart import Points, Series, dots, draw, line, marks, smooth
from octavo.html_report.elements import page
from octavo.html_report.elements import section as _section
from octavo.html_report.elements import table as _table
from octavo.html_report.elements import text as _text
from octavo.html_report.learned import learned_section
from octavo.reporting import shown
from octavo.runs.events import (
    Evaluation,
    Event,
    Hardware,
    HeldOut,
    Overlap,
    Sample,
    ScoreRow,
    Step,
    Versions,
    Warn,
    last,
    only,
    read,
)
from octavo.runs.folder import RunFolder
from octavo.runs.verdict import verdict_of

MAX_FILES = 60  # rows of the ledger's table; the largest files come first


def write(folder: Path) -> Path:
    """Writes report.html into a run folder and returns its path.

    Reads metrics.jsonl, ledger.json and config.yaml if they exist. Raises UsageError if there is no such folder,
    CheckpointError if it has another format version, and DataError if ledger.json is not JSON. Invalid lines of
    metrics.jsonl are ignored: a killed run may leave one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.", hint="Pass the folder of --out.")
    run = RunFolder(folder)
    run.check_format()
    events = read(run.metrics)
    sections = [
        _verdict(events),
        _curves(events),
        _perplexities(events),
        learned_section(events),
        _samples(events),
        _ledger(run.ledger),
        _warnings(events),
        _settings(run.settings.read_text("utf-8", "replace")) if run.settings.is_file() else "",
        _facts("Hardware", last(events, Hardware)),
        _facts("Versions", last(events, Versions)),
    ]
    name = _text(folder.resolve().name)
    lead = f'<h1>{name}</h1>\n<p class="lead">{_text(summary(events))}</p>'
    html = page(f"{name} · octavo", [lead, *sections])
    atomic_write(run.report, html.encode("utf-8", "replace"))
    return run.report


def summary(events: Sequence[Event]) -> str:
    """The run in one line: steps, training loss, and the perplexity of the last row against that of the first."""
    losses = _points(only(events, Step), "loss")
    newest = last(events, Step)
    parts = [f"{newest.step:,} step{'s' * (newest.step != 1)}"] if newest else []
    if parts:
        parts[0] += f", training loss {smooth(losses)[-1][1]:.3f}" if losses else " without a trained token"
    rows = [(row.name, perplexity) for row in _rows(events) if (perplexity := _number(row.perplexity))]
    if len(rows) > 1:
        (first, before), (name, after) = rows[0], rows[-1]
        change = 100 * (after / before - 1)
        parts.append(
            f"perplexity {shown(after)} ({name}), {abs(change):.1f} % {'under' if change < 0 else 'over'} {first}"
        )
    elif not rows:
        parts.append("not evaluated yet: the run is still in progress or was interrupted")
    return "; ".join(parts)


def _verdict(events: Sequence[Event]) -> str:
    """The sentences of the verdict."""
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in verdict_of(events).sentences)
    return _section("Verdict", f'<div class="card"><ul>{items}</ul></div>' if items else "")


def _curves(events: Sequence[Event]) -> str:
    steps = only(events, Step)
    training, heldout = _points(steps, "loss"), _points(only(events, HeldOut), "loss")
    series = [
        Series("training, each step", training, "train", dots),
        Series("training, smoothed", smooth(training), "train", line),
        Series("held out", heldout, "held", marks),
    ]
    cards = [draw("Loss in nats per token", series, width=920, height=340)]
    small = [
        draw(title, [Series(title, _points(steps, key), "train", line)], width=300, height=190)
        for key, title in (
            ("learning_rate", "Learning rate"),
            ("tokens_per_second", "Tokens per second"),
            ("grad_norm", "Gradient norm"),
        )
    ]
    if any(small):
        cards.append(f'<div class="pair" style="margin-top:1rem">{"".join(small)}</div>')
    return _section("Training", "".join(cards))


def _perplexities(events: Sequence[Event]) -> str:
    rows = _rows(events)
    if not rows:
        return ""
    base = _number(rows[0].perplexity)
    table = []
    for row in rows:
        perplexity = _number(row.perplexity)
        change = _change(perplexity, base) if perplexity and base and row is not rows[0] else ""
        cells = [row.name, row.scheme, row.adapter, row.perplexity, row.bits_per_byte, row.tokens, row.loss]
        bounds = f"{shown(row.interval.low)} to {shown(row.interval.high)}" if row.interval else ""
        table.append([*("" if cell is None else cell for cell in cells), bounds, change])
    columns = (
        "model", "scheme", "adapter", "perplexity", "bits per byte", "tokens", "loss", "95 % interval",
        "against the first",
    )  # fmt: skip
    return _section(
        "Held-out perplexity", _table(columns, table, text_columns=3) + _differences(events) + _overlap(events)
    )


def _differences(events: Sequence[Event]) -> str:
    """How much lower the loss of the tuned model is."""
    evaluation = last(events, Evaluation)
    sentences = [
        f"loss of {one.before} \N{MINUS SIGN} loss of {one.after}: {shown(one.lower_by)} nats per token (95 % interval "
        f"{shown(one.interval.low)} to {shown(one.interval.high)}, over {one.interval.units:,} {one.interval.over})"
        for one in (evaluation.differences if evaluation else ())
        if one.lower_by is not None and one.interval is not None
    ]
    return f'<p class="lead">{_text("; ".join(sentences))}.</p>' if sentences else ""


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
    return f'<p class="lead">{_text("; ".join(sentences))}.</p>'


def _change(perplexity: float, base: float) -> str:
    return f"{100 * (perplexity / base - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def _samples(events: Sequence[Event]) -> str:
    by_prompt: dict[str, list[Sample]] = {}
    for sample in only(events, Sample):
        by_prompt.setdefault(sample.prompt, []).append(sample)
    blocks = []
    for samples in by_prompt.values():
        before_and_after = ("base", "Before"), ("tuned", "After")
        reference = next((sample.reference for sample in samples if sample.reference), "")
        cards = [_sample("Held-out text", Sample(None, samples[0].prompt, reference))] if reference else []
        cards += [_sample(title, _last_where(samples, which)) for which, title in before_and_after]
        training_samples = [
            _sample(f"Step {'?' if sample.step is None else shown(sample.step)}", sample)
            for sample in samples
            if sample.which == "training"
        ]
        details = (
            f"<details><summary>While training</summary>{''.join(training_samples)}</details>"
            if training_samples
            else ""
        )
        blocks.append(f'<div class="pair">{"".join(cards)}</div>{details}')
    return _section("Samples", "".join(blocks))


def _sample(title: str, sample: Sample | None) -> str:
    if sample is None:
        return ""
    text = sample.text.removeprefix(sample.prompt)
    body = f'<pre><span class="prompt">{_text(sample.prompt)}</span>{_text(text)}</pre>'
    return f'<div class="card"><h3>{_text(title)}</h3>{body}</div>'


def _ledger(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        ledger = parse(path.read_bytes(), strict=False)
    except JsonError as error:
        raise DataError(f"not JSON: {error}", source=str(path), hint="Delete the file and try again.") from error
    if not isinstance(ledger, dict):
        raise DataError("not a ledger", source=str(path), hint="Delete the file and try again.")
    sides = {"": ledger} if "tokens" in ledger else ledger  # else of the training and the test text
    blocks = []
    for name, side in sides.items():
        if not side:
            continue
        keys = [key for key in ("documents", "tokens", "trained", "masked", "left_out", "padding") if key in side]
        keys += ["repeated_bos"] if side.get("repeated_bos") else []
        files = sorted(side.get("files", ()), key=lambda file: -file.get("tokens", 0))
        rows = [[file.get("source", ""), *(file.get(key, "") for key in keys)] for file in files[:MAX_FILES]]
        if len(files) > MAX_FILES:
            rows.append([f"and {len(files) - MAX_FILES:,} smaller files", *("" for _ in keys)])
        not_read = side.get("not_read")
        if isinstance(not_read, dict) and not_read:
            counts = ", ".join(f"{count} {kind}" for kind, count in not_read.items())
            rows.append([f"not read: {counts}", *("" for _ in keys)])
        rows.append(["all", *(side[key] for key in keys)])
        header = "file" if not name else f"{name} file"
        # Held-out tokens with a loss are not trained.
        titles = ["scored" if (name, key) == ("test", "trained") else key.replace("_", " ") for key in keys]
        blocks.append(_table([header, *titles], rows, text_columns=1, total=True))
    return _section("Token ledger", "".join(blocks))


def _warnings(events: Sequence[Event]) -> str:
    items = [f"<li>{_text(event.text)}</li>" for event in only(events, Warn)]
    return _section("Warnings", f'<div class="card"><ul>{"".join(items)}</ul></div>' if items else "")


def _settings(text: str) -> str:
    return _section("Settings", f'<div class="card"><pre>{_text(text.strip())}</pre></div>')


def _facts(title: str, event: Event | None) -> str:
    """A table of the fields of an event and their values."""
    rows = [[key.replace("_", " "), value] for key, value in (asdict(event) if event else {}).items() if value]
    return _section(title, _table((), rows, text_columns=2) if rows else "")


def _number(value: float | None) -> float | None:
    """The value if it is finite: infinity and NaN cannot be drawn or compared."""
    return value if value is not None and math.isfinite(value) else None


def _points(events: Iterable[Step | HeldOut], field: str) -> Points:
    """(step, value of a field) of the events in which it is finite."""
    pairs = ((float(event.step), _number(getattr(event, field))) for event in events)
    return [(x, y) for x, y in pairs if y is not None]


def _rows(events: Sequence[Event]) -> tuple[ScoreRow, ...]:
    """The rows of the last perplexity table; () before the run's end."""
    evaluation = last(events, Evaluation)
    return evaluation.rows if evaluation else ()


def _last_where(samples: Sequence[Sample], which: str) -> Sample | None:
    return next((sample for sample in reversed(samples) if sample.which == which), None)
