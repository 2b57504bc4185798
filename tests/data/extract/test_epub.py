"""E-books: the order of the spine, notes, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from octavo.data.documents import read
from octavo.data.extract.epub import _HEADING
from octavo.errors import DataError

ROOT = '<container xmlns="c"><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>'


def book(path: Path, chapters: dict[str, str], spine: list[str], more: dict[str, str] | None = None) -> str:
    items = "".join(f'<item id="{n}" href="{n}.xhtml" media-type="application/xhtml+xml"/>' for n in chapters)
    refs = "".join(f'<itemref idref="{name}"/>' for name in spine)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", ROOT)
        archive.writestr(
            "OPS/book.opf", f'<package xmlns="p"><manifest>{items}</manifest><spine>{refs}</spine></package>'
        )
        for name, body in chapters.items():
            archive.writestr(f"OPS/{name}.xhtml", f"<html><body>{body}</body></html>")
        for name, text in (more or {}).items():
            archive.writestr(name, text)
    return str(path)


def test_chapters_come_in_the_order_of_the_spine_and_notes_last(tmp_path: Path) -> None:
    note = '<aside epub:type="footnote" id="n"><p>A note.</p></aside>'
    chapters = {
        "b": "<h1>Two</h1><p>second</p>",
        "a": f'<h1>One</h1><p>first<a epub:type="noteref" href="#n">1</a></p>{note}',
        "unused": "<p>no</p>",
    }
    reading = read([book(tmp_path / "a.epub", chapters, ["a", "b", "missing", "a"])])
    (document,) = reading.documents
    assert document.text == "One\n\nfirst\n\nTwo\n\nsecond\n\nA note."
    assert document.positions == ((0, "chapter 1 (One)"), (12, "chapter 2 (Two)"), (25, "footnotes"))
    assert reading.unread == {document.source: {"chapter that the file lacks": 1}}


def test_a_book_with_rights_management_is_an_error_and_one_with_obscured_fonts_is_not(tmp_path: Path) -> None:
    def encryption(algorithm: str) -> dict[str, str]:
        method = f'<e:EncryptionMethod xmlns:e="e" Algorithm="{algorithm}"/>'
        return {"META-INF/encryption.xml": f"<encryption>{method}</encryption>"}

    path = book(
        tmp_path / "a.epub", {"a": "<p>x</p>"}, ["a"], encryption("http://www.w3.org/2001/04/xmlenc#aes256-cbc")
    )
    with pytest.raises(DataError, match=r"a\.epub: its chapters are encrypted"):
        read([path])
    path = book(tmp_path / "b.epub", {"a": "<p>x</p>"}, ["a"], encryption("http://www.idpf.org/2008/embedding"))
    assert read([path]).documents[0].text == "x"


def test_a_heading_begins_at_the_last_tag_before_its_end() -> None:
    """So many headings without an end are no work of the square of their number."""
    found = _HEADING.search("<h1>" * 9 + "a<H2 class='x'>The\nend</H2><h3>b</h3>")
    assert found is not None
    assert found[0] == "<H2 class='x'>The\nend</H2>"
    assert _HEADING.search("<h1>a<h2>b") is None
