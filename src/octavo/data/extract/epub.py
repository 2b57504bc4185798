"""E-books (.epub 2 and 3): the chapters in reading order, without the navigation."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from octavo.data.extract.container import Container, open_container
from octavo.data.extract.text import TextBuilder
from octavo.data.extract.xml_events import Start, events
from octavo.data.files import FileSection, decode
from octavo.data.markup import page_of_html
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_FONT_ALGORITHMS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")  # only fonts are obscured
_TEXT_TYPES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml", "text/x-oeb1-document")
# A heading holds no other one: so many unclosed ones take no time that grows with the square of their number.
_HEADING = re.compile(r"<h[1-3][\s>](?:(?!<h[1-3][\s>]).)*?</h[1-3]\s*>", re.IGNORECASE | re.DOTALL)
_HEADING_BYTES = 2**16  # at the beginning of a chapter, in which its heading is searched


@dataclass
class _Package:
    """What the package document says of the book."""

    items: dict[str, tuple[str, str, str]] = field(default_factory=dict)  # id -> (name in the zip, media type, props)
    spine: list[str] = field(default_factory=list)  # ids in reading order
    contents: set[str] = field(default_factory=set)  # names of tables of contents


def read_epub(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """The text of an e-book as one record; its positions are the chapters, one for each file of the reading order."""
    with open_container(path, "e-book") as container:
        _refuse_encrypted(container)
        package = _package(container)
        builder = TextBuilder()
        for key in package.spine:
            name, media_type, properties = package.items.get(key, ("", "", ""))
            if not name or name not in container.names:
                builder.unread["chapter that the file lacks"] += 1
            elif media_type not in _TEXT_TYPES:
                builder.unread["page without text"] += 1
            elif "nav" in properties.split() or name in package.contents:
                builder.removed["table of contents"] += 1
            else:
                _add_chapter(builder, container, name)
        yield builder.record(path.stat().st_size)


def _add_chapter(builder: TextBuilder, container: Container, name: str) -> None:
    data = container.read(name)
    html = decode(FileSection(1, 0, _as_utf8(data)), f"{container.source}/{name}")
    page = page_of_html(html)
    builder.removed.update(page.removed)
    if page.text:
        heading = _HEADING.search(html[:_HEADING_BYTES])
        builder.chapter(page_of_html(heading[0]).text if heading else "")
        builder.add(page.text)
    elif not page.notes:
        builder.unread["page without text"] += 1
    for note in page.notes.split("\n\n"):
        builder.note(note)


def _as_utf8(data: bytes) -> bytes:
    """UTF-16 with its mark as UTF-8: the two encodings that the standard allows."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace").encode()
    return data.removeprefix(b"\xef\xbb\xbf")


def _refuse_encrypted(container: Container) -> None:
    """DataError for a book with digital rights management; obscured fonts are no obstacle."""
    if _ENCRYPTION not in container.names:
        return
    for event in events(container.chunks(_ENCRYPTION), container.source, _ENCRYPTION):
        if isinstance(event, Start) and event.name == "EncryptionMethod":
            algorithm = event.attributes.get("Algorithm", "")
            if algorithm not in _FONT_ALGORITHMS:
                hint = "Its seller's rights management does not let other programs read it. Take it out of the data."
                raise DataError("its chapters are encrypted.", source=container.source, hint=hint)


def _package(container: Container) -> _Package:
    root = ""
    for event in events(container.chunks(_CONTAINER), container.source, _CONTAINER):
        if isinstance(event, Start) and event.name == "rootfile" and not root:
            root = event.attributes.get("full-path", "")
    package, folder = _Package(), posixpath.dirname(root)
    for event in events(container.chunks(root), container.source, root):
        if not isinstance(event, Start):
            continue
        attributes = event.attributes
        if event.name == "item":
            name = _resolved(folder, attributes.get("href", ""))
            media_type, properties = attributes.get("media-type", ""), attributes.get("properties", "")
            package.items[attributes.get("id", "")] = (name, media_type, properties)
        elif event.name == "itemref":
            package.spine.append(attributes.get("idref", ""))
        elif event.name == "reference" and attributes.get("type") == "toc":
            package.contents.add(_resolved(folder, attributes.get("href", "")))
    package.spine = list(dict.fromkeys(package.spine))  # a chapter that is named a thousand times is read once
    return package


def _resolved(folder: str, reference: str) -> str:
    """The name in the zip file that a reference of the package document means. It is never a path on disk."""
    return posixpath.normpath(posixpath.join(folder, unquote(reference.partition("#")[0])))
