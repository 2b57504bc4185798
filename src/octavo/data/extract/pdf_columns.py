"""The reading order of a PDF page: columns one after the other, rows of a table as lines with tabs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.data.extract.pdf_glyphs import Fragment
from octavo.data.extract.pdf_rows import Line, with_rows

_LEAST_LINES = 4  # on each side of the space between two columns
_CROSSING = 0.3  # of the lines of a page, such as headings, may cross the space between columns
_FILLED = 0.7  # of the width of a column that lines of running text fill on average; cells of a table do not
_MOST_DEPTH = 8


@dataclass
class Column:
    """Lines from top to bottom, and the right edge of the widest one."""

    lines: list[Line] = field(default_factory=list)
    left: float = 0.0
    right: float = 0.0


def columns(fragments: Sequence[Fragment]) -> list[Column]:
    """The columns of a page, or of the parts of it between headings that cross all columns, in reading order."""
    return [_column(part) for part in _parts(list(fragments), 0)]


def _parts(fragments: list[Fragment], depth: int) -> list[list[Fragment]]:
    """Parts of a page in reading order, each of one column."""
    if not fragments:
        return []
    gutter = _gutter(fragments) if depth < _MOST_DEPTH else None
    if gutter is None:
        return [fragments]
    crossing = sorted((f for f in fragments if f.left < gutter < f.right), key=lambda f: -f.y)
    parts: list[list[Fragment]] = []
    rest = [f for f in fragments if not f.left < gutter < f.right]
    for heading in crossing:
        above = [f for f in rest if f.y > heading.y]
        rest = [f for f in rest if f.y <= heading.y]
        parts += _sides(above, gutter, depth)
        if parts and all(f in crossing for f in parts[-1]):
            parts[-1].append(heading)
        else:
            parts.append([heading])
    return parts + _sides(rest, gutter, depth)


def _sides(fragments: list[Fragment], gutter: float, depth: int) -> list[list[Fragment]]:
    left = [f for f in fragments if f.right <= gutter]
    right = [f for f in fragments if f.left >= gutter]
    return _parts(left, depth + 1) + _parts(right, depth + 1)


def _gutter(fragments: Sequence[Fragment]) -> float | None:
    """The x of a space between two columns of running text; None if there is none."""
    edges = sorted({round(f.left, 1) for f in fragments})
    best: tuple[int, float] | None = None
    for edge in edges[1:]:
        x = edge - 0.5
        left = [f for f in fragments if f.right <= x]
        right = [f for f in fragments if f.left >= x]
        n_crossing = len(fragments) - len(left) - len(right)
        if min(len(left), len(right)) < _LEAST_LINES or n_crossing > _CROSSING * len(fragments):
            continue
        if not _overlaps(left, right) or not _is_running_text(left, right):
            continue
        if best is None or n_crossing < best[0]:
            best = (n_crossing, x)
    return best[1] if best else None


def _overlaps(left: Sequence[Fragment], right: Sequence[Fragment]) -> bool:
    """Whether the two sides are next to each other, and not one above the other."""
    top = min(max(f.y for f in left), max(f.y for f in right))
    bottom = max(min(f.y for f in left), min(f.y for f in right))
    size = max(left[0].size, right[0].size)
    return top - bottom > 2 * size


def _is_running_text(left: Sequence[Fragment], right: Sequence[Fragment]) -> bool:
    """Whether the two sides are columns, not cells of rows.

    The file draws columns one after the other, and rows cell by cell. A program that draws line by line over all
    columns is recognized by the lines' widths: most lines of a column fill it.
    """
    sides = sorted([(f.order, 0) for f in left] + [(f.order, 1) for f in right])
    changes = sum(a[1] != b[1] for a, b in itertools.pairwise(sides))
    if changes <= max(2, 0.2 * min(len(left), len(right))):
        return True
    if min(len(left), len(right)) < 2 * _LEAST_LINES:
        return False
    return all(_share_filled(side) >= _FILLED for side in (left, right))


def _share_filled(side: Sequence[Fragment]) -> float:
    width = max(f.right for f in side) - min(f.left for f in side)
    return sum(f.right - f.left for f in side) / (len(side) * max(width, 1.0))


def _column(fragments: Sequence[Fragment]) -> Column:
    """The lines of one column: fragments at one height, from left to right."""
    lines: list[Line] = []
    for fragment in sorted(fragments, key=lambda f: (-f.y, f.left)):
        if lines and lines[-1].y - fragment.y < 0.35 * min(lines[-1].size, fragment.size):
            lines[-1].fragments.append(fragment)
        else:
            lines.append(Line([fragment]))
    for line in lines:
        line.fragments.sort(key=lambda f: f.left)
    lines = with_rows(lines)
    left = min((line.left for line in lines), default=0.0)
    return Column(lines, left, max((line.right for line in lines), default=0.0))
