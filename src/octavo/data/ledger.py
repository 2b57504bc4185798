"""Where every token of the data went: tokens = trained + masked + cut + padded, for each file and in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True)
class Counts:
    """Tokens, unless the name says otherwise."""

    tokens: int = 0  # all tokens of the documents, and the padding
    trained: int = 0  # learned as targets
    masked: int = 0  # seen, not learned: prompts, the users' turns, and the first token of each document
    cut: int = 0  # neither seen nor learned
    padded: int = 0  # empty places of rows, booked on the file of the row's last document
    documents: int = 0  # documents that were read
    dropped: int = 0  # those of them that were cut whole: too short, copies, too few different tokens
    skipped: int = 0  # records and files that could not be read, and are in no other number
