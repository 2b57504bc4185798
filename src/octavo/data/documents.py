"""From the paths that a user names to documents, and documents to a training and a test side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from octavo.data.files import find_files
from octavo.data.formats import READERS, Entry, entries
from octavo.data.records import Document, Message, from_fields, from_text
from octavo.errors import DataError, UsageError

__all__ = ["READERS", "Document", "Message", "ReadOptions", "Skipped", "find", "read", "skip", "split"]


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    split_on: str | None = None  # plain text: "lines", a separator, or None for one document a file
    skip_bad: bool = False  # count what cannot be read and go on, instead of raising
    ftfy: bool = False  # repair text that was decoded wrongly somewhere on its way; needs ftfy


@dataclass(frozen=True)
class Skipped:
    """A record, or the rest of a file, that could not be read and was left out."""

    source: str
    line: int  # 0 where the file as a whole is meant
    reason: str
    n_bytes: int  # of the record, or of the whole file on disk; 0 where a format does not tell


def find(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` (files, folders, globs) mean, each once, in the order given.

    Folders are searched through for suffixes in READERS, also behind .gz and .xz, hidden ones passed over.
    Raises UsageError that names the nearest existing name for a path that means nothing.
    """
    return find_files(paths, list(READERS))


def read(paths: Sequence[str], options: ReadOptions | None = None) -> tuple[list[Document], list[Skipped]]:
    """All documents of all files, in order, and what was skipped (always nothing without `skip_bad`).

    Raises DataError with file and line for what cannot be read, or for files without any document, and
    UsageError for paths that mean nothing and for a missing optional package.
    """
    options = options or ReadOptions()
    if options.split_on == "":
        raise UsageError("the separator of documents is empty.", hint='Give "lines" or a separator.')
    repair = _repair if options.ftfy else None
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for path in find(paths):
        _read_file(path, options, repair, documents, skipped)
    if not documents:
        reasons = "; ".join(f"{bad.source}: {bad.reason}" for bad in skipped[:3])
        raise DataError(f"no document could be read. {reasons}", hint="Run without --skip-bad to see the first error.")
    return documents, skipped


def _read_file(
    path: Path,
    options: ReadOptions,
    repair: Callable[[Document], Document] | None,
    documents: list[Document],
    skipped: list[Skipped],
) -> None:
    source = str(path)
    before = len(documents) + len(skipped)
    try:
        for entry in entries(path, options.split_on):
            try:
                document = _document(entry, source)
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
        skipped.append(skip(error, path.stat().st_size))


def _document(entry: Entry, source: str) -> Document:
    if isinstance(entry.value, DataError):
        raise entry.value
    if isinstance(entry.value, str):
        return from_text(entry.value, source=source, line=entry.line)
    return from_fields(entry.value, source=source, line=entry.line)


def skip(error: DataError, n_bytes: int) -> Skipped:
    """What is counted in the place of what `error` says cannot be used."""
    where = f"{error.source}:{error.line}: " if error.line else f"{error.source}: "
    return Skipped(error.source, error.line, error.message.removeprefix(where), n_bytes)


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
        messages=tuple(Message(message.role, fix(message.content)) for message in document.messages),
    )


def split(documents: Sequence[Document], *, fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """A training and a test side; about `fraction` of the documents are test.

    The side of a document depends on its content and the seed alone: it stays when files are added, moved or
    renamed, and copies of one text never lie on both sides. With two or more documents neither side is empty;
    for that, where chance would leave one empty, the text nearest to the line changes its side.
    Raises UsageError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the test fraction is {fraction}.", hint="Give a number from 0 up to, not including, 1.")
    if fraction == 0 or len(documents) < 2:
        return list(documents), []
    places = [_place(document, seed) for document in documents]
    distinct = sorted(set(places))
    if len(distinct) == 1:
        # Copies of one text only: there is no honest test side, but a side that exists.
        return list(documents[1:]), [documents[0]]
    # `cut` is the first place on the training side.
    cut = next((place for place in distinct if place >= fraction), distinct[-1])
    cut = max(cut, distinct[1])
    train = [document for document, place in zip(documents, places, strict=True) if place >= cut]
    test = [document for document, place in zip(documents, places, strict=True) if place < cut]
    return train, test


def _place(document: Document, seed: int) -> float:
    """A number in [0, 1) that only the content and the seed decide."""
    turns = [(message.role, message.content) for message in document.messages]
    content = repr((document.text, document.prompt, document.completion, turns))
    digest = hashlib.sha256(f"{seed}\0{content}".encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
