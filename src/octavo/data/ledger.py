"""Where every token of the data went: tokens = learned + read_only + left_out, for each file and in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

COUNTS = ("tokens", "learned", "read_only", "left_out", "padding", "documents", "dropped", "skipped")


@dataclass(frozen=True)
class FileLedger:
    """The counts of one file: tokens, but for the last three."""

    source: str
    tokens: int = 0  # all tokens of its documents
    learned: int = 0  # targets of the loss
    read_only: int = 0  # inputs that are no targets: prompts, the users' turns, and the first token of each document
    left_out: int = 0  # in no row
    padding: int = 0  # empty places of the rows whose last document is of this file; not in `tokens`
    documents: int = 0  # documents that were read
    dropped: int = 0  # those that are left out whole: too short, held out as well, copies, too few different tokens
    skipped: int = 0  # records that could not be read, or the file itself; they are in no other count

    def plus(self, **counts: int) -> FileLedger:
        """A copy with some counts grown."""
        return replace(self, **{name: getattr(self, name) + count for name, count in counts.items()})


@dataclass(frozen=True)
class Ledger:
    """The counts of all files together, and of each."""

    tokens: int
    learned: int
    read_only: int
    left_out: int
    padding: int
    documents: int
    dropped: int
    skipped: int
    rows: int
    files: tuple[FileLedger, ...]
    not_read: Mapping[str, int] = field(default_factory=dict)  # kinds of files in the folders that are not read
    unused: Mapping[str, int] = field(default_factory=dict)  # fields that are not used, with how many records
    overlap: Mapping[str, object] = field(default_factory=dict)  # of a held-out text: what the training text has of it

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, lists and dicts, for JSON."""
        return {**asdict(self), "files": [asdict(file) for file in self.files]}

    def check(self) -> None:
        """Assert that every token is accounted for, in each file and in all."""
        both: list[FileLedger | Ledger] = [*self.files, self]
        for counted in both:
            parts = counted.learned + counted.read_only + counted.left_out
            assert counted.tokens == parts, f"{counted}: {counted.tokens} tokens, but {parts} accounted for"
        for name in COUNTS:
            assert getattr(self, name) == sum(getattr(file, name) for file in self.files), name


def total(files: Iterable[FileLedger], *, rows: int) -> Ledger:
    """The ledger of these files."""
    files = tuple(files)
    sums = {name: sum(getattr(file, name) for file in files) for name in COUNTS}
    return Ledger(**sums, rows=rows, files=files)
