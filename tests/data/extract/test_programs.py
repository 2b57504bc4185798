"""The same book as several programs wrote it gives the same words. fixtures/macbeth/README.md names the programs."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from octavo.data.documents import Reading, read

FOLDER = Path(__file__).parents[1] / "fixtures" / "macbeth"
MOST_WRONG = 0.005  # of the words
HEADS = {"running head", "page number"}
# file -> kinds that must be counted as removed
FILES = {
    "pandoc.docx": {"table of contents", "footnote mark"},
    "libreoffice.docx": {"header", "footer", "table of contents", "footnote mark"},
    "pandoc.odt": {"footer", "table of contents", "footnote mark"},
    "libreoffice.odt": {"header", "footer", "table of contents", "footnote mark"},
    "pandoc.epub": {"table of contents", "footnote mark"},
    "libreoffice.epub": {"footnote mark"},
    "web.html": {"navigation block", "cookie banner", "aside", "page footer", "script", "style sheet", "footnote mark"},
    "libreoffice.html": {"header", "footer", "footnote mark"},
    "pandoc.rst": {"front matter", "footnote mark"},
    "libreoffice.pdf": HEADS | {"footnote mark"},
    "libreoffice-two-columns.pdf": HEADS | {"footnote mark"},
    "chromium-two-columns.pdf": HEADS | {"footnote mark"},
    "weasyprint.pdf": HEADS | {"footnote mark"},
    "weasyprint-two-columns.pdf": HEADS | {"footnote mark"},
}


def words(text: str) -> list[str]:
    """Words without the difference of straight and curly quotation marks, which some programs change."""
    return text.translate(dict(zip(map(ord, "‘’“”"), "''\"\"", strict=True))).split()


def n_wrong(expected: list[str], actual: list[str]) -> int:
    """Words that are wrong, lost or doubled."""
    matcher = difflib.SequenceMatcher(None, expected, actual, autojunk=False)
    return sum(max(b - a, d - c) for kind, a, b, c, d in matcher.get_opcodes() if kind != "equal")


def opened(name: str) -> Reading:
    if name.endswith(".pdf"):
        pytest.importorskip("pypdfium2")
    return read([str(FOLDER / name)])


@pytest.mark.parametrize("name", FILES)
def test_the_words_are_those_of_the_book(name: str) -> None:
    expected = words((FOLDER / "reference.txt").read_text(encoding="utf-8"))
    reading = opened(name)
    (document,) = reading.documents
    actual = words(document.text)
    assert n_wrong(expected, actual) <= MOST_WRONG * len(expected)
    assert "\ufb01" not in document.text  # the ligature fi
    assert FILES[name] <= set(reading.removed[str(FOLDER / name)])
    assert reading.unread == {}


@pytest.mark.parametrize("name", FILES)
def test_a_footnote_is_in_the_text_once_and_last(name: str) -> None:
    (document,) = opened(name).documents
    note = "Ripped open, as one opens the seam of a coat."
    assert document.text.count(note) == 1
    assert document.text.index(note) > document.text.index("Dismay'd not this")


@pytest.mark.parametrize("name", FILES)
def test_a_row_of_a_table_is_a_line_with_tabs(name: str) -> None:
    (document,) = opened(name).documents
    assert "Malcolm\this Son" in document.text.split("\n")


@pytest.mark.parametrize(
    ("name", "position", "begin"),
    [
        ("pandoc.docx", "chapter 5 (SCENE II. A Camp near Forres.)", "SCENE II. A Camp"),
        ("libreoffice.odt", "chapter 5 (SCENE II. A Camp near Forres.)", "SCENE II. A Camp"),
        ("pandoc.epub", "chapter 3 (Persons Represented)", "Persons Represented"),
        ("pandoc.rst", "chapter 2 (Preface)", "Preface"),
        ("weasyprint.pdf", "page 4", "DUNCAN.\nDismay'd not this"),
    ],
)
def test_positions_are_where_chapters_and_pages_begin(name: str, position: str, begin: str) -> None:
    (document,) = opened(name).documents
    offset = {name: at for at, name in document.positions}[position]
    assert document.text.startswith(begin, offset)
