"""The visible text of HTML, one line per block.

The time is linear in the length of any page. The parser of the standard library is quadratic: it scans the rest of the
page again for each tag that is never closed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html import unescape
from pathlib import Path

from octavo.data.files import decode, name_of, sections
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

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
_RAW = {"script", "style", "title", "textarea", "iframe"}  # their content is not parsed as markup
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
        text = text_of_html(decode(section, source))
        if text:
            yield RawRecord(1, text, len(section.data))


def refuse_markup(path: Path, ending: str) -> None:
    """DataError for a suffix of markup that octavo does not read."""
    if ending in REFUSED:
        hint = "Convert it to plain text, or rename it to .txt to train on the markup itself."
        raise DataError(f"is {REFUSED[ending]}, not plain text.", source=name_of(path), hint=hint)


def text_of_html(html: str) -> str:
    """The visible text of a page. A hidden element that is never closed, such as <select>, hides nothing."""
    closed = _closed(html)
    page = _Text()
    for number, (kind, name) in enumerate(_tokens(html)):
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
    for number, (kind, name) in enumerate(_tokens(html)):
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


_NAME = re.compile(r"[a-zA-Z][^\s/>]*")
_STOP = re.compile(r"""=\s*["']|>""")


def _tokens(html: str) -> Iterator[tuple[str, str]]:
    """("text", characters) and ("start" | "end" | "empty", tag name), in the order of the page.

    Linear time: every search continues from the end of the last one, and a search that found nothing is not repeated.
    `quotes` and `comments` are False once the rest of the page has no end of a quoted tag or of a comment.
    """
    at, quotes, comments = 0, True, True
    closings: dict[str, int] = {}
    while (begin := html.find("<", at)) >= 0:
        if at < begin:
            yield "text", html[at:begin]
        at = begin
        if comments and html.startswith("<!--", at):
            short = next((mark for mark in ("<!-->", "<!--->") if html.startswith(mark, at)), "")
            end = html.find("-->", at + 4) if not short else at
            comments = end >= 0
            at = at + len(short) if short else end + 3 if comments else at + 4
            continue
        is_end = html.startswith("</", at)
        name = _NAME.match(html, at + 1 + is_end)
        if name is None and html[at + 1 : at + 2] not in ("!", "?", "/"):
            yield "text", "<"
            at += 1
            continue
        end = _tag_end(html, name.end()) if name and quotes and not is_end else -1
        if end < 0:
            quotes = quotes and (name is None or is_end)
            end = html.find(">", at) + 1
        if not end:
            break  # no further tag is closed
        tag, at, begin = (name[0].lower() if name else ""), end, at
        if not tag:
            continue
        if is_end or html[end - 2] == "/":
            yield "end" if is_end else "empty", tag
            continue
        if tag in _RAW:
            if 0 <= closings.get(tag, 0) < end:
                closings[tag] = _closing(html, tag, end)
            if closings[tag] < 0 and tag in ("script", "style"):
                return  # the rest is script or style
            at = max(end, closings[tag])
        yield "start", tag
    if at < len(html):
        yield "text", html[at:]


def _tag_end(html: str, at: int) -> int:
    """The index after the `>` that ends a tag; a `>` in a quoted value does not. -1 for none."""
    while stop := _STOP.search(html, at):
        if stop[0] == ">":
            return stop.end()
        closing = html.find(stop[0][-1], stop.end())
        at = closing + 1 if closing >= 0 else stop.end()
    return -1


def _closing(html: str, tag: str, at: int) -> int:
    """The index of the next end tag of this name; -1 for none."""
    match = re.compile(rf"</{tag}(?=[\s/>])", re.IGNORECASE).search(html, at)
    return match.start() if match else -1


class _Text:
    """Collects text in `parts`, with at most one space or line break between words, except in <pre>."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.hidden: list[str] = []
        self._pre = 0
        self._cells = 0  # cells of the current row
        self._row_has_text = False

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
            self.parts.append(data)
            self._row_has_text = self._row_has_text or not data.isspace()

    def _break(self, tag: str) -> None:
        """The line breaks of a tag: a block starts a line, a paragraph leaves a blank one, cells are separated."""
        if self.hidden or tag in _INLINE or tag in _HIDDEN:
            return
        if tag in ("td", "th"):
            self._cell()
            return
        if tag == "tr":
            self._cells, self._row_has_text = 0, False
        required = 1 if tag == "br" else 2 if tag in _PARAGRAPHS else 1
        ends = "".join(part[-2:] for part in self.parts[-2:])
        present = len(ends) - len(ends.rstrip("\n"))
        if self.parts and (tag == "br" or present < required):
            self.parts.append("\n" * (1 if tag == "br" else required - present))

    def _cell(self) -> None:
        """A tab before each cell but the first, also after empty cells. A block within a cell ends its own line."""
        self._cells += 1
        last = self.parts[-1] if self.parts else ""
        if self._cells == 1 or (self._row_has_text and last.endswith("\n")):
            return
        if last == " ":
            self.parts.pop()
        self.parts.append("\t")
