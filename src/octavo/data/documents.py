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
from octavo.data.archives import ARCHIVES, MAX_DEPTH, Budget, budget_of, is_archive, members, renamed
from octavo.data.extract.pdf_worker import PdfWorker
from octavo.data.files import MAX_DOCUMENTS, name_of, suffix
from octavo.data.finding import FoundFiles, counted, find_files
from octavo.data.formats import READERS, raw_records
from octavo.data.raw_records import RawRecord
from octavo.data.records import Document, check_columns, field_named, from_fields, from_text, is_field
from octavo.errors import DataError, UsageError

SUFFIXES = (*READERS, *ARCHIVES)
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
    # Of each file: kinds of what was left out on purpose, such as page numbers, and of parts that hold no text.
    removed: dict[str, Counter[str]] = field(default_factory=dict)
    unread: dict[str, Counter[str]] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=dict)  # data set of the hub -> its commit


def find(paths: Sequence[str]) -> FoundFiles:
    """The files named by `paths` (files, folders, globs), each once and in the order given, and what is left out.

    Folders are searched for SUFFIXES, also with those of COMPRESSIONS after them. Raises UsageError for a path that
    matches nothing, with the most similar existing name.
    """
    return find_files(paths, SUFFIXES)


def read(
    paths: Sequence[str],
    options: ReadOptions | None = None,
    on_begin: Callable[[int, int], None] | None = None,
    *,
    names: Mapping[Path, str] | None = None,
) -> Reading:
    """All documents of all files in order, with counts of what was left out, skipped or not used.

    `on_begin(n_files, n_bytes)` is called once, before the first file is read. `names` are those of files whose path is
    not what the user gave, for messages and the ledger.

    Raises DataError with file and line for a record that cannot be read and for files without any document, and
    UsageError for a path that matches nothing and for a missing optional package.
    """
    options = options or ReadOptions()
    if options.split_on == "":
        raise UsageError("the separator of documents is empty.", hint='Give "lines" or a separator.')
    columns = check_columns(options.columns)
    listing = find(paths)
    reading = Reading(not_read=listing.not_read)
    if on_begin:
        on_begin(len(listing.files), sum(map(_size, listing.files)))
    with PdfWorker() as pdf:
        state = _State(options, columns, reading, pdf)
        for path in listing.files:
            _read_file(path, (names or {}).get(path) or name_of(path), state)
    if missing := sorted(field for field in columns.values() if not is_field(state.seen_fields, field)):
        raise UsageError(
            f"--columns names {', '.join(map(shortened, missing))}, which no record has.",
            hint=f"The records have: {shortened(', '.join(sorted(state.seen_fields))) or 'no fields'}.",
        )
    if not reading.documents:
        reasons = "; ".join(f"{bad.source}: {bad.reason}" for bad in reading.skipped[:3])
        raise DataError(f"no document could be read. {reasons}", hint="Run without --skip-bad to see the first error.")
    return reading


@dataclass
class _State:
    """What reading one file needs and adds to."""

    options: ReadOptions
    columns: Mapping[str, str]
    reading: Reading
    pdf: PdfWorker
    seen_fields: set[str] = field(default_factory=set)


def _read_file(path: Path, source: str, state: _State, budget: Budget | None = None, depth: int = 0) -> None:
    """Reads one file, or all files of an archive. `source` names it in messages and in the ledger."""
    reading = state.reading
    before = len(reading.documents) + len(reading.skipped)
    try:
        if is_archive(path):
            _read_archive(path, source, state, budget or budget_of(path), depth)
        else:
            _read_records(path, source, state)
        if len(reading.documents) + len(reading.skipped) == before:
            raise _no_text(path, source, reading)
    except UsageError as error:  # a package is missing
        raise UsageError(error.message.replace(name_of(path), source), hint=error.hint) from error
    except DataError as error:
        error = renamed(error, path, source)
        if not state.options.skip_bad:
            raise error from error.__cause__
        reading.skipped.append(skipped_of(error, os.path.getsize(path)))


def _no_text(path: Path, source: str, reading: Reading) -> DataError:
    """The error of a file without any document, with the reason if it has pages that could not be read."""
    unread = reading.unread.get(source)
    reason = f": not read are {counted(unread)}" if unread else ""
    what = "no file here that octavo reads" if is_archive(path) else "the file holds no text"
    hint = "Leave it out of --data, or skip such files with --skip-bad."
    if unread and suffix(path) == ".pdf":
        hint = f"Scanned pages need text recognition, as by ocrmypdf. {hint}"
    return DataError(f"{what}{reason}.", source=source, hint=hint)


def _read_archive(path: Path, source: str, state: _State, budget: Budget, depth: int) -> None:
    if depth >= MAX_DEPTH:
        message = f"is an archive within {depth} others; octavo reads {MAX_DEPTH} levels."
        raise DataError(message, source=source, hint="Unpack it, or skip such files with --skip-bad.")
    for member in members(path, source, SUFFIXES, state.reading.not_read, budget):
        if member.path is not None:
            _read_file(member.path, member.name, state, budget, depth + 1)
        elif member.error is not None:
            if not state.options.skip_bad:
                raise member.error
            state.reading.skipped.append(skipped_of(member.error, 0))


def _read_records(path: Path, source: str, state: _State) -> None:
    reading, columns, options = state.reading, state.columns, state.options
    seen_fields = state.seen_fields
    repair = _repair if options.ftfy else None
    for record in raw_records(path, options.split_on, pdf=state.pdf):
        if len(reading.documents) + len(reading.skipped) >= MAX_DOCUMENTS:
            message = f"more than {MAX_DOCUMENTS:,} documents."
            raise UsageError(f"{source}: {message}", hint="Use a part of the data, or longer documents.")
        if columns and isinstance(record.value, Mapping):
            # The fields that --columns names are collected beyond the limit too: the check in `read` needs them.
            named = {field_named(record.value, field) for field in columns.values()}
            seen_fields.update(name for name in record.value if len(seen_fields) < MAX_FIELD_NAMES or name in named)
        _count(reading.removed, source, record.removed)
        _count(reading.unread, source, record.unread)
        if record.value == "":
            continue
        try:
            document = _document(record, source, columns, reading.unused)
        except DataError as error:
            error = renamed(error, path, source)
            if not options.skip_bad:
                raise error from error.__cause__
            reading.skipped.append(skipped_of(error, record.n_bytes))
            continue
        reading.documents.append(repair(document) if repair else document)


def _count(counts: dict[str, Counter[str]], source: str, more: Mapping[str, int]) -> None:
    if more:
        counts.setdefault(source, Counter()).update(more)


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # reading the file reports the error
        return 0


def _document(record: RawRecord, source: str, columns: Mapping[str, str], unused: Counter[str]) -> Document:
    if isinstance(record.value, DataError):
        raise record.value
    if isinstance(record.value, str):
        return from_text(record.value, source=source, line=record.line, positions=record.positions)
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
