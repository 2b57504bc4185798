"""Paths to documents: finds the files, reads their records and turns each into a Document.

The types, in this order: `FoundFiles` lists the files. A `RawRecord` is one record of a file: a text, named fields, or
an error. A `Document` is a record whose fields are interpreted as a text, a prompt and a completion, or messages.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.bounded_json import shortened
from octavo.data.files import MAX_DOCUMENTS, name_of
from octavo.data.finding import FoundFiles, find_files
from octavo.data.formats import READERS, raw_records
from octavo.data.raw_records import RawRecord
from octavo.data.records import Document, check_columns, field_named, from_fields, from_text, is_field
from octavo.errors import DataError, UsageError

MAX_FIELD_NAMES = 1000  # distinct field names that are collected, to name them if --columns names a missing one


@dataclass(frozen=True)
class ReadOptions:
    """How files are read."""

    split_on: str | None = None  # plain text: "lines", a separator, or None for one document per file
    skip_bad: bool = False  # list unreadable records in `Reading.skipped` and continue, instead of raising
    ftfy: bool = False  # repair wrongly decoded text; needs ftfy
    columns: Sequence[str] = ()  # NAME=FIELD: maps octavo's field names to those of the records


@dataclass(frozen=True)
class Skipped:
    """A record that could not be read, or a file that could not be read to its end; with --skip-bad it is left out."""

    source: str
    line: int  # 0 for a file
    reason: str
    n_bytes: int  # size of the record, or of the whole file on disk; 0 where the format does not give it


@dataclass
class Reading:
    """The result of reading files: documents in order, and counts of everything that became no document."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)  # always empty without `skip_bad`
    not_read: Counter[str] = field(default_factory=Counter)  # kind of file in a folder -> number of them not read
    unused: Counter[str] = field(default_factory=Counter)  # field name -> number of records in which it is not used


def find(paths: Sequence[str]) -> FoundFiles:
    """The files named by `paths` (files, folders, globs), each once and in the order given, and what is left out.

    Folders are searched for suffixes in READERS, also with .gz or .xz after them. Raises UsageError for a path that
    matches nothing, with the most similar existing name.
    """
    return find_files(paths, list(READERS))


def read(
    paths: Sequence[str], options: ReadOptions | None = None, on_begin: Callable[[int, int], None] | None = None
) -> Reading:
    """All documents of all files in order, with counts of what was left out, skipped or not used.

    `on_begin(n_files, n_bytes)` is called once, before the first file is read.

    Raises DataError with file and line for a record that cannot be read and for files without any document, and
    UsageError for a path that matches nothing and for a missing optional package.
    """
    options = options or ReadOptions()
    if options.split_on == "":
        raise UsageError("the separator of documents is empty.", hint='Give "lines" or a separator.')
    columns = check_columns(options.columns)
    seen_fields: set[str] = set()
    repair = _repair if options.ftfy else None
    listing = find(paths)
    reading = Reading(not_read=listing.not_read)
    if on_begin:
        on_begin(len(listing.files), sum(map(_size, listing.files)))
    for path in listing.files:
        _read_file(path, options, columns, repair, reading, seen_fields)
    if missing := sorted(field for field in columns.values() if not is_field(seen_fields, field)):
        raise UsageError(
            f"--columns names {', '.join(map(shortened, missing))}, which no record has.",
            hint=f"The records have: {shortened(', '.join(sorted(seen_fields))) or 'no fields'}.",
        )
    if not reading.documents:
        reasons = "; ".join(f"{bad.source}: {bad.reason}" for bad in reading.skipped[:3])
        raise DataError(f"no document could be read. {reasons}", hint="Run without --skip-bad to see the first error.")
    return reading


def _read_file(
    path: Path,
    options: ReadOptions,
    columns: Mapping[str, str],
    repair: Callable[[Document], Document] | None,
    reading: Reading,
    seen_fields: set[str],
) -> None:
    source = name_of(path)
    documents, skipped = reading.documents, reading.skipped
    before = len(documents) + len(skipped)
    try:
        for record in raw_records(path, options.split_on):
            if len(documents) + len(skipped) >= MAX_DOCUMENTS:
                message = f"more than {MAX_DOCUMENTS:,} documents."
                raise UsageError(f"{source}: {message}", hint="Use a part of the data, or longer documents.")
            if columns and isinstance(record.value, Mapping):
                # The fields that --columns names are collected beyond the limit too: the check in `read` needs them.
                named = {field_named(record.value, field) for field in columns.values()}
                seen_fields.update(name for name in record.value if len(seen_fields) < MAX_FIELD_NAMES or name in named)
            try:
                document = _document(record, source, columns, reading.unused)
            except DataError as error:
                if not options.skip_bad:
                    raise
                skipped.append(skipped_of(error, record.n_bytes))
                continue
            documents.append(repair(document) if repair else document)
        if len(documents) + len(skipped) == before:
            hint = "Leave it out of --data, or skip such files with --skip-bad."
            raise DataError("the file holds no text.", source=source, hint=hint)
    except DataError as error:
        if not options.skip_bad:
            raise
        skipped.append(skipped_of(error, os.path.getsize(path)))


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # reading the file reports the error
        return 0


def _document(record: RawRecord, source: str, columns: Mapping[str, str], unused: Counter[str]) -> Document:
    if isinstance(record.value, DataError):
        raise record.value
    if isinstance(record.value, str):
        return from_text(record.value, source=source, line=record.line)
    try:
        return from_fields(record.value, source=source, line=record.line, columns=columns, unused=unused)
    except RecursionError as error:
        raise DataError("the record is nested too deep.", source=source, line=record.line) from error


def skipped_of(error: DataError, n_bytes: int) -> Skipped:
    """The `Skipped` of a record or file that `error` reports as unusable."""
    where = f"{error.source}:{error.line}: " if error.line else f"{error.source}: "
    # Of all hints only --columns makes the record readable, so only that one is useful in a list of skipped records.
    hint = f" {error.hint}" if "--columns" in error.hint else ""
    return Skipped(error.source, error.line, error.message.removeprefix(where) + hint, n_bytes)


def _repair(document: Document) -> Document:
    """Undo wrong decodings ("Ã¼" for "ü") with ftfy, but keep typographic quotes."""
    try:
        from ftfy import fix_text
    except ImportError as error:
        hint = "Install it: pip install 'octavo[clean]'"
        raise UsageError("cleaning with ftfy needs ftfy, which is not installed.", hint=hint) from error

    def fix(text: str) -> str:
        return str(fix_text(text, uncurl_quotes=False))

    return replace(
        document,
        text=fix(document.text),
        prompt=None if document.prompt is None else fix(document.prompt),
        completion=None if document.completion is None else fix(document.completion),
        messages=tuple(replace(message, content=fix(message.content)) for message in document.messages),
    )
