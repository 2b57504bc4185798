"""Accounts for every token of the data: tokens = trained + masked + left_out, for each file and in total.

The rows hold nothing else but padding and repeated BOS tokens (`Ledger.check`).

A trained token has a loss. A masked token is in a row but has none: it is read only. A token that is left out is in no
row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

COUNTS = (
    "tokens", "trained", "masked", "left_out", "padding", "repeated_bos", "documents", "dropped", "copies", "skipped",
)  # fmt: skip


@dataclass(frozen=True)
class FileLedger:
    """The counts of one file, in tokens, except for the last four."""

    source: str
    tokens: int = 0  # all tokens of its documents
    trained: int = 0  # tokens with a loss
    masked: int = 0  # without a loss: prompts, user turns, and the first token of each document
    left_out: int = 0  # tokens that are in no packed row
    padding: int = 0  # padding of the packed rows whose last document is of this file; not in `tokens`
    repeated_bos: int = 0  # BOS tokens before the parts of long documents but the first; not in `tokens`
    documents: int = 0  # documents that were read, or parts of a document that held-out passages divide
    dropped: int = 0  # documents left out whole: too short, copies, held out too, or with too few distinct tokens
    copies: int = 0  # documents with the tokens of an earlier one, which --deduplicate drops
    skipped: int = 0  # records that could not be read, or the file itself; they are in no other count

    def plus(self, **counts: int) -> FileLedger:
        """A copy with `counts` added."""
        return replace(self, **{name: getattr(self, name) + count for name, count in counts.items()})


@dataclass(frozen=True)
class Overlap:
    """How held-out text was chosen, and how much of it the training text contains."""

    held_out: str = ""  # how it was chosen
    removed_documents: int = 0  # training documents that were removed because they are also held out
    removed_tokens: int = 0
    removed: tuple[str, ...] = ()  # where some of them are
    near_copies: int = 0  # held-out documents of which more than half is in the training text
    near: tuple[str, ...] = ()
    ngram: int = 0  # tokens in a row that both sides share
    tokens: int = 0  # of the held-out text that were compared
    shared_tokens: int = 0
    share: float = 0.0  # shared_tokens / tokens


@dataclass(frozen=True)
class Ledger:
    """The counts of all files together, and of each file."""

    tokens: int
    trained: int
    masked: int
    left_out: int
    padding: int
    repeated_bos: int
    documents: int
    dropped: int
    copies: int
    skipped: int
    rows: int
    files: tuple[FileLedger, ...]
    not_read: Mapping[str, int] = field(default_factory=dict)  # kind of file in a folder -> number not read
    unused: Mapping[str, int] = field(default_factory=dict)  # field that is not used -> number of records
    removed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # file -> kind left out on purpose -> number
    unread: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # file -> kind of part without text -> number
    overlap: Overlap | None = None  # of held-out text
    revisions: Mapping[str, str] = field(default_factory=dict)  # data set of the hub, hf:owner/name -> its commit

    def to_dict(self) -> dict[str, object]:
        """Plain numbers, lists and dicts, for JSON."""
        return {**asdict(self), "files": [asdict(file) for file in self.files]}

    def check(self, *, seq_len: int) -> None:
        """Asserts that every token is accounted for, in each file and in total, and every position of the rows."""
        ledgers: list[FileLedger | Ledger] = [*self.files, self]
        for ledger in ledgers:
            parts = ledger.trained + ledger.masked + ledger.left_out
            assert ledger.tokens == parts, f"{ledger}: {ledger.tokens} tokens, but {parts} accounted for"
        for name in COUNTS:
            assert getattr(self, name) == sum(getattr(file, name) for file in self.files), name
        # A document's last token is no input.
        inputs = self.trained + self.masked - (self.documents - self.dropped)
        positions = inputs + self.repeated_bos + self.padding
        assert self.rows * seq_len == positions, f"{self}: {self.rows} rows of {seq_len} tokens hold {positions}"


def total(files: Iterable[FileLedger], *, rows: int) -> Ledger:
    """The ledger of all `files`."""
    files = tuple(files)
    sums = {name: sum(getattr(file, name) for file in files) for name in COUNTS}
    return Ledger(**sums, rows=rows, files=files)
