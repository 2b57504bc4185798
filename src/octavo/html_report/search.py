"""The HTML page of `octavo tune`: the choice and how sure it is, the cells, and their losses by steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from octavo.atomic import atomic_write
from octavo.html_report.chart import Series, draw, line, marks
from octavo.html_report.elements import page, section, table, text


def write(
    path: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    losses: Mapping[str, Sequence[tuple[int, float | None]]],
    sentences: Sequence[str],
    command: str,
) -> None:
    """Writes the page. `losses` has the steps and the loss of each trial of a cell, by its name."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    curves = []
    for cell, trials in losses.items():
        points = [(float(steps), loss) for steps, loss in trials if loss is not None]
        curves.append(Series(cell, points, "train", line))
        curves.append(Series("", points, "held", marks))
    chart = draw("Loss on the text that chooses, by the steps of a trial", curves, width=920, height=340)
    parts = [
        "<h1>Search of the learning rate and the rank</h1>",
        section("Choice", f'<div class="card"><ul>{items}</ul><pre>{text(command)}</pre></div>'),
        section("Cells", table(columns, rows, text_columns=1)),
        section("Curves", chart),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page("octavo tune", parts).encode("utf-8", "replace"))
