"""OpenDocument texts (.odt, ISO/IEC 26300): the text as it is displayed, without headers, footers and indexes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from octavo.data.extract.container import Container, encrypted, open_container
from octavo.data.extract.tables import Tables
from octavo.data.extract.text import TextBuilder
from octavo.data.extract.xml_events import End, Event, Start, element, events, skip
from octavo.data.raw_records import RawRecord

# Kinds of what is left out, by the element that holds it; "" is not counted, since it is no text of the document.
_SKIPPED = {
    "tracked-changes": "deleted passage",
    "annotation": "comment",
    "table-of-content": "table of contents",
    "alphabetical-index": "index",
    "illustration-index": "table of contents",
    "table-index": "table of contents",
    "object-index": "table of contents",
    "hidden-text": "hidden passage",
    "note-citation": "footnote mark",
    **dict.fromkeys(("sequence-decls", "variable-decls", "user-field-decls", "forms", "title", "desc", "rt"), ""),
    **dict.fromkeys(("ruby-text", "event-listeners", "image-map"), ""),
}
_CHAPTER_LEVELS = 2  # headings of these levels begin a chapter


def read_odt(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """The text of an OpenDocument file as one record; its positions are the chapters that headings begin."""
    with open_container(path, "OpenDocument text") as container:
        _refuse_encrypted(container)
        builder = TextBuilder()
        _Body(builder).read(_body(events(container.chunks("content.xml"), container.source, "content.xml")))
        if "styles.xml" in container.names:
            _count_heads(container, builder)
        yield builder.record(path.stat().st_size)


def _refuse_encrypted(container: Container) -> None:
    manifest = "META-INF/manifest.xml"
    if manifest not in container.names:
        return
    for event in events(container.chunks(manifest), container.source, manifest):
        if isinstance(event, Start) and event.name == "encryption-data":
            raise encrypted(container.source)


def _body(stream: Iterator[Event]) -> Iterator[Event]:
    """The events of the element `body`."""
    for event in stream:
        if isinstance(event, Start) and event.name == "body":
            yield from element(stream)


def _count_heads(container: Container, builder: TextBuilder) -> None:
    """Counts the headers and footers that hold text: page styles have them, not the text."""
    stream = events(container.chunks("styles.xml"), container.source, "styles.xml")
    for event in stream:
        kind = re.match("header|footer", event.name) if isinstance(event, Start) else None
        if kind and not isinstance(event, str) and event.name in ("header", "footer", "header-left", "footer-left"):
            builder.removed[kind[0]] += any(isinstance(part, str) and part.strip() for part in element(stream))


class _Body:
    """Reads the events of a body into a TextBuilder."""

    def __init__(self, builder: TextBuilder) -> None:
        self._builder = builder
        self._paragraphs: list[list[str]] = []  # the open ones: a text box is within a paragraph
        self._levels: list[int] = []  # of the open paragraphs: that of a heading, else 0
        self._tables = Tables(builder)

    def read(self, stream: Iterator[Event]) -> None:
        """All events of the stream."""
        for event in stream:
            if isinstance(event, str):
                if self._paragraphs:
                    self._append(re.sub(r"[ \t\r\n]+", " ", event))
            elif isinstance(event, End):
                self._end(event.name)
            elif event.name in _SKIPPED:
                if kind := _SKIPPED[event.name]:
                    self._builder.removed[kind] += 1
                skip(stream)
            elif event.name == "note-body":
                inner = TextBuilder()
                _Body(inner).read(element(stream))
                self._builder.note(str(inner.record(0).value))
            else:
                self._start(event)

    def _append(self, text: str) -> None:
        """White space collapses; text:s stands for a space that does not, of which one is enough."""
        parts = self._paragraphs[-1]
        if text.startswith(" ") and (not parts or parts[-1].endswith((" ", "\n", "\t"))):
            text = text[1:]
        if text:
            parts.append(text)

    def _start(self, event: Start) -> None:
        name = event.name
        if name in ("p", "h"):
            self._paragraphs.append([])
            level = event.attributes.get("outline-level", "1")
            self._levels.append((int(level) if level.isdecimal() and len(level) < 3 else 1) if name == "h" else 0)
        elif name in ("s", "tab", "line-break") and self._paragraphs:
            self._append({"s": " ", "tab": "\t", "line-break": "\n"}[name])
        elif name == "table":
            self._tables.begin_table()
        elif name == "table-row":
            self._tables.begin_row()
        elif name == "table-cell":
            self._tables.begin_cell()

    def _end(self, name: str) -> None:
        if name in ("p", "h") and self._paragraphs:
            text, level = "".join(self._paragraphs.pop()), self._levels.pop()
            if self._tables.take(text):
                return
            if 0 < level <= _CHAPTER_LEVELS and text.strip():
                self._builder.chapter(text)
            self._builder.add(text)
        elif name == "table-row":
            self._tables.end_row()
        elif name == "table":
            self._tables.end_table()
