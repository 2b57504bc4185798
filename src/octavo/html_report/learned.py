"""The section of report.html on what a model learned, forgot and copies."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.html_report.elements import section, table, text
from octavo.runs.events import Copies, Event, Forgot, Learned, last
from octavo.runs.probe_sentences import probe_table


def learned_section(events: Sequence[Event]) -> str:
    """The table of the measurements, the cloze probes that changed most, and the longest copy; "" without any."""
    rows = probe_table(events)
    parts = [table(("", "before", "after", "change"), rows, text_columns=1)] if rows else []
    parts += [
        f'<p class="lead">{text(f"{name}: not measured, {event.reason}.")}</p>'
        for name, kind in (("General text", Forgot), ("Cloze probes", Learned), ("Verbatim copies", Copies))
        if isinstance(event := last(events, kind), Forgot | Learned | Copies) and event.reason
    ]
    if (words := last(events, Learned)) and words.examples:
        examples = [[f"..{one.context} __", one.answer, one.before, one.after] for one in words.examples]
        columns = "held-out text", "true word", "likeliest before", "likeliest after"
        parts.append("<h3>Probes that changed most</h3>" + table(columns, examples, text_columns=4))
    if (copies := last(events, Copies)) and copies.longest:
        title = f"The longest verbatim copy: {copies.longest} tokens, from {copies.source}"
        parts.append(f'<div class="card"><h3>{text(title)}</h3><pre>{text(copies.text)}</pre></div>')
    return section("Learned, forgot, copied", "".join(parts))
