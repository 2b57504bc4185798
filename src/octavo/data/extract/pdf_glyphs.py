"""The characters of a PDF page as fragments of lines, by PDFium through pypdfium2.

A fragment is a run of characters on one baseline without a wide gap: a line of a column, or a cell of a table.
Legend: all lengths are in points, y grows upwards. The size of a character is the height of its font's box.
"""

from __future__ import annotations

import ctypes
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from octavo.data.extract.text import clean

# Around the digits of a superscript, such as the mark of a footnote. PDF fonts use these private characters seldom.
SUPER, NORMAL = "\ue000", "\ue001"
HYPHEN_AT_BREAK = "\ufffe"  # PDFium writes a hyphen at the end of a line as a noncharacter
MAX_CHARACTERS = 2_000_000  # of a page; a full one has some 5,000
_GAP = 0.9  # sizes; a wider gap ends a fragment. Justified lines have gaps of up to 0.8
_SPACE = 0.14  # sizes; a wider gap within a fragment is a space
_SMALLER = 0.88  # of the size of the text before it: a superscript, which browsers write at 0.83
_RAISED = 0.2  # sizes from the baseline to the ink of a digit that its font draws as a superscript
_STRAIGHT = 0.05  # radians


@dataclass
class Fragment:
    """Characters of one line. `order` numbers the fragments of a page as the file draws them."""

    order: int
    left: float
    right: float
    y: float  # of the baseline
    size: float
    text: str

    @property
    def first_word(self) -> float:
        """The width of the first word, if all characters are as wide as on average."""
        word, _, _ = self.text.partition(" ")
        return (self.right - self.left) * len(word) / max(1, len(self.text))


@dataclass
class Page:
    """The fragments of a page, and how many of its characters have no letter or are turned."""

    width: float
    height: float
    fragments: list[Fragment] = field(default_factory=list)
    n_characters: int = 0
    n_unknown: int = 0
    n_turned: int = 0


@dataclass(slots=True)
class _Glyph:
    character: str
    x: float
    y: float
    right: float
    size: float
    is_raised: bool = False  # drawn above the baseline by its font


def read_page(page: Any, textpage: Any, raw: Any) -> Page:
    """The fragments of one page. `raw` is the module pypdfium2.raw."""
    width, height = page.get_size()
    result = Page(width, height)
    run: list[_Glyph] = []
    space = False
    for glyph in _glyphs(page, textpage, raw, result):
        if glyph is None:
            space = True
            continue
        if run and _ends(run, glyph):
            _close(run, result)
            run, space = [], False
        if run and (space or glyph.x - run[-1].right > _SPACE * glyph.size):
            run.append(_Glyph(" ", run[-1].right, run[-1].y, run[-1].right, run[-1].size))
        run.append(glyph)
        space = False
    _close(run, result)
    return result


def _glyphs(page: Any, textpage: Any, raw: Any, result: Page) -> Iterator[_Glyph | None]:
    """The visible characters in the order of the file; None for white space."""
    turn = page.get_rotation() % 360
    x, y, box = ctypes.c_double(), ctypes.c_double(), raw.FS_RECTF()
    for index in range(textpage.count_chars()):
        character = chr(min(raw.FPDFText_GetUnicode(textpage, index), 0x10FFFF))
        if character == "\x02":
            character = HYPHEN_AT_BREAK
        if character.isspace() or (raw.FPDFText_IsGenerated(textpage, index) == 1 and character != HYPHEN_AT_BREAK):
            yield None
            continue
        result.n_characters += 1
        if unicodedata.category(character) in ("Cc", "Co", "Cn", "Cs") and character != HYPHEN_AT_BREAK:
            result.n_unknown += 1
            continue
        if character == "\ufffd":
            result.n_unknown += 1
        angle = 0.0 if turn else raw.FPDFText_GetCharAngle(textpage, index)
        if _STRAIGHT < angle < 2 * math.pi - _STRAIGHT:
            result.n_turned += 1
            continue
        raw.FPDFText_GetCharOrigin(textpage, index, x, y)
        raw.FPDFText_GetLooseCharBox(textpage, index, box)
        left, right, at, size = box.left, box.right, y.value, box.top - box.bottom
        if turn:
            left, right, at, size = _turned(box, x.value, y.value, turn, result)
        if not all(map(math.isfinite, (left, right, at, size))):  # a damaged file
            result.n_unknown += 1
            continue
        is_raised = not turn and character.isdecimal() and _ink_bottom(textpage, raw, index) - at > _RAISED * size
        yield _Glyph(character, left, at, right, max(size, 1.0), is_raised)


def _ink_bottom(textpage: Any, raw: Any, index: int) -> float:
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    raw.FPDFText_GetCharBox(textpage, index, left, right, bottom, top)
    return bottom.value


def _turned(box: Any, x: float, y: float, turn: int, page: Page) -> tuple[float, float, float, float]:
    """(left, right, baseline, size) as a page that is displayed turned by 90, 180 or 270 degrees shows them."""
    if turn == 90:
        return box.bottom, box.top, page.height - x, box.right - box.left
    if turn == 270:
        return page.width - box.top, page.width - box.bottom, x, box.right - box.left
    return page.width - box.right, page.width - box.left, page.height - y, box.top - box.bottom


def _ends(run: list[_Glyph], glyph: _Glyph) -> bool:
    """Whether a glyph does not continue the run: another line, a jump back, or a wide gap."""
    last = run[-1]
    size = max(last.size, glyph.size)
    return (
        abs(glyph.y - run[0].y) > 0.5 * max(size, run[0].size)
        or glyph.x < last.x - 0.5 * size
        or glyph.x - last.right > _GAP * size
    )


def _close(run: list[_Glyph], page: Page) -> None:
    """Adds the run to the page as a fragment, its superscript digits between SUPER and NORMAL."""
    if not run:
        return
    size = _usual([glyph.size for glyph in run])
    base = _usual([glyph.y for glyph in run if glyph.size > _SMALLER * size])
    parts, raised = [], False
    for glyph in run:
        is_small = glyph.size < _SMALLER * size and glyph.y > base + 0.1 * size and not glyph.character.isalpha()
        is_super = (is_small or glyph.is_raised) and glyph.character != " "
        if is_super != raised:
            parts.append(SUPER if is_super else NORMAL)
            raised = is_super
        parts.append(glyph.character)
    text = clean("".join(parts) + (NORMAL if raised else "")).strip()
    if text:
        left, right = min(glyph.x for glyph in run), max(glyph.right for glyph in run)
        page.fragments.append(Fragment(len(page.fragments), left, right, base, size, text))


def _usual(values: list[float]) -> float:
    """The most frequent value, to a tenth of a point."""
    counts: dict[float, int] = {}
    for value in values:
        counts[round(value, 1)] = counts.get(round(value, 1), 0) + 1
    return max(counts, key=lambda value: (counts[value], value))
