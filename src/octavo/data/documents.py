"""From the paths that a user names to documents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.bounded_json import shortened
from octavo.data.files import MAX_DOCUMENTS, name_of
from octavo.data.finding import Found, counted, find_files
from octavo.data.formats import READERS, Entry, entries
from octavo.data.records import Document, Message, check_columns, field_named, from_fields, from_text
from octavo.errors import DataError, UsageError

__all__ = ["READERS", "Document", "Message", "ReadOptions", "Reading", "Skipped", "counted", "find", "read", "skip"]


MOST_FIELDS = 1000  # different names of fields that are remembered


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    split_on: str | None = None  # plain text: "lines", a separator, or None for one document a file
    skip_bad: bool = False  # count what cannot be read and go on, instead of raising
    ftfy: bool = False  # repair text that was decoded wrongly somewhere on its way; needs ftfy
    columns: Sequence[str] = ()  # NAME=FIELD: which fields of records are meant


@dataclass(frozen=True)
class Skipped:
    """A record, or the rest of a file, that could not be read and was left out."""

    source: str
    line: int  # 0 where the file as a whole is meant
    reason: str
    n_bytes: int  # of the record, or of the whole file on disk; 0 where a format does not tell


@dataclass
class Reading:
    """What came of some files: documents in order, and everything that is in none."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)  # always empty without `skip_bad`
    not_read: Counter[str] = field(default_factory=Counter)  # kinds of files in folders that are not read
    unused: Counter[str] = field(default_factory=Counter)  # fields of records that are not used, with how many records


def find(paths: Sequence[str]) -> Found:
    """The files that `paths` (files, folders, globs) mean, each once, in the order given, and what is left out.

    Folders are searched through for suffixes in READERS, also behind .gz and .xz. Raises UsageError that names the
    nearest existing name for a path that means nothing.
    """
    return find_files(paths, list(READERS))


def read(
    paths: Sequence[str], options: ReadOptions | None = None, begins: Callable[[int, int], None] | None = None
) -> Reading:
    """All documents of all files, in order, and what was left out, skipped, or not used.

    `begins` is called before the first file is read, with how many files and how many bytes there are.

    Raises DataError with file and line for what cannot be read, or for files without any document, and
    UsageError for paths that mean nothing and for a missing optional package.
    """
    options = options or ReadOptions()
    if options.split_on == "":
        raise UsageError("the separator of documents is empty.", hint='Give "lines" or a separator.')
    columns = check_columns(options.columns)
    met: set[str] = set()
    repair = _repair if options.ftfy else None
    found = find(paths)
    reading = Reading(not_read=found.not_read)
    if begins:
        begins(len(found.files), sum(map(_size, found.files)))
    for path in found.files:
        _read_file(path, options, columns, repair, reading, met)
    if unmet := sorted(field for field in columns.values() if field_named(met, field) not in met):
        raise UsageError(
            f"--columns names {', '.join(map(shortened, unmet))}, which no record has.",
            hint=f"The records have: {shortened(', '.join(sorted(met))) or 'no fields'}.",
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
    met: set[str],
) -> None:
    source = name_of(path)
    documents, skipped = reading.documents, reading.skipped
    before = len(documents) + len(skipped)
    try:
        for entry in entries(path, options.split_on):
            if len(documents) + len(skipped) >= MAX_DOCUMENTS:
                message = f"more than {MAX_DOCUMENTS:,} documents."
                raise UsageError(f"{source}: {message}", hint="Take a part of the data, or longer documents.")
            if columns and isinstance(entry.value, Mapping):
                wanted = {field_named(entry.value, field) for field in columns.values()}
                met.update(name for name in entry.value if len(met) < MOST_FIELDS or name in wanted)
            try:
                document = _document(entry, source, columns, reading.unused)
            except DataError as error:
                if not options.skip_bad:
                    raise
                skipped.append(skip(error, entry.n_bytes))
                continue
            documents.append(repair(document) if repair else document)
        if len(documents) + len(skipped) == before:
            raise DataError("the file holds no text.", source=source, hint="Take it out, or use --skip-bad.")
    except DataError as error:
        if not options.skip_bad:
            raise
        skipped.append(skip(error, os.path.getsize(path)))


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # whoever reads it says so
        return 0


def _document(entry: Entry, source: str, columns: Mapping[str, str], unused: Counter[str]) -> Document:
    if isinstance(entry.value, DataError):
        raise entry.value
    if isinstance(entry.value, str):
        return from_text(entry.value, source=source, line=entry.line)
    try:
        return from_fields(entry.value, source=source, line=entry.line, columns=columns, unused=unused)
    except RecursionError as error:
        raise DataError("the record is nested too deep.", source=source, line=entry.line) from error


def skip(error: DataError, n_bytes: int) -> Skipped:
    """What is counted in the place of what `error` says cannot be used."""
    where = f"{error.source}:{error.line}: " if error.line else f"{error.source}: "
    hint = f" {error.hint}" if "--columns" in error.hint else ""  # a flag with which the record is read
    return Skipped(error.source, error.line, error.message.removeprefix(where) + hint, n_bytes)


def _repair(document: Document) -> Document:
    """Undo wrong decodings ("Ã¼" for "ü"), as ftfy does, but leave typographic quotes as they are."""
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
