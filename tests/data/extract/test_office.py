"""Word and OpenDocument files: what is displayed is text, once; hostile files are errors."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from octavo.data.documents import ReadOptions, read
from octavo.data.extract import container
from octavo.errors import DataError

WORD = '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" xmlns:mc="m"><w:body>'
ODT = '<o:document-content xmlns:o="o" xmlns:text="t" xmlns:table="u"><o:body><o:text>'


def packed(path: Path, **members: str) -> str:
    """A zip file; `__` in a name is a slash."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(f"{name.replace('__', '/')}.xml", text)
    return str(path)


def word(path: Path, body: str, **members: str) -> str:
    return packed(path, word__document=f"{WORD}{body}</w:body></w:document>", **members)


def odt(path: Path, body: str, **members: str) -> str:
    return packed(path, content=f"{ODT}{body}</o:text></o:body></o:document-content>", **members)


def text(path: str) -> str:
    (document,) = read([path]).documents
    return document.text


def run(*texts: str) -> str:
    return "".join(f"<w:r><w:t>{part}</w:t></w:r>" for part in texts)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"<w:p>{run('one', ' two')}</w:p><w:p>{run('three')}</w:p>", "one two\n\nthree"),
        (
            "<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:t>a</w:t><w:tab/><w:br/><w:t>b</w:t></w:r></w:p>",
            "a\t\nb",
        ),
        (f"<w:p>{run('a')}<w:del><w:r><w:delText>no</w:delText></w:r></w:del><w:ins>{run('b')}</w:ins></w:p>", "ab"),
        (f"<w:p>{run('a')}<w:moveFrom>{run('no')}</w:moveFrom></w:p>", "a"),
        ("<w:p><w:r><w:rPr><w:vanish/></w:rPr><w:t>no</w:t></w:r><w:r><w:t>seen</w:t></w:r></w:p>", "seen"),
        ('<w:p><w:r><w:rPr><w:vanish w:val="0"/></w:rPr><w:t>seen</w:t></w:r></w:p>', "seen"),
        ("<w:p><w:r><w:instrText>PAGE</w:instrText></w:r><w:r><w:t>7</w:t></w:r></w:p>", "7"),
        ("<w:p><w:r><w:t>of\u00adfice \ufb01ne</w:t><w:noBreakHyphen/><w:t>x</w:t></w:r></w:p>", "office fine-x"),
        (
            f"<w:p><w:r><mc:AlternateContent><mc:Choice><w:p>{run('box')}</w:p></mc:Choice>"
            f"<mc:Fallback><w:p>{run('box')}</w:p></mc:Fallback></mc:AlternateContent></w:r>{run('text')}</w:p>",
            "box\n\ntext",
        ),
        (
            f"<w:tbl><w:tr><w:tc><w:p>{run('a')}</w:p><w:p>{run('b')}</w:p></w:tc><w:tc><w:p/></w:tc>"
            f"<w:tc><w:tbl><w:tr><w:tc><w:p>{run('c')}</w:p></w:tc></w:tr></w:tbl></w:tc></w:tr>"
            f"<w:tr><w:tc><w:p>{run('d')}</w:p></w:tc></w:tr></w:tbl>",
            "a b\t\tc\nd",
        ),
    ],
)
def test_a_word_document_gives_its_displayed_text(tmp_path: Path, body: str, expected: str) -> None:
    assert text(word(tmp_path / "a.docx", body)) == expected


def test_a_heading_is_known_by_the_name_of_its_style_in_any_language(tmp_path: Path) -> None:
    styles = '<w:styles xmlns:w="w"><w:style w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style></w:styles>'
    heading = f'<w:p><w:pPr><w:pStyle w:val="berschrift1"/></w:pPr>{run("The Tide")}</w:p>'
    path = word(tmp_path / "a.docx", f"<w:p>{run('before')}</w:p>{heading}", word__styles=styles)
    (document,) = read([path]).documents
    assert document.positions == ((8, "chapter 1 (The Tide)"),)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("<text:p>one <text:s text:c='3000000000'/>two\n  three</text:p>", "one two three"),
        ("<text:p>a<text:tab/>b<text:line-break/>c</text:p>", "a\tb\nc"),
        ("<text:tracked-changes><text:p>no</text:p></text:tracked-changes><text:p>a</text:p>", "a"),
        (
            "<text:p>a<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>n</text:p>"
            "</text:note-body></text:note>b</text:p><text:p>c</text:p>",
            "ab\n\nc\n\nn",
        ),
        ("<text:p>x</text:p><text:table-of-content><text:p>no 3</text:p></text:table-of-content>", "x"),
        (
            "<table:table><table:table-row table:number-rows-repeated='1000000000'><table:table-cell><text:p>a</text:p>"
            "</table:table-cell><table:table-cell><text:p>b</text:p></table:table-cell></table:table-row></table:table>",
            "a\tb",
        ),
    ],
)
def test_an_opendocument_text_gives_its_displayed_text(tmp_path: Path, body: str, expected: str) -> None:
    assert text(odt(tmp_path / "a.odt", body)) == expected


def test_a_document_that_declares_entities_is_an_error_with_its_name(tmp_path: Path) -> None:
    attack = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><x>&a;</x>'
    for path in (packed(tmp_path / "a.docx", word__document=attack), packed(tmp_path / "a.odt", content=attack)):
        with pytest.raises(
            DataError, match=r"a\.(docx|odt): its part '[^']*' is not XML that octavo reads: it declares the entity 'a'"
        ):
            read([path])


@pytest.mark.parametrize("head", ["<?xml version='1.0' encoding='utf-9'?>", "<?xml version='1.0' encoding='utf-16'?>"])
def test_a_document_in_a_false_encoding_is_an_error(tmp_path: Path, head: str) -> None:
    with pytest.raises(DataError, match=r"a\.docx: its part 'word/document\.xml' is not XML"):
        read([packed(tmp_path / "a.docx", word__document=f"{head}<x>text</x>")])


def test_a_document_nested_without_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than 512 deep"):
        read([word(tmp_path / "a.docx", "<w:tbl>" * 1000)])


def test_a_document_that_swells_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = word(tmp_path / "a.docx", f"<w:p>{run('a' * 2_000_000)}</w:p>")
    assert len(text(path)) == 2_000_000
    monkeypatch.setattr(container, "SURE_BYTES", 100_000)
    with pytest.raises(DataError, match="its parts swell"):
        read([path])


def test_an_encrypted_document_is_an_error(tmp_path: Path) -> None:
    manifest = '<m:manifest xmlns:m="m"><m:file-entry><m:encryption-data/></m:file-entry></m:manifest>'
    with pytest.raises(DataError, match=r"a\.odt: is encrypted"):
        read([odt(tmp_path / "a.odt", "", **{"META-INF__manifest": manifest})])
    data = bytearray(Path(word(tmp_path / "c.docx", "")).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of a member in the directory of the zip file
    (tmp_path / "c.docx").write_bytes(data)
    with pytest.raises(DataError, match=r"c\.docx: is encrypted"):
        read([str(tmp_path / "c.docx")])
    (tmp_path / "b.docx").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000))
    with pytest.raises(DataError, match=r"b\.docx: is no Word document: it is encrypted"):
        read([str(tmp_path / "b.docx")])


@pytest.mark.parametrize("data", [b"", b"PK", b"text", b"PK\x03\x04" + b"\0" * 60])
@pytest.mark.parametrize("name", ["a.docx", "a.odt", "a.epub"])
def test_a_damaged_file_is_an_error_or_skipped(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="not a valid"):
        read([str(tmp_path)])
    reading = read([str(tmp_path)], ReadOptions(skip_bad=True))
    assert [bad.source for bad in reading.skipped] == [str(tmp_path / name)]


def test_a_note_is_read_once_however_often_the_text_refers_to_it(tmp_path: Path) -> None:
    space = WORD.partition(" ")[2].partition(">")[0]
    notes = f'<w:footnotes {space}><w:footnote w:id="1"><w:p>{run("a note")}</w:p></w:footnote></w:footnotes>'
    reference = '<w:r><w:footnoteReference w:id="1"/></w:r>'
    body = f"<w:p>{run('Hi')}{reference * 50}</w:p>"
    assert text(word(tmp_path / "a.docx", body, word__footnotes=notes)).count("a note") == 1
