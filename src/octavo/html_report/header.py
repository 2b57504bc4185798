"""The head of a report: what was trained on what, and the figures that people look for first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from octavo.html_report.chart import smooth
from octavo.html_report.elements import text
from octavo.html_report.paths import last_name
from octavo.reporting import duration, printable, shown
from octavo.runs.events import Evaluation, Event, Hardware, HeldOut, ScoreRow, Step, last, only
from octavo.runs.verdict import Verdict

MINUS, ARROW, PLUS_MINUS = "\N{MINUS SIGN}", "\N{RIGHTWARDS ARROW}", "\N{PLUS-MINUS SIGN}"


@dataclass(frozen=True)
class Figure:
    """One of the large figures: its name, its value, and a line below it."""

    name: str
    value: str
    below: str = ""
    css_class: str = ""


def header(
    name: str, events: Sequence[Event], verdict: Verdict, settings: Mapping[str, str], *, written: str | None
) -> str:
    """The title, a line about model, device and date, and the figures. `written`: the time of the last event."""
    about = [last_name(settings.get("model", "")), *_base(events, settings), _device(events), _date(written)]
    figures = [figure for figure in (_gain(verdict), _perplexity(events), _trained(events), _time(events)) if figure]
    cards = "".join(
        f'<div class="figure {one.css_class}"><span>{text(one.name)}</span><b>{text(one.value)}</b>'
        f"<span>{text(one.below)}</span></div>"
        for one in figures
    )
    line = " \N{MIDDLE DOT} ".join(printable(part) for part in about if part)
    return (
        f"<header>\n<h1>{text(name)}</h1>\n"
        + (f'<p class="lead">{text(line)}</p>\n' if line else "")
        + (f'<div class="figures">{cards}</div>\n' if cards else "")
        + ("" if rows_of(events) else f'<p class="lead">{text(summary(events))}</p>\n')
        + "</header>"
    )


def summary(events: Sequence[Event]) -> str:
    """The run in one line: steps, training loss, and bits per byte and perplexity of the first and the last row."""
    losses = [(float(step.step), loss) for step in only(events, Step) if (loss := finite(step.loss)) is not None]
    newest = last(events, Step)
    parts = [f"{newest.step:,} step{'s' * (newest.step != 1)}"] if newest else []
    if parts:
        parts[0] += f", training loss {smooth(losses)[-1][1]:.3f}" if losses else " without a trained token"
    rows = [row for row in rows_of(events) if finite(row.perplexity)]
    if len(rows) > 1:
        before, after = rows[0], rows[-1]
        change = f"perplexity {_shown(before.perplexity)} -> {_shown(after.perplexity)}"
        if finite(before.bits_per_byte) is not None and finite(after.bits_per_byte) is not None:
            change = f"{_shown(before.bits_per_byte)} -> {_shown(after.bits_per_byte)} bits per byte, {change}"
        parts.append(f"{change} ({before.name} -> {after.name})")
    elif not rows:
        parts.append("not evaluated yet: the run is still in progress or was interrupted")
    return "; ".join(parts)


def rows_of(events: Sequence[Event]) -> tuple[ScoreRow, ...]:
    """The rows of the last perplexity table; () before the run's end."""
    evaluation = last(events, Evaluation)
    return evaluation.rows if evaluation else ()


def _shown(value: float | None) -> str:
    return "?" if value is None else shown(value)


def finite(value: float | None) -> float | None:
    """The value if it is finite: infinity and NaN cannot be drawn or compared."""
    return value if value is not None and math.isfinite(value) else None


def _base(events: Sequence[Event], settings: Mapping[str, str]) -> list[str]:
    rows, rank = rows_of(events), settings.get("rank", "")
    scheme = rows[-1].scheme if rows else settings.get("scheme", "")
    base = {"": "", "auto": "", "none": "unquantized base"}.get(scheme, f"{scheme} base")
    return [base, f"LoRA of rank {rank}" if rank.isdigit() else ""]


def _device(events: Sequence[Event]) -> str:
    hardware = last(events, Hardware)
    return f"{hardware.name or hardware.device}, {hardware.dtype.removeprefix('torch.')}" if hardware else ""


def _date(written: str | None) -> str:
    try:
        return f"{datetime.fromisoformat(written):%Y-%m-%d %H:%M} UTC" if written else ""
    except ValueError:
        return ""


def _perplexity(events: Sequence[Event]) -> Figure | None:
    rows = [(row.name, value) for row in rows_of(events) if (value := finite(row.perplexity))]
    if len(rows) < 2:
        return None
    (first, before), (newest, after) = rows[-2], rows[-1]
    return Figure(
        "Held-out perplexity",
        f"{shown(before)} {ARROW} {shown(after)}",
        f"{first} {ARROW} {newest}",
    )


def _gain(verdict: Verdict) -> Figure | None:
    if verdict.gain is None:
        return None
    half = f" {PLUS_MINUS} {verdict.plus_minus:.3f}" if verdict.plus_minus is not None else ""
    word = {"better": "better", "worse": "worse", "unclear": "no difference can be told"}.get(verdict.change, "")
    value = f"{verdict.gain:+.3f}".replace("-", MINUS)
    return Figure("Gain in bits per byte", value + half, word or "without an interval", verdict.change)


def _trained(events: Sequence[Event]) -> Figure | None:
    steps = only(events, Step)
    tokens = sum(step.trained_tokens or step.tokens or 0 for step in steps)
    if not steps:
        return None
    passes = [event.passes for event in only(events, HeldOut) if finite(event.passes)]
    over = f", {passes[-1]:.3g} passes over the text" if passes and passes[-1] else ""
    number = max(step.step for step in steps)
    return Figure("Trained", f"{tokens:,} tokens", f"{number:,} step{'s' * (number != 1)}{over}")


def _time(events: Sequence[Event]) -> Figure | None:
    """Of the training steps alone: their tokens over their speeds."""
    timed = [
        (step.tokens, step.tokens_per_second)
        for step in only(events, Step)
        if step.tokens and finite(step.tokens_per_second)
    ]
    seconds = sum(tokens / speed for tokens, speed in timed if tokens and speed)
    if not seconds:
        return None
    tokens = sum(tokens or 0 for tokens, _ in timed)
    return Figure(
        "Time of the steps", duration(seconds), f"{shown(round(tokens / seconds))} tokens/s, evaluations not counted"
    )
