"""Loss curves as text: a letter for each run, for terminals and logs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from octavo.html_report.chart import Points, ticks
from octavo.reporting import shown

WIDTH, HEIGHT = 64, 14  # of the plot in characters, without axis and labels
SEVERAL = "*"  # where curves of several runs have one character


def text_plot(curves: Sequence[tuple[str, Points]], *, width: int = WIDTH, height: int = HEIGHT) -> str:
    """The curves (letter, points) over steps, joined linearly; "" without a point."""
    points = [point for _, each in curves for point in each]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 4)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    grid = [[" "] * width for _ in range(height)]
    for letter, each in curves:
        for column, y in _columns(each, x_low, x_high, width):
            row = round((y_high - y) / (y_high - y_low) * (height - 1))
            grid[row][column] = letter if grid[row][column] in (" ", letter) else SEVERAL
    labels = {round((y_high - tick) / (y_high - y_low) * (height - 1)): shown(float(tick)) for tick in y_ticks}
    margin = max(map(len, labels.values()))
    lines = [f"{labels.get(row, ''):>{margin}} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    first, last = f"{x_low:,.0f}", f"{x_high:,.0f}"
    lines.append(f"{'':>{margin}} +{'-' * width}")
    lines.append(f"{'':>{margin}}  {first} step{last:>{width - len(first) - 5}}")
    return "\n".join(lines)


def _columns(points: Points, low: float, high: float, width: int) -> list[tuple[int, float]]:
    """(column, y) of each column from the first to the last point, interpolated between them."""
    scale = (width - 1) / (high - low) if high > low else 0.0
    placed = sorted(((x - low) * scale, y) for x, y in points)
    found = [(round(placed[0][0]), placed[0][1])] if placed else []
    for (x0, y0), (x1, y1) in pairwise(placed):
        for column in range(round(x0) + 1, round(x1) + 1):
            share = min(1.0, max(0.0, (column - x0) / (x1 - x0)))
            found.append((column, y0 + share * (y1 - y0)))
    return found
