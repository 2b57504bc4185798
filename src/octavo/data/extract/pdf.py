"""PDF files, by pypdfium2: the text of their pages in reading order, without running heads and page numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.data.extract.pdf_columns import columns
from octavo.data.extract.pdf_glyphs import MAX_CHARACTERS, Page, read_page
from octavo.data.extract.pdf_margins import remove_margins
from octavo.data.extract.pdf_text import add_text
from octavo.data.extract.text import TextBuilder
from octavo.data.files import name_of, open_bytes, read_whole
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError, UsageError

MAX_PAGES = 20_000
_MOST_UNKNOWN = 0.3  # of the characters of a page whose text is of use


def extract(path: Path) -> RawRecord:
    """The text of a PDF as one record; its positions are the pages. Needs pypdfium2.

    A page without text, such as a scanned one, and a page whose fonts do not say which letters they show are counted
    as unread. DataError for a file that is encrypted, damaged, or has more than MAX_PAGES pages.
    """
    try:
        import pypdfium2
        from pypdfium2 import raw
    except ImportError as error:
        hint = "Install it: pip install 'octavo[pdf]'"
        raise UsageError(f"{name_of(path)}: PDF files need pypdfium2, which is not installed.", hint=hint) from error
    source = name_of(path)
    with open_bytes(path) as stream:
        data = read_whole(stream, source)
    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        raise _unreadable(str(error), source) from error
    builder = TextBuilder()
    try:
        pages = [_page(document, number, raw, builder, source) for number in range(_checked(len(document), source))]
    except pypdfium2.PdfiumError as error:
        raise _unreadable(str(error), source) from error
    finally:
        document.close()
    builder.removed.update(remove_margins(pages))
    add_text(builder, pages, [columns(page.fragments) for page in pages])
    return builder.record(len(data))


def _unreadable(reason: str, source: str) -> DataError:
    if "password" in reason.lower() or "security" in reason.lower():
        hint = "Save it without a password, or take it out of the data."
        return DataError("is encrypted: it needs a password.", source=source, hint=hint)
    hint = "The file was cut short or damaged: fetch or save it again."
    return DataError(f"not a valid PDF: {reason.splitlines()[0][:200]}", source=source, hint=hint)


def _checked(n_pages: int, source: str) -> int:
    if n_pages > MAX_PAGES:
        message = f"it has {n_pages:,} pages, more than {MAX_PAGES:,}."
        raise DataError(message, source=source, hint="Split it, or take it out of the data.")
    return n_pages


def _page(document: Any, number: int, raw: Any, builder: TextBuilder, source: str) -> Page:
    """The fragments of a page; none if its text is of no use, which is counted."""
    page = document[number]
    textpage = page.get_textpage()
    try:
        if textpage.count_chars() > MAX_CHARACTERS:
            message = f"it has more than {MAX_CHARACTERS:,} characters on one page."
            raise DataError(message, source=source, line=number + 1, hint="Take it out of the data.")
        result = read_page(page, textpage, raw)
        has_content = result.n_characters or raw.FPDFPage_CountObjects(page) > 0
    finally:
        textpage.close()
        page.close()
    if result.n_turned:
        builder.removed["page with turned text"] += 1
    if not result.n_characters and has_content:
        builder.unread["page without text"] += 1
    elif result.n_unknown > _MOST_UNKNOWN * result.n_characters:
        builder.unread["page of unknown letters"] += 1
        return Page(result.width, result.height)
    return result
