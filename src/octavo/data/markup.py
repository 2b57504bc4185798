"""The visible text of HTML, one line per block, without navigation, cookie banners and other boilerplate."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path

from octavo.data.boilerplate import boilerplate
from octavo.data.extract.text import clean
from octavo.data.files import decode, name_of, sections
from octavo.data.html_tokens import tokens
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

_NO_SPAN = (sys.maxsize, sys.maxsize)
# Suffixes of files whose markup would be trained on as if it were text.
REFUSED = {
    **dict.fromkeys((".rtf",), "RTF"),
    **dict.fromkeys((".xml", ".svg", ".rss", ".atom", ".fb2", ".tei", ".dbk", ".plist", ".opml"), "XML"),
    **dict.fromkeys((".mht", ".mhtml", ".eml", ".mbox"), "a mail or web archive"),
    **dict.fromkeys((".ipynb",), "a notebook"),
    **dict.fromkeys((".srt", ".vtt", ".ass"), "subtitles"),
    **dict.fromkeys((".fodt", ".fods"), "an office document"),
}
_HIDDEN = {
    "script",
    "style",
    "head",
    "title",
    "template",
    "noscript",
    "svg",
    "annotation",
    "annotation-xml",
    "iframe",
    "object",
    "select",
    "textarea",
}
_OF_HEAD = {"meta", "link", "base"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_INLINE = {
    *(
        "a",
        "abbr",
        "acronym",
        "b",
        "bdi",
        "bdo",
        "big",
        "button",
        "cite",
        "code",
        "data",
        "del",
        "dfn",
        "em",
        "font",
        "i",
    ),
    *("img", "ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike", "strong"),
    *(
        "sub",
        "sup",
        "time",
        "tt",
        "u",
        "var",
        "wbr",
        "input",
        "math",
        "semantics",
        "menclose",
        "mfenced",
        "mfrac",
        "mi",
    ),
    *("mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle"),
    *("msub", "msubsup", "msup", "mtext", "munder", "munderover"),
}
_PARAGRAPHS = {
    "p",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "blockquote",
    "pre",
    "ul",
    "ol",
    "dl",
    "table",
    "section",
    "article",
}


def read_html(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """The text of a page as one document: without tags, scripts, styles and head, each block on a line of its own."""
    source = name_of(path)
    for section in sections(path, None):
        page = page_of_html(decode(section, source))
        text = "\n\n".join(filter(None, (page.text, page.notes)))
        if text:
            yield RawRecord(1, clean(text), len(section.data), removed=page.removed)


def refuse_markup(path: Path, ending: str) -> None:
    """DataError for a suffix of markup that octavo does not read."""
    if ending in REFUSED:
        hint = "Convert it to plain text, or rename it to .txt to train on the markup itself."
        raise DataError(f"is {REFUSED[ending]}, not plain text.", source=name_of(path), hint=hint)


@dataclass(frozen=True)
class HtmlPage:
    """The text of a page."""

    text: str
    notes: str = ""  # its footnotes
    removed: Mapping[str, int] = field(default_factory=dict)  # kind of boilerplate -> number


def page_of_html(html: str) -> HtmlPage:
    """The visible text of a page, apart from it its footnotes, and what was removed.

    A page of which nothing would remain without boilerplate keeps it. A hidden element that is never closed, such as
    <select>, hides nothing.
    """
    closed = _closed(html)
    marked = boilerplate(tokens(html))
    text = _text(html, closed, marked.without_notes())
    notes = _text(html, closed, marked.only_notes()) if marked.notes else ""
    if not text and not notes:
        return HtmlPage(_text(html, closed, iter(())))
    return HtmlPage(text, notes, dict(marked.removed))


def text_of_html(html: str) -> str:
    """The visible text of a page, its footnotes last."""
    page = page_of_html(html)
    return "\n\n".join(filter(None, (page.text, page.notes)))


def _text(html: str, closed: Collection[int], dropped: Iterator[tuple[int, int]]) -> str:
    """The text of a page without the tokens of the spans `dropped`, which are in order."""
    page = _Text()
    begin, end = next(dropped, _NO_SPAN)
    for number, (kind, name, _) in enumerate(tokens(html)):
        if number >= begin:
            if number < end:
                continue
            begin, end = next(dropped, _NO_SPAN)
            if begin <= number < end:
                continue
        if kind == "text":
            page.text(name)
        elif kind == "end":
            page.end(name)
        elif kind == "start" and number in closed:
            page.hidden.append(name)
        else:
            page.start(name)
    text = "\n".join(line.rstrip(" \t") for line in "".join(page.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).lstrip(" \n").rstrip()


def _closed(html: str) -> set[int]:
    """The indices of the start tags of hidden elements that are closed later."""
    closed: set[int] = set()
    opened: list[tuple[str, int]] = []
    counts: Counter[str] = Counter()
    for number, (kind, name, _) in enumerate(tokens(html)):
        if kind == "start" and name in _HIDDEN:
            opened.append((name, number))
            counts[name] += 1
        elif kind == "end" and counts[name]:
            last = ""
            while last != name:
                last, at = opened.pop()
                counts[last] -= 1
            closed.add(at)
    return closed


class _Text:
    """Collects text in `parts`, with at most one space or line break between words, except in <pre>."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self._pre = 0
        self._cells = 0  # cells of the current row
        self._row_has_text = False
        self._cell_begins = 0  # number of parts before the current cell
        self._cell_has_blocks = False  # the current cell has text on several lines

    def start(self, tag: str) -> None:
        if self.hidden == ["head"] and tag not in _OF_HEAD and tag not in _HIDDEN:
            self.hidden.clear()  # HTML allows a head without an end tag
        self._pre += tag == "pre"
        self._break(tag)

    def end(self, tag: str) -> None:
        if self.hidden and self.hidden[-1] == tag:
            self.hidden.pop()
        if tag == "pre":
            self._pre = max(0, self._pre - 1)
        if tag not in ("td", "th"):
            self._break(tag)

    def text(self, data: str) -> None:
        if self.hidden:
            return
        # Python's int() rejects numbers of more digits.
        data = unescape(re.sub(r"&#[0-9]{1000,};?", "\ufffd", data))
        if not self._pre:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            if not self.parts or self.parts[-1].endswith((" ", "\n", "\t")):
                data = data.removeprefix(" ")
        if data:
            if self._cells and not data.isspace():
                self._cell_has_blocks = self._cell_has_blocks or self._ends_a_block()
            self.parts.append(data)
            self._row_has_text = self._row_has_text or not data.isspace()

    def _ends_a_block(self) -> bool:
        """Whether the current cell has text, and a line break after it."""
        return len(self.parts) > self._cell_begins + 1 and self.parts[-1].endswith("\n")

    def _join_block(self) -> None:
        """Removes the line breaks after the only block of a cell, so that its row stays one line."""
        if self._cells and not self._cell_has_blocks:
            while len(self.parts) > self._cell_begins and not self.parts[-1].strip("\n"):
                self.parts.pop()

    def _break(self, tag: str) -> None:
        """The line breaks of a tag: a block starts a line, a paragraph leaves a blank one, cells are separated."""
        if self.hidden or tag in _INLINE or tag in _HIDDEN:
            return
        if tag in ("td", "th"):
            self._cell()
            return
        if tag == "tr":
            self._join_block()
            self._cells, self._row_has_text, self._cell_has_blocks = 0, False, False
        elif self._cells and len(self.parts) == self._cell_begins:
            return  # the first block of a cell
        required = 1 if tag == "br" else 2 if tag in _PARAGRAPHS else 1
        ends = "".join(part[-2:] for part in self.parts[-2:])
        present = len(ends) - len(ends.rstrip("\n"))
        if self.parts and (tag == "br" or present < required):
            self.parts.append("\n" * (1 if tag == "br" else required - present))

    def _cell(self) -> None:
        """A tab before each cell but the first, also after empty cells. Of several blocks in a cell each has a line."""
        self._join_block()
        self._cells += 1
        self._cell_has_blocks = False
        last = self.parts[-1] if self.parts else ""
        if self._cells > 1 and not (self._row_has_text and last.endswith("\n")):
            if last == " ":
                self.parts.pop()
            self.parts.append("\t")
        self._cell_begins = len(self.parts)
