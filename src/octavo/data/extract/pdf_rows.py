"""Lines of a column of a PDF page, and which of them are rows of a table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from octavo.data.extract.pdf_glyphs import HYPHEN_AT_BREAK, Fragment

_NEAR = 2.0  # points; cells of one column of a table begin at the same x to within these
_WITHIN_ROW = 0.9  # of the usual distance of two rows: lines nearer than that are of one row
_LEAST_ROWS = 3  # from which that distance is known


@dataclass
class Line:
    """A line of text, or a row of a table."""

    fragments: list[Fragment]
    is_row: bool = False

    @property
    def left(self) -> float:
        return self.fragments[0].left

    @property
    def right(self) -> float:
        return self.fragments[-1].right

    @property
    def y(self) -> float:
        return self.fragments[0].y

    @property
    def size(self) -> float:
        return self.fragments[0].size

    @property
    def text(self) -> str:
        """The fragments, with tabs between the cells of a row."""
        return ("\t" if self.is_row else " ").join(fragment.text for fragment in self.fragments)


def with_rows(lines: list[Line]) -> list[Line]:
    """The lines, with rows of tables marked as such. The lines of a row's cells become one line."""
    for index, line in enumerate(lines):
        line.is_row = len(line.fragments) > 1 and _is_row(index, lines)
    gaps = [a.y - b.y for a, b in itertools.pairwise(lines) if a.is_row and b.is_row]
    if len(gaps) < _LEAST_ROWS:
        return lines
    pitch = median(gaps)
    starts = sorted({fragment.left for line in lines if line.is_row for fragment in line.fragments})
    result: list[Line] = []
    last_y = 0.0
    for line in lines:
        if (
            result
            and last_y - line.y < _WITHIN_ROW * pitch
            and _in_cells(result[-1], starts)
            and _in_cells(line, starts)
        ):
            result[-1] = _merged(result[-1], line)
        else:
            result.append(line)
        last_y = line.y
    return result


def _is_row(index: int, lines: Sequence[Line]) -> bool:
    """Whether the gaps of a line are those of a table: a cell begins where one of a line nearby does."""
    line = lines[index]
    near = [other for other in lines[max(0, index - 2) : index + 3] if other is not line and len(other.fragments) > 1]
    starts = [fragment.left for other in near for fragment in other.fragments[1:]]
    return any(abs(fragment.left - start) < _NEAR for fragment in line.fragments[1:] for start in starts)


def _in_cells(line: Line, starts: Sequence[float]) -> bool:
    return all(any(abs(fragment.left - start) < _NEAR for start in starts) for fragment in line.fragments)


def _merged(row: Line, line: Line) -> Line:
    """The row with the cells of the next line of it."""
    cells = [replace(fragment) for fragment in row.fragments]
    for fragment in line.fragments:
        cell = next((cell for cell in cells if abs(cell.left - fragment.left) < _NEAR), None)
        if cell is None:
            cells.append(fragment)
            continue
        is_broken = cell.text.endswith(("-", "\u2010", HYPHEN_AT_BREAK)) and fragment.text[:1].islower()
        cell.text = cell.text[:-1] + fragment.text if is_broken else f"{cell.text} {fragment.text}"
        cell.right = max(cell.right, fragment.right)
    return Line(sorted(cells, key=lambda cell: cell.left), is_row=True)
