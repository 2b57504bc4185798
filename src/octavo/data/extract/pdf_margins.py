"""Finds the running heads and page numbers of a PDF: lines at the top or bottom that recur on neighbouring pages."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from octavo.data.extract.pdf_glyphs import Fragment, Page

_LINES = 3  # at the top and at the bottom of a page that may be heads
_NEAR = 3.0  # points; lines of one head are at the same height to within these
# Pages before, or after, on which a head recurs: on this number of them, or on all of the same side of a sheet.
_WINDOW = 6
_RECURRENCES = 4
_FEW_PAGES = 2 * _WINDOW + 1
_MOST_PAGES = 0.6  # of the pages that have a head at one height, so that a lone line there is one too
_NUMBER = re.compile(r"\d+|\b[ivxlcdm]+\b", re.IGNORECASE | re.ASCII)  # ASCII: Turkish has other letters i
_ONLY_NUMBER = re.compile(
    r"[\W_]*(?:page|seite|pagina|p|s)?[\W_]*#(?:\s*(?:/|of|von|de|-|–)\s*#)?[\W_]*", re.IGNORECASE
)


@dataclass
class _Line:
    page: int
    y: float
    key: str  # its text with # for each number
    numbers: tuple[int, ...]
    fragments: list[Fragment]
    is_apart: bool  # from the line after it towards the middle of the page


def remove_margins(pages: Sequence[Page]) -> Counter[str]:
    """Removes running heads and page numbers from the pages; returns how many there were of each kind."""
    removed: Counter[str] = Counter()
    for at_top in (True, False):
        lines = [_margin_lines(number, page, at_top=at_top) for number, page in enumerate(pages)]
        heads = _recurring(lines, len(pages))
        heads += _at_height_of(heads, lines, len(pages))
        for line in _outermost(heads, lines):
            drawn = {id(fragment) for fragment in line.fragments}
            page = pages[line.page]
            page.fragments = [fragment for fragment in page.fragments if id(fragment) not in drawn]
            is_number = bool(_ONLY_NUMBER.fullmatch(line.key))
            removed["page number" if is_number else "running head" if at_top else "running foot"] += 1
    return removed


def _outermost(heads: Sequence[_Line], lines: list[list[_Line]]) -> Iterator[_Line]:
    """The heads without text between them and the edge of the page."""
    known = {id(line) for line in heads}
    for page in lines:
        yield from takewhile(lambda line: id(line) in known, page)


def _margin_lines(number: int, page: Page, *, at_top: bool) -> list[_Line]:
    """The outermost lines of a page, the outermost first."""
    rows: list[list[Fragment]] = []
    for fragment in sorted(page.fragments, key=lambda fragment: -fragment.y if at_top else fragment.y):
        if rows and abs(rows[-1][0].y - fragment.y) < _NEAR:
            rows[-1].append(fragment)
        elif len(rows) > _LINES:
            break
        else:
            rows.append([fragment])
    lines = []
    for index, row in enumerate(rows[:_LINES]):
        row.sort(key=lambda fragment: fragment.left)
        text = " ".join(fragment.text for fragment in row)
        gap = abs(rows[index + 1][0].y - row[0].y) if index + 1 < len(rows) else page.height
        numbers = tuple(map(_value, _NUMBER.findall(text)))
        key = _NUMBER.sub("#", text)
        lines.append(_Line(number, row[0].y, key, numbers, row, gap > 1.5 * row[0].size))
    return lines


def _value(number: str) -> int:
    if number.isdecimal():
        return int(number[:9])
    digits = [{"i": 1, "v": 5, "x": 10, "l": 50, "c": 100, "d": 500, "m": 1000}[digit] for digit in number.lower()]
    pairs = zip(digits, [*digits[1:], 0], strict=True)
    return sum(-digit if digit < following else digit for digit, following in pairs)


def _recurring(lines: list[list[_Line]], n_pages: int) -> list[_Line]:
    """The lines that recur, at the same height and with the same text, on pages near their own."""
    by_key: dict[str, list[_Line]] = defaultdict(list)
    for page in lines:
        for line in page:
            by_key[line.key].append(line)
    heads = []
    for same in by_key.values():
        for index, line in enumerate(same):
            near = same[max(0, index - _LINES * _WINDOW) : index + _LINES * _WINDOW + 1]
            pages = {other.page for other in near if _recurs(line, other)}
            counting = {other.page for other in near if other.page in pages and _counts(line, other)}
            if _on_enough(pages, line, n_pages, len(counting)):
                heads.append(line)
    return heads


def _on_enough(pages: set[int], line: _Line, n_pages: int, n_counting: int) -> bool:
    """Whether a line that is on `pages` too is on enough of those before or after its own, or on every second one.

    On `n_counting` of them it has a number that counts the pages.
    """
    number = line.page
    if line.is_apart and n_counting >= (1 if n_pages <= _FEW_PAGES else 2):
        return True
    sides = [range(number - _WINDOW, number), range(number + 1, number + _WINDOW + 1)]
    sides = [side for side in sides if side[0] >= 0 and side[-1] < n_pages]
    if not sides:  # a document of few pages
        least = math.ceil(_MOST_PAGES * (n_pages - 1))
        return len(pages) >= max(1 if n_counting else 2, least)
    return any(
        sum(page in pages for page in side) >= (_RECURRENCES if line.is_apart else _WINDOW)
        or (line.is_apart and all(page in pages for page in side if (page - number) % 2 == 0))
        for side in sides
    )


def _recurs(line: _Line, other: _Line) -> bool:
    distance = other.page - line.page
    if not 0 < abs(distance) <= _WINDOW or abs(other.y - line.y) > _NEAR:
        return False
    if not line.numbers or re.search(r"[^\W_]", line.key):
        return True
    # Numbers alone, such as the last row of a table, are page numbers only if they count the pages.
    return _counts(line, other)


def _counts(line: _Line, other: _Line) -> bool:
    """Whether a number of the two lines grows with the pages."""
    distance = other.page - line.page
    return any(b - a == distance for a, b in zip(line.numbers, other.numbers, strict=False))


def _at_height_of(heads: Sequence[_Line], lines: list[list[_Line]], n_pages: int) -> list[_Line]:
    """Lines apart from the text at the height at which most pages have a head, such as that of a short chapter."""
    heights = Counter(round(line.y) for line in heads)
    known = {id(line) for line in heads}
    found = []
    for height, _ in heights.items():
        count = len({line.page for line in heads if abs(line.y - height) <= _NEAR})
        if count < max(3, _MOST_PAGES * n_pages):
            continue
        for line in (line for page in lines for line in page[:1]):
            if id(line) not in known and abs(line.y - height) <= _NEAR and line.is_apart:
                known.add(id(line))
                found.append(line)
    return found
