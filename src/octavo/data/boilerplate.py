"""Finds the parts of an HTML page that are no text of its own: navigation, cookie banners, marks of footnotes.

A part is a span of tokens (begin, end), from its start tag up to and with its end tag. An element that is not closed by
a tag of its own is kept: in a damaged page it could reach to the end.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from octavo.data.html_tokens import Token

Span = tuple[int, int]

_BY_NAME = {"nav": "navigation block", "aside": "aside", "dialog": "dialog", "script": "script", "style": "style sheet"}
_BY_ROLE = {
    "navigation": "navigation block",
    "search": "navigation block",
    "doc-toc": "table of contents",
    "complementary": "aside",
    "contentinfo": "page footer",
    "banner": "page header",
    "dialog": "dialog",
    "alertdialog": "dialog",
    "doc-pagebreak": "page number",
    "pagebreak": "page number",
}
# Elements in which a <footer> or an <aside> is a part of the text, such as the source of a quotation.
_OF_TEXT = {"article", "main", "section", "blockquote", "figure"}
_NOTES = {
    *("footnote", "footnotes", "endnote", "endnotes", "rearnote", "rearnotes"),
    *("doc-footnote", "doc-endnote", "doc-endnotes"),
}
_TITLES = {"header": "header", "footer": "footer"}  # LibreOffice writes <div title="header">
_ATTRIBUTE = re.compile(r"""([a-zA-Z_:][\w:.-]*)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+)))?""")
_MOST_CHARACTERS = 4096  # of a tag's attributes are read
_COOKIES = re.compile(
    r"cookie\w*[ _-]?(?:banner|consent|notice|bar|popup|overlay|law|message|modal|warning|dialog|policy|wrapper)"
    r"|(?:gdpr|consent)[ _-]?(?:banner|notice|bar|popup|overlay|modal)|onetrust|cookiebot|^cc-window"
)
_PAGE_NUMBER = re.compile(r"(?:^|[\s_-])(?:pagenum(?:ber)?|pageno|page-number|pagebreak)(?:$|[\s_-])")
_CONTENTS = re.compile(r"(?:^|\s)(?:toc|table[ _-]of[ _-]contents ?\d*)(?:$|\s)")
_NOTE_ID = re.compile(r"sd(?:foot|end)note\d+|_?[fe](?:t|d)n\d+")
_MARK = re.compile(r"[\s\[(]*(?:\d{1,4}|[a-zA-Z]|[ivxlc]+|[*†‡§¶#]+|[↩↑^]\ufe0e?)[\s\]).:]*")
_MARK_NAMES = re.compile(r"note|fn|ftn|cite|backlink", re.IGNORECASE)


@dataclass
class Boilerplate:
    """The spans of a page that are left out, in order, those of its footnotes, and the number of each kind."""

    spans: list[Span] = field(default_factory=list)  # none is within another one
    notes: list[Span] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)

    def without_notes(self) -> Iterator[Span]:
        """All spans to leave out of the text, in order."""
        at = 0
        for span in sorted([*self.spans, *self.notes]):
            if span[0] >= at:
                yield span
                at = span[1]

    def only_notes(self) -> Iterator[Span]:
        """The spans between the footnotes, and those to leave out of them, in order."""
        at = 0
        inner = iter(self.spans)
        span = next(inner, None)
        for begin, end in self.notes:
            yield at, begin
            while span and span[0] < end:
                if begin <= span[0]:
                    yield span
                span = next(inner, None)
            at = end
        yield at, sys.maxsize


@dataclass
class _Open:
    """An element whose end tag was not found yet."""

    name: str
    number: int
    kind: str  # of boilerplate; "note" for a footnote, "mark" for what may be the mark of one, "" for text
    text: str = ""  # of a mark


def boilerplate(tokens: Iterable[Token]) -> Boilerplate:
    """The boilerplate of a page."""
    opened: list[_Open] = []
    counts: Counter[str] = Counter()
    spans: list[tuple[Span, str]] = []
    mark: _Open | None = None
    for number, (kind, name, attributes) in enumerate(tokens):
        if kind == "text":
            if mark and len(mark.text) < 20:
                mark.text += name
        elif kind == "start":
            what = _kind(name, _parsed(attributes), attributes, counts)
            opened.append(_Open(name, number, what))
            counts[name] += 1
            mark = opened[-1] if what == "mark" else mark
        elif kind == "end" and counts[name]:
            while True:
                last = opened.pop()
                counts[last.name] -= 1
                if last is mark:
                    mark = None
                if last.name == name:
                    break
            if last.kind == "mark":
                last.kind = "footnote mark" if _MARK.fullmatch(_plain(last.text)) else ""
            if last.kind:
                spans.append(((last.number, number + 1), last.kind))
    return _outermost(spans)


def _plain(text: str) -> str:
    return re.sub(r"&#8617;|&#x21a9;|&larrhk;", "↩", text, flags=re.IGNORECASE).replace("&#xFE0E;", "\ufe0e")


def _outermost(spans: list[tuple[Span, str]]) -> Boilerplate:
    """The spans that are within no other one; marks and page numbers within footnotes are kept as spans too."""
    result = Boilerplate()
    end, note_end = 0, 0
    for span, kind in sorted(spans):
        if span[0] < end:
            continue
        if kind == "note":
            if span[0] >= note_end:
                result.notes.append(span)
                note_end = span[1]
            continue
        result.spans.append(span)
        result.removed[kind] += 1
        end = span[1]
    return result


def _parsed(attributes: str) -> dict[str, str]:
    """The attributes of a tag, in lower case."""
    if "=" not in attributes and "hidden" not in attributes:
        return {}
    found = _ATTRIBUTE.findall(attributes[:_MOST_CHARACTERS])
    return {name.lower(): (double or single or bare).strip().lower() for name, double, single, bare in found}


def _kind(name: str, attributes: dict[str, str], raw: str, counts: Counter[str]) -> str:
    """The kind of boilerplate that an element is, by its name and attributes; see _Open.kind."""
    classes = f"{attributes.get('class', '')} {attributes.get('id', '')}"
    roles = {*attributes.get("role", "").split(), *attributes.get("epub:type", "").split()}
    if (
        roles & _NOTES
        or {*attributes.get("class", "").split()} & _NOTES
        or _NOTE_ID.fullmatch(attributes.get("id", ""))
    ):
        return "note" if name not in ("a", "span", "sup") else "mark" if name == "a" else ""
    if name == "a":
        is_note = "#" in attributes.get("href", "") and (counts["sup"] or _MARK_NAMES.search(raw[:_MOST_CHARACTERS]))
        return "mark" if is_note else ""
    if kind := next((_BY_ROLE[role] for role in roles if role in _BY_ROLE), ""):
        return kind
    in_text = any(counts[element] for element in _OF_TEXT)
    if name in _BY_NAME and not (name == "aside" and counts["blockquote"]):
        return _BY_NAME[name]
    if name == "footer" and not in_text:
        return "page footer"
    if name in ("html", "body", "main", "article"):
        return ""
    if "hidden" in attributes and attributes["hidden"] != "until-found":
        return "hidden passage"
    if name == "div" and attributes.get("title", "") in _TITLES:
        return _TITLES[attributes["title"]]
    if _PAGE_NUMBER.search(classes):
        return "page number"
    if _CONTENTS.search(classes) and name in ("div", "section", "ul", "ol", "table"):
        return "table of contents"
    return "cookie banner" if _COOKIES.search(classes) else ""
