"""The text of a PDF from its pages' columns: paragraphs are joined over lines and pages, footnotes come last."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo.data.extract.pdf_columns import Column
from octavo.data.extract.pdf_glyphs import HYPHEN_AT_BREAK, NORMAL, SUPER, Page
from octavo.data.extract.pdf_hyphens import Hyphens
from octavo.data.extract.pdf_rows import Line
from octavo.data.extract.text import TextBuilder

_SMALL = 0.93  # of the size of the text: that of footnotes
_MARKED = re.compile(rf"{SUPER}([\d*†‡§]+){NORMAL}[.)]?\s*|(\d{{1,3}})[.)]?\s+|([*†‡§¶]+)\s*")
_SUPERSCRIPT = re.compile(rf"{SUPER}([^{NORMAL}]*){NORMAL}")
# A mark, with the spaces that programs put between it and a punctuation mark.
_MARK = re.compile(rf" ?{SUPER}([^{NORMAL}]*){NORMAL} ?(?=[!?.,;:)\]\"”’])|{_SUPERSCRIPT.pattern}")
_LEADER = re.compile(r"(?:\.\s?){5,}\s*(?:\d+|[ivxlc]+)\Z|\u2026{3,}\s*\d+\Z")  # dots up to the number of a page
_BACK = re.compile(r"\s*[↩↑]\ufe0e?\Z")
_MOST_MISSED = 3  # marks that count 1, 2, 3, of which the last is found
_PARAGRAPH_GAP = 1.25  # of the usual distance of two lines
_ROW_GAP = 4.0  # sizes; rows of one table are nearer to each other
_SENTENCE_END = re.compile(r"[.!?:;][\"'”’)\]]*\Z")


@dataclass
class _Placed:
    """A line with its place."""

    line: Line
    text: str
    page: int
    column: int  # number of its column in the document
    left: float  # of its column
    right: float


def add_text(builder: TextBuilder, pages: Sequence[Page], page_columns: Sequence[Sequence[Column]]) -> None:
    """Adds the text of all pages to `builder`, with a position for each page, and the footnotes as its notes."""
    size = _usual_size(page_columns)
    notes: list[Line] = []
    labels: set[str] = set()
    for columns in page_columns:
        marks = {mark for column in columns for line in column.lines for mark in _SUPERSCRIPT.findall(line.text)}
        for column in columns:
            start = _notes_start(column, size, marks)
            notes += column.lines[start:]
            labels.update(label for line in column.lines[start:] if (label := _label(line.text)))
            del column.lines[start:]
    placed = list(_without_repetitions(list(_placed(page_columns)), builder.removed))
    builder.removed["footnote mark"] += _remove_marks(placed, labels)
    pairs = [(a.text, b.text) for a, b in itertools.pairwise(placed)]
    pairs += [(a.text, b.text) for a, b in itertools.pairwise(notes)]
    hyphens = Hyphens(pairs)
    _add_body(builder, placed, hyphens, _leading(placed))
    _add_notes(builder, notes, hyphens)


def _usual_size(page_columns: Sequence[Sequence[Column]]) -> float:
    sizes: Counter[float] = Counter()
    for columns in page_columns:
        for column in columns:
            for line in column.lines:
                sizes[round(line.size, 1)] += len(line.text)
    return max(sizes, key=lambda size: (sizes[size], size), default=1.0)


def _label(text: str) -> str:
    """The number or sign with which a footnote begins; "" if the text begins with none."""
    match = _MARKED.match(text)
    return next(filter(None, match.groups()), "") if match else ""


def _notes_start(column: Column, size: float, marks: set[str]) -> int:
    """The index of the first line of the footnotes at the bottom of a column; the number of lines if it has none."""
    lines = column.lines
    start = len(lines)
    for index in range(len(lines) - 1, -1, -1):
        line = lines[index]
        is_small = line.size <= _SMALL * size
        is_marked = line.text.startswith(SUPER) and _label(line.text) in marks
        if _label(line.text) and (is_marked or (is_small and index)):
            start = index
        elif not is_small and not _continues_note(lines, index):
            break
    return start


def _continues_note(lines: Sequence[Line], index: int) -> bool:
    """Whether a line of the usual size may be the second or third line of a footnote whose mark is above it."""
    return any(line.text.startswith(SUPER) for line in lines[max(0, index - 3) : index])


def _placed(page_columns: Sequence[Sequence[Column]]) -> Iterator[_Placed]:
    """All lines in reading order. The right edge of a column is that of all columns with the same left one."""
    rights: dict[int, float] = {}
    for columns in page_columns:
        for column in columns:
            key = round(column.left / 20)
            rights[key] = max(rights.get(key, 0.0), column.right)
    number = 0
    for page, columns in enumerate(page_columns):
        for column in columns:
            number += 1
            right = rights[round(column.left / 20)]
            for line in column.lines:
                yield _Placed(line, line.text, page, number, column.left, right)


def _without_repetitions(placed: Sequence[_Placed], removed: Counter[str]) -> Iterator[_Placed]:
    """The lines without tables of contents, and without the header of a table that continues in the next column."""
    header, before = "", None
    for item in placed:
        if _LEADER.search(item.text):
            removed["table of contents line"] += 1
            continue
        continues = before is not None and before.line.is_row and item.line.is_row
        if item.line.is_row and not continues:
            header = item.text
        elif continues and before is not None and item.column != before.column and item.text == header:
            removed["repeated table header"] += 1
            continue
        before = item
        yield item


def _remove_marks(placed: Sequence[_Placed], labels: set[str]) -> int:
    """Removes superscripts that are marks of footnotes: their footnote was found, or they count 1, 2, 3."""
    count, last = 0, 0

    def kept(match: re.Match[str]) -> str:
        nonlocal count, last
        label = (match[1] or match[2] or "").strip()
        number = int(label) if label.isdecimal() and len(label) < 5 else 0
        if label in labels or (number and (number == 1 or last < number <= last + _MOST_MISSED)):
            count, last = count + 1, number or last
            return ""
        return match[0].replace(SUPER, "").replace(NORMAL, "")

    for item in placed:
        item.text = _MARK.sub(kept, item.text)
        if _BACK.search(item.text):  # the link back from a note at the end
            item.text = _MARKED.sub("", _BACK.sub("", item.text), count=1) or item.text
            count += 1
    return count


def _leading(placed: Sequence[_Placed]) -> float:
    """The usual distance of two lines, in sizes."""
    gaps = Counter(
        round((a.line.y - b.line.y) / b.line.size, 2)
        for a, b in itertools.pairwise(placed)
        if a.column == b.column and abs(a.line.size - b.line.size) < 0.1 and not b.line.is_row
    )
    return max(gaps, key=lambda gap: (gaps[gap], -gap), default=1.2)


def _add_body(builder: TextBuilder, placed: Sequence[_Placed], hyphens: Hyphens, leading: float) -> None:
    page, gap = -1, "\n\n"
    for item, following in zip(placed, [*placed[1:], None], strict=False):
        if item.page != page:
            page = item.page
            builder.position(f"page {page + 1}")
        text, next_gap = item.text, "\n\n"
        if following is not None:
            next_gap = _gap(item, following, leading)
            joined = None
            if next_gap != "\n\n" and not item.line.is_row:
                joined = hyphens.joined(text, following.text, is_wrapped=next_gap == " ")
            if joined is not None:
                text, next_gap = joined, ""
        builder.add(text.replace(HYPHEN_AT_BREAK, "-"), gap)
        gap = next_gap


def _gap(item: _Placed, following: _Placed, leading: float) -> str:
    """What separates two lines: a space within a paragraph, a line break in verse, or a blank line."""
    one, two = item.line, following.line
    same_size = abs(one.size - two.size) < 0.08 * one.size
    if not same_size:
        return "\n\n"
    if one.is_row and two.is_row and one.y - two.y < _ROW_GAP * two.size:
        return "\n"
    if item.column == following.column and one.y - two.y > _PARAGRAPH_GAP * leading * two.size:
        return "\n\n"
    if one.is_row or two.is_row:
        return "\n"
    is_wrapped = one.right + 0.25 * one.size + two.fragments[0].first_word > item.right - 0.1 * one.size
    is_indented = two.left - following.left > 0.8 * two.size and one.left - item.left < 0.8 * one.size
    if is_wrapped and not (is_indented and _SENTENCE_END.search(item.text)):
        return " "
    if item.column != following.column and _SENTENCE_END.search(item.text):
        return "\n\n"
    return "\n\n" if is_wrapped else "\n"


def _add_notes(builder: TextBuilder, notes: Sequence[Line], hyphens: Hyphens) -> None:
    note = ""
    for line in notes:
        text = line.text
        if _label(text):
            builder.note(_SUPERSCRIPT.sub(r"\1", note).replace(HYPHEN_AT_BREAK, "-"))
            note = _MARKED.sub("", text, count=1)
            continue
        joined = hyphens.joined(note, text)
        note = joined + text if joined is not None else f"{note} {text}"
    builder.note(_SUPERSCRIPT.sub(r"\1", note).replace(HYPHEN_AT_BREAK, "-"))
