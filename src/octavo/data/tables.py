"""Delimited text with a header: CSV, TSV and similar."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from octavo.bounded_json import shortened
from octavo.data.files import MAX_DOCUMENT_BYTES, FileSection, decode, name_of, sections
from octavo.data.raw_records import RawRecord
from octavo.errors import DataError

SEPARATORS = ",;\t|"
MAX_COLUMNS = 2048
_SNIFFED_LINES = 50


def read_csv(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """Columns with a header. The separator is the one of SEPARATORS that fits the header and the rows."""
    return _read(path, None)


def read_tsv(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """Tab-separated values."""
    return _read(path, "\t")


def _read(path: Path, separator: str | None) -> Iterator[RawRecord]:
    """One record a row. Line breaks within a quoted field become `\\n`, as in a text file."""
    source = name_of(path)
    line = 0

    def text(section: FileSection) -> str:
        nonlocal line
        line = section.line
        return decode(section, source) + "\n"

    # The csv module limits a field to 128 KiB, less than an essay. The limit can only be set for the whole process.
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    stream = sections(path, b"\n")
    first = list(islice(stream, _SNIFFED_LINES))
    separator = _declared(first) or separator or _sniffed([s.data.decode("utf-8", "replace") for s in first])
    # `map` continues after an exception, where a generator would end; csv.reader continues after an invalid row too.
    rows = csv.reader(map(text, chain(first, stream)), strict=True, delimiter=separator)
    header: list[str] = []
    while True:
        start = line + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "Quote fields that hold separators, quotes or line breaks, and double the quotes inside."
            yield RawRecord(start, DataError(f"not valid CSV: {error}.", source=source, line=start, hint=hint), 0)
        except DataError as error:
            if not error.line:
                raise
            yield RawRecord(error.line, error, 0)
        else:
            if not any(cell.strip() for cell in row):  # a blank line, or `;;` as Excel pads one
                continue
            if header:
                yield RawRecord(start, _row(header, row, source, start), 0)
            else:
                header = _header(row, source, start)


def _declared(first: list[FileSection]) -> str | None:
    """The separator in Excel's first line `sep=;`, which is removed from `first`; None without such a line."""
    match = re.fullmatch(rb"sep=(.)", first[0].data) if first else None
    if match is None:
        return None
    first.pop(0)
    return match[1].decode("latin-1")


def _sniffed(lines: Sequence[str]) -> str:
    """The separator with which most rows have as many fields as the header, at least two; a comma if none does."""

    def fit(separator: str) -> tuple[float, int]:
        rows: list[int] = []
        reader = csv.reader((line + "\n" for line in lines), delimiter=separator, strict=True)
        while True:
            try:
                if row := next(reader):
                    rows.append(len(row))
            except StopIteration:
                break
            except csv.Error:
                rows.append(0)
        if not rows or rows[0] < 2:
            return 0.0, 0
        # The last sampled line may be the first half of a row with a quoted line break.
        body = rows[1:-1] if len(lines) == _SNIFFED_LINES else rows[1:]
        return (sum(count == rows[0] for count in body) / len(body) if body else 1.0), rows[0]

    fits = {separator: fit(separator) for separator in SEPARATORS}
    return max(SEPARATORS, key=lambda separator: (*fits[separator], -SEPARATORS.index(separator)))


def _header(row: list[str], source: str, line: int) -> list[str]:
    if len(row) > MAX_COLUMNS:
        message = f"the header names {len(row):,} columns, more than {MAX_COLUMNS:,}."
        raise DataError(message, source=source, line=line, hint="Keep the columns to train on.")
    header = [name.strip() for name in row]
    duplicate = next((name for index, name in enumerate(header) if name and name in header[:index]), None)
    if duplicate is not None:
        message = f"the header names the column {shortened(duplicate)!r} twice."
        raise DataError(message, source=source, line=line, hint="Rename one of them.")
    return header


def _row(header: list[str], row: list[str], source: str, line: int) -> Mapping[str, object] | DataError:
    if len(row) == len(header):
        return dict(zip(header, row, strict=True))
    message = f"{len(row):,} fields, but the header names {len(header):,}."
    return DataError(message, source=source, line=line, hint="Quote fields that hold separators or line breaks.")
