"""Text out of HTML, with the standard library's parser: what a reader of the page sees, a line a block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from octavo.data.entries import Entry
from octavo.data.files import decode, name_of, pieces
from octavo.errors import DataError

# Named files whose markup would be learned as if it were text, and what to do instead.
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
    "math",
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
    *("sub", "sup", "time", "tt", "u", "var", "wbr", "input"),
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


def read_html(path: Path, split_on: str | None) -> Iterator[Entry]:
    """The text of a page as one document: no tags, scripts, styles or head; blocks on lines of their own."""
    source = name_of(path)
    for piece in pieces(path, None):
        text = text_of_html(decode(piece, source))
        if text:
            yield Entry(1, text, len(piece.data))


def refuse_markup(path: Path, ending: str) -> None:
    """DataError for a file whose suffix says that it is markup which octavo does not read."""
    if ending in REFUSED:
        hint = "Convert it to plain text, or rename it to .txt if the markup itself is to be learned."
        raise DataError(f"is {REFUSED[ending]}, not plain text.", source=name_of(path), hint=hint)


def text_of_html(html: str) -> str:
    """The visible text of a page."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    text = "".join(parser.parts)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text) if not parser.has_pre else re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Text(HTMLParser):
    """Collects text; `parts` end up with at most one space or line break between words, but for <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.has_pre = False
        self._hidden: list[str] = []
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN and tag not in _VOID:
            self._hidden.append(tag)
            return
        if self._hidden == ["head"] and tag not in _OF_HEAD:
            self._hidden.clear()  # a head need not be closed
        if tag == "pre":
            self._pre, self.has_pre = self._pre + 1, True
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif tag == "pre":
            self._pre = max(0, self._pre - 1)
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._pre:
            self.parts.append(data)
            return
        data = re.sub(r"[ \t\r\n\f]+", " ", data)
        last = self.parts[-1] if self.parts else "\n"
        if last.endswith((" ", "\n")):
            data = data.removeprefix(" ")
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        """What a tag does to the line: blocks begin one, paragraphs leave one free, cells are told apart."""
        if self._hidden or tag in _INLINE:
            return
        if tag in ("td", "th"):
            if self.parts and not self.parts[-1].endswith(("\n", "\t")):
                self.parts.append("\t")
            return
        ends = "".join(self.parts[-2:])
        wanted = 2 if tag in _PARAGRAPHS else 1
        present = len(ends) - len(ends.rstrip("\n"))
        if self.parts:
            self.parts.append("\n" * (1 if tag == "br" else max(0, wanted - present)))
