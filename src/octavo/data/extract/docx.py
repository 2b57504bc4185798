"""Word documents (.docx, ECMA-376): the text as it is displayed, without headers, footers and deleted text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from octavo.data.extract.container import Container, open_container
from octavo.data.extract.tables import Tables
from octavo.data.extract.text import TextBuilder
from octavo.data.extract.xml_events import End, Event, Start, element, events, skip
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

_BODY = "word/document.xml"
_MAIN = "wordprocessingml.document.main+xml"
# Elements without visible text of their own. `Fallback` repeats the text of the `Choice` before it.
_SKIPPED = {"Fallback", "instrText", "delText", "del", "moveFrom", "sectPr", "tblPr", "tcPr", "tblGrid"}
_COUNTED = {"del": "deleted passage", "moveFrom": "deleted passage"}
_CHARACTERS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-", "softHyphen": ""}
_CHAPTER_LEVELS = 2  # headings of these levels begin a chapter


def read_docx(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """The text of a Word document as one record; its positions are the chapters that headings begin."""
    with open_container(path, "Word document") as container:
        builder = TextBuilder()
        body = _body_name(container)
        folder = body.rpartition("/")[0]
        styles = _styles(container, f"{folder}/styles.xml")
        notes: list[str] = []  # ids in the order in which the text refers to them
        reader = _Body(builder, styles, notes)
        reader.read(_events(container, body))
        for kind in ("footnotes", "endnotes"):
            texts = _notes(container, f"{folder}/{kind}.xml")
            for key in dict.fromkeys(notes):  # once, however often the text refers to it
                builder.note(texts.get(key.removeprefix(f"{kind}:"), "") if key.startswith(kind) else "")
        _count_heads(container, folder, builder.removed)
        yield builder.record(path.stat().st_size)


def _body_name(container: Container) -> str:
    """The main part. Almost all programs name it word/document.xml."""
    if _BODY in container.names:
        return _BODY
    for event in _events(container, "[Content_Types].xml"):
        if isinstance(event, Start) and event.attributes.get("ContentType", "").endswith(_MAIN):
            return event.attributes.get("PartName", "").lstrip("/")
    raise DataError("is no Word document: it has no text.", source=container.source, hint="Save it again as .docx.")


def _events(container: Container, name: str) -> Iterator[Event]:
    return events(container.chunks(name), container.source, name)


def _styles(container: Container, name: str) -> dict[str, str]:
    """The name of each paragraph style in lower case, such as "heading 1", whatever language its id is in."""
    styles: dict[str, str] = {}
    if name not in container.names:
        return styles
    style = ""
    for event in _events(container, name):
        if isinstance(event, Start) and event.name == "style":
            style = event.attributes.get("styleId", "")
        elif isinstance(event, Start) and event.name == "name" and style:
            styles.setdefault(style, event.attributes.get("val", "").lower())
    return styles


def _notes(container: Container, name: str) -> dict[str, str]:
    """The text of each note by its id, without separators."""
    notes: dict[str, str] = {}
    if name not in container.names:
        return notes
    stream = _events(container, name)
    for event in stream:
        if isinstance(event, Start) and event.name in ("footnote", "endnote"):
            if event.attributes.get("type", "normal") != "normal":
                skip(stream)
                continue
            inner = TextBuilder()
            _Body(inner, {}, []).read(element(stream))
            notes[event.attributes.get("id", "")] = str(inner.record(0).value)
    return notes


def _count_heads(container: Container, folder: str, removed: Counter[str]) -> None:
    """Counts headers, footers and comments, which are parts of their own."""
    for name in container.names:
        match = re.fullmatch(re.escape(folder) + r"/(header|footer|comments)\d*\.xml", name)
        if match is None:
            continue
        items = [event for event in _events(container, name) if not isinstance(event, End)]
        if match[1] == "comments":
            removed["comment"] += sum(isinstance(item, Start) and item.name == "comment" for item in items)
        else:
            removed[match[1]] += any(isinstance(item, str) and item.strip() for item in items)


class _Body:
    """Reads the events of a body into a TextBuilder."""

    def __init__(self, builder: TextBuilder, styles: dict[str, str], notes: list[str]) -> None:
        self._builder, self._styles, self._notes = builder, styles, notes
        self._paragraphs: list[list[str]] = []  # the open ones: a text box is within a paragraph
        self._tables = Tables(builder)
        self._style = ""
        self._in_run = False
        self._hidden = False

    def read(self, stream: Iterator[Event]) -> None:
        """All events of the stream."""
        in_text = False
        for event in stream:
            if isinstance(event, str):
                if in_text and self._paragraphs and not self._hidden:
                    self._paragraphs[-1].append(event)
            elif isinstance(event, End):
                in_text = in_text and event.name != "t"
                self._end(event.name)
            elif event.name in _SKIPPED:
                if event.name in _COUNTED:
                    self._builder.removed[_COUNTED[event.name]] += 1
                skip(stream)
            elif event.name == "sdt":
                self._contents(stream)
            else:
                in_text = event.name == "t"
                self._start(event)

    def _contents(self, stream: Iterator[Event]) -> None:
        """A block with properties. A table of contents is left out; its lines would repeat the headings."""
        for event in stream:
            if isinstance(event, Start) and event.name == "sdtPr":
                gallery = [e.attributes.get("val", "") for e in element(stream) if isinstance(e, Start)]
                if "Table of Contents" in gallery:
                    self._builder.removed["table of contents"] += 1
                    skip(stream)
                return
            return

    def _start(self, event: Start) -> None:
        name, attributes = event.name, event.attributes
        if name == "p":
            self._paragraphs.append([])
            self._style = ""
        elif name == "pStyle":
            self._style = self._styles.get(attributes.get("val", ""), attributes.get("val", "").lower())
        elif name == "r":
            self._in_run, self._hidden = True, False
        elif name == "vanish" and self._in_run:
            self._hidden = attributes.get("val", "true") not in ("0", "false", "off")
            self._builder.removed["hidden passage"] += self._hidden
        elif name in ("footnoteReference", "endnoteReference"):
            self._notes.append(f"{name.removesuffix('Reference')}s:{attributes.get('id', '')}")
            self._builder.removed["footnote mark"] += 1
        elif name in _CHARACTERS and self._in_run and self._paragraphs and not self._hidden:
            if name != "br" or attributes.get("type", "textWrapping") == "textWrapping":
                self._paragraphs[-1].append(_CHARACTERS[name])
        elif name == "tbl":
            self._tables.begin_table()
        elif name == "tr":
            self._tables.begin_row()
        elif name == "tc":
            self._tables.begin_cell()

    def _end(self, name: str) -> None:
        if name == "r":
            self._in_run = self._hidden = False
        elif name == "p" and self._paragraphs:
            self._paragraph("".join(self._paragraphs.pop()))
        elif name == "tr":
            self._tables.end_row()
        elif name == "tbl":
            self._tables.end_table()

    def _paragraph(self, text: str) -> None:
        heading = re.fullmatch(r"heading ?([1-9])", self._style)
        if re.fullmatch(r"toc ?\d", self._style):
            self._builder.removed["table of contents line"] += bool(text.strip())
        elif not self._tables.take(text):
            if heading and int(heading[1]) <= _CHAPTER_LEVELS and text.strip():
                self._builder.chapter(text)
            self._builder.add(text)
