"""What a run learned, forgot and copies, in sentences of the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from octavo.runs import events
from octavo.runs.events import Event, last
from octavo.runs.interval import half_width, plus_minus

NAMED_COPY = 16  # tokens of a copy from which on the verdict names the training document that has it


def probe_sentences(found: Sequence[Event]) -> list[str]:
    """The sentences on the last measurements; [] for a run without them."""
    return [
        *_forgot(last(found, events.Forgot)),
        *_learned(last(found, events.Learned)),
        *_copies(last(found, events.Copies)),
    ]


def probe_results(found: Sequence[Event]) -> dict[str, Any]:
    """`learned`, `forgot` and `copies` of the JSON result; None for what was not measured."""
    kinds: dict[str, type[Event]] = {"learned": events.Learned, "forgot": events.Forgot, "copies": events.Copies}
    values: dict[str, dict[str, Any] | None] = {}
    for name, kind in kinds.items():
        event = last(found, kind)
        values[name] = None if event is None else asdict(event)
    if learned := values["learned"]:
        learned["examples"] = list(learned["examples"])
    return values


def probe_table(found: Sequence[Event]) -> list[list[str]]:
    """Rows of (measure, before, after, change with half of its interval); [] for a run without measurements."""
    rows: list[list[str]] = []
    if (text := last(found, events.Forgot)) and text.before is not None and text.after is not None:
        rows.append(["general text, bits per byte", f"{text.before:.4f}", f"{text.after:.4f}", _shown(text, 1, "+.4f")])
    if (words := last(found, events.Learned)) and words.before is not None and words.after is not None:
        name = f"likeliest of {1 + words.wrong} words, {words.probes} cloze probes"
        rows.append([name, f"{words.before:.1%}", f"{words.after:.1%}", _shown(words, 100)])
        control = events.Learned(rise=words.control_rise, interval=words.control_interval)
        name = "shuffled control: a wrong word"
        rows.append([name, f"{words.control_before or 0:.1%}", f"{words.control_after or 0:.1%}", _shown(control, 100)])
        gain = events.Learned(rise=words.gain, interval=words.gain_interval)
        rows.append(["log-probability of the true word, nats per token", "", "", _shown(gain, 1)])
        gain = events.Learned(rise=words.control_gain, interval=words.control_gain_interval)
        rows.append(["shuffled control: of a wrong word", "", "", _shown(gain, 1)])
    if (copies := last(found, events.Copies)) and copies.before is not None and copies.after is not None:
        name = f"runs of {copies.ngram} tokens copied from the training text"
        rows.append([name, f"{copies.before:.1%}", f"{copies.after:.1%}", _shown(copies, 100)])
        rows.append(["shuffled control: the same tokens shuffled", "", f"{copies.shuffled or 0:.1%}", ""])
    return rows


def _shown(one: events.Forgot | events.Learned | events.Copies, factor: float, form: str = "+.1f") -> str:
    """A change and half its interval; `factor` 100 for percentage points."""
    if one.rise is None:
        return ""
    half = half_width(one.interval)
    unit = " points" if factor == 100 else ""
    if half is None:
        return f"{factor * one.rise:{form}}{unit}"
    return f"{'+' * (one.rise > 0)}{plus_minus(factor * one.rise, factor * half)}{unit}"


def _forgot(event: events.Forgot | None) -> list[str]:
    if event is None:
        return []
    half = half_width(event.interval)
    if event.rise is None or half is None:
        return [f"General text: not measured, {event.reason}."] if event.reason else []
    on = f" on {event.documents:,} short documents that come with octavo"
    if abs(event.rise) <= half:
        return [f"General text: no change can be told, {plus_minus(event.rise, half)} bits per byte{on}."]
    word, what = ("rises", "forgot") if event.rise > 0 else ("falls", "gained")
    return [f"General text: the loss {word} by {plus_minus(abs(event.rise), half)} bits per byte{on} ({what})."]


def _learned(event: events.Learned | None) -> list[str]:
    if event is None:
        return []
    if event.before is None or event.after is None or event.rise is None:
        return [f"Cloze probes: not measured, {event.reason}."] if event.reason else []
    chance = 1 / (1 + event.wrong)
    share = f"{event.before:.0%} -> {event.after:.0%} of {event.probes:,} words (by chance {chance:.0%})"
    half = half_width(event.interval)
    if half is None:
        return [f"Cloze probes of the held-out text: the true word is the likeliest for {share}, without an interval."]
    change = f"{_percent(event.rise, half)} points"
    control = ""
    if event.control_rise is not None and (control_half := half_width(event.control_interval)) is not None:
        control = f"; of wrong words in their place {_percent(event.control_rise, control_half)}"
    word = "Recovered" if event.rise > half else "Lost" if event.rise < -half else "No change can be told in"
    return [f"{word} words left out of the held-out text: {share}, {change}{control}."]


def _copies(event: events.Copies | None) -> list[str]:
    if event is None:
        return []
    if event.before is None or event.after is None or event.rise is None:
        return [f"Verbatim copies: not measured, {event.reason}."] if event.reason else []
    text = (
        f"Verbatim copies: {event.after:.1%} of the runs of {event.ngram} tokens in {event.samples} samples are in the "
        f"training text, before {event.before:.1%}, in shuffled order {event.shuffled or 0:.1%}."
    )
    if event.longest < NAMED_COPY:
        return [text]
    quoted = " ".join(event.text.split())
    short = quoted if len(quoted) <= 80 else f"{quoted[:80]}.."
    return [text, f"The longest copy has {event.longest} tokens, from {event.source}: {short!r}."]


def _percent(value: float, half: float) -> str:
    """A change of a share and half its interval, in percentage points."""
    return plus_minus(100 * value, 100 * half) if math.isfinite(half) else f"{100 * value:+.0f}"
