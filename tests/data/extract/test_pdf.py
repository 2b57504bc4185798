"""PDF files made here, text by text: columns, heads, hyphens, footnotes, and pages that cannot be read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from octavo.data.documents import ReadOptions, read
from octavo.data.extract import pdf
from octavo.data.extract.pdf_hyphens import Hyphens
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

pytest.importorskip("pypdfium2")

Text = tuple[float, float, float, str]  # x, y, size, text
FILLED = "filled"  # a page with a picture only
TIDE = "the tide came over sand and low grey stones while a boat lay still under cloud near old piers"
WORDS = TIDE.split()


def write(path: Path, pages: list[list[Text] | str], more: str = "") -> str:
    """A PDF with texts in Courier, whose characters are 0.6 sizes wide."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Courier/Encoding/WinAnsiEncoding>>",
    ]
    for number, page in enumerate(pages):
        content = "0 0 300 300 re f" if isinstance(page, str) else "".join(map(_shown, page))
        box = "/MediaBox[0 0 600 800]/Resources<</Font<</F 3 0 R>>>>"
        objects.append(f"<</Type/Page/Parent 2 0 R{box}/Contents {5 + 2 * number} 0 R{more}>>")
        objects.append(f"<</Length {len(content)}>>stream\n{content}\nendstream")
    data, offsets = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode("cp1252")
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<</Root 1 0 R/Size {len(objects) + 1}>>\n"
    path.write_bytes(data + f"{end}startxref\n{len(data)}\n%%EOF".encode())
    return str(path)


def _shown(text: Text) -> str:
    x, y, size, characters = text
    escaped = characters.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
    return f"BT /F {size} Tf {x} {y} Td ({escaped}) Tj ET\n"


def lines(n: int, width: int = 34, seed: int = 0) -> list[str]:
    """Lines of running text that are nearly `width` characters long."""
    source, result = random.Random(seed), [""]
    while len(result) <= n:
        word = source.choice(WORDS)
        if len(result[-1]) + len(word) + 1 > width:
            result.append(word)
        else:
            result[-1] = f"{result[-1]} {word}".strip()
    return result[:n]


def column(x: float, texts: list[str], size: float = 10, top: float = 700) -> list[Text]:
    return [(x, top - 12 * number, size, text) for number, text in enumerate(texts)]


def opened(path: str) -> RawRecord:
    return pdf.extract(Path(path))


def words(*texts: str) -> list[str]:
    return " ".join(texts).split()


@pytest.mark.parametrize("by_row", [False, True])
def test_two_columns_are_read_one_after_the_other_below_a_title_over_both(tmp_path: Path, by_row: bool) -> None:
    left, right = lines(20, seed=1), lines(20, seed=2)
    texts = [*column(50, left), *column(310, right)]
    texts = sorted(texts, key=lambda text: -text[1]) if by_row else texts
    title = (150, 740, 20, "A title over both columns")
    record = opened(write(tmp_path / "a.pdf", [[title, *texts]]))
    assert str(record.value).split() == words(title[3], *left, *right)


def test_rows_of_a_table_are_lines_with_tabs(tmp_path: Path) -> None:
    table: list[Text] = [
        text for n in range(6) for text in ((50, 700 - 16 * n, 10, f"name{n}"), (300, 700 - 16 * n, 10, f"age{n}"))
    ]
    record = opened(write(tmp_path / "a.pdf", [table]))
    assert record.value == "\n".join(f"name{n}\tage{n}" for n in range(6))


def test_running_heads_and_page_numbers_are_removed_and_counted(tmp_path: Path) -> None:
    pages: list[list[Text] | str] = []
    bodies = [lines(20, 60, seed=n) for n in range(9)]
    for number, body in enumerate(bodies, 11):
        head = f"{number}  The Sea" if number % 2 else f"Chapter {number // 5}  {number}"
        pages.append([(50, 760, 9, head), *column(50, body), (300, 40, 9, f"- {number} -")])
    record = opened(write(tmp_path / "a.pdf", pages))
    assert str(record.value).split() == words(*(line for body in bodies for line in body))
    assert record.removed == {"running head": 9, "page number": 9}
    assert [name for _, name in record.positions] == [f"page {n}" for n in range(1, 10)]


def test_lines_of_the_text_that_recur_by_chance_are_kept(tmp_path: Path) -> None:
    """Speakers' names begin every third page; the last row of each page is a number that does not count pages."""
    pages: list[list[Text] | str] = [
        column(50, ["MACBETH." if n % 3 == 0 else f"LENNOX{n}.", *lines(20, 60, seed=n), str(7 * n * n % 100)])
        for n in range(12)
    ]
    record = opened(write(tmp_path / "a.pdf", pages))
    assert record.removed == {}
    assert str(record.value).count("MACBETH.") == 4


def test_a_paragraph_and_a_word_continue_over_pages(tmp_path: Path) -> None:
    body = [*lines(20, 60, seed=1), "straightforwardly, the program has here broken: respon-"]
    rest = ["sibility for the tide ends here."]
    pages: list[list[Text] | str] = [column(50, body), column(50, rest)]
    record = opened(write(tmp_path / "a.pdf", pages))
    assert "broken: responsibility for the tide" in str(record.value)
    assert "\n" not in record.value  # type: ignore[operator]


def test_footnotes_come_last_without_their_marks(tmp_path: Path) -> None:
    def page(number: int, note: str) -> list[Text]:
        body = column(50, lines(15, 60, seed=number))
        marked = [(50, 500, 10, "word"), (74, 504, 6, str(number)), (78, 500, 10, " after it")]
        return [*body, *marked, (50, 80, 7, f"{number} {note}"), (50, 71, 7, "goes on.")]

    record = opened(write(tmp_path / "a.pdf", [page(7, "First note"), page(12, "Second note")]))
    text = str(record.value)
    assert text.endswith("First note goes on.\n\nSecond note goes on.")
    assert text.count("word after it") == 2
    assert record.removed["footnote mark"] == 2


def test_the_repeated_header_of_a_table_is_removed(tmp_path: Path) -> None:
    def page(first: int) -> list[Text]:
        rows = [("Name", "Age"), *((f"name{n}", f"{n} years") for n in range(first, first + 5))]
        return [
            text for k, (a, b) in enumerate(rows) for text in ((50, 700 - 16 * k, 10, a), (300, 700 - 16 * k, 10, b))
        ]

    record = opened(write(tmp_path / "a.pdf", [page(0), page(5)]))
    assert str(record.value).split("\n") == ["Name\tAge", *(f"name{n}\t{n} years" for n in range(10))]
    assert record.removed == {"repeated table header": 1}


def test_pages_without_text_are_counted_as_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", [FILLED, [(50, 700, 10, "The tide.")], FILLED, []])
    reading = read([path])
    assert [document.text for document in reading.documents] == ["The tide."]
    assert reading.unread == {path: {"page without text": 2}}
    with pytest.raises(DataError, match=r"b\.pdf: the file holds no text: not read are 1 page without text"):
        read([write(tmp_path / "b.pdf", [FILLED])])


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_page_of_turned_text_is_read(tmp_path: Path, turn: int) -> None:
    """The text is drawn upright and the page is displayed turned, as scanners do: every character is still read."""
    record = opened(write(tmp_path / "a.pdf", [column(50, ["one two", "three"])], f"/Rotate {turn}"))
    assert sorted("".join(str(record.value).split())) == sorted("onetwothree")


def test_too_many_pages_and_damaged_files_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.pdf", [[(50, 700, 10, "x")]] * 4)
    monkeypatch.setattr(pdf, "MAX_PAGES", 3)
    with pytest.raises(DataError, match=r"a\.pdf: it has 4 pages, more than 3"):
        pdf.extract(Path(path))
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4\nnothing")
    reading = read(
        [write(tmp_path / "c.pdf", [[(50, 700, 10, "x")]]), str(tmp_path / "b.pdf")], ReadOptions(skip_bad=True)
    )
    assert [bad.reason[:15] for bad in reading.skipped] == ["not a valid PDF"]


@pytest.mark.parametrize(
    ("line", "following", "joined"),
    [
        ("the respon-", "sibility", "the respon"),  # the half is no word
        ("the well-", "known man", "the well-"),  # the whole is in the text with its hyphen
        ("the out-", "side", "the out"),  # the whole is in the text without
        ("the Anglo-", "Saxon", "the Anglo-"),
        ("the sea-", "horse", "the sea-"),  # the half is a word, and this text breaks none
        ("the af\u2010", "ter", "the af"),
        ("the end", "of it", None),
        ("he said--", "and went", None),
        ("1914-", "1918", None),
    ],
)
def test_a_hyphen_at_a_line_end_is_decided_by_the_words_of_the_text(
    line: str, following: str, joined: str | None
) -> None:
    hyphens = Hyphens([("a well-known man stood outside the sea wall", "x"), (line, following)])
    assert hyphens.joined(line, following) == joined
