"""Text files as rows of tokens, and what a user is shown of them before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.config import Config, DataOptions, TextOptions
from octavo.data import documents, packing, tokens
from octavo.data.bytes import token_bytes
from octavo.data.documents import Document, ReadOptions, Skipped
from octavo.data.ledger import Ledger
from octavo.data.packing import Row
from octavo.errors import UsageError
from octavo.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEDGER_COLUMNS = ("tokens", "trained", "masked", "cut", "padded")


@dataclass(frozen=True)
class Text:
    """Text files as rows of tokens, with the account of every token."""

    rows: list[Row]
    ledger: Ledger
    documents: list[Document]

    def measurable(self, most: int) -> list[Row]:
        """The first `most` rows (0: all) that hold targets: the others say nothing about a model."""
        rows = [row for row in self.rows if (row.labels != packing.IGNORED).any()]
        return rows[: most or None]


def read_documents(paths: Sequence[str], options: TextOptions) -> tuple[list[Document], list[Skipped]]:
    """The documents of the files that a user names."""
    if not paths:
        raise UsageError("No text files are named.", hint="Give files, folders or globs with --data.")
    return documents.read(paths, ReadOptions(split_on=options.split_on, skip_bad=options.skip_bad, ftfy=options.ftfy))


def to_text(
    read: Sequence[Document],
    skipped: Sequence[Skipped],
    options: TextOptions,
    tokenizer: PreTrainedTokenizerFast,
    report: Report,
) -> Text:
    """Documents to rows, and the ledger; a bar while tokens are counted."""
    lost = list(skipped)
    with report.progress(len(read), "Encoding documents") as bar:
        encoded = tokens.encode_all(
            read,
            tokenizer,
            end_id=int(tokenizer.eos_token_id),
            progress=bar.advance,
            skipped=lost if options.skip_bad else None,
        )
    rows, ledger = packing.pack(
        encoded,
        seq_len=options.seq_len,
        pad_id=_pad_id(tokenizer),
        truncate=options.truncate,
        deduplicate=options.deduplicate,
        min_unique_tokens=options.min_unique_tokens,
        skipped=lost,
    )
    ledger.check()
    for bad in lost:
        report.warn(f"Skipped {bad.source}{f':{bad.line}' if bad.line else ''}: {bad.reason}")
    _warn_of_lost_bytes(encoded, tokenizer, report)
    return Text(rows, ledger, list(read))


def _warn_of_lost_bytes(encoded: Sequence[tokens.Tokens], tokenizer: PreTrainedTokenizerFast, report: Report) -> None:
    """Some vocabularies lack a few bytes, and their tokenizers drop them without a word. Here they are counted."""
    lengths = token_bytes(tokenizer)
    lost: dict[str, int] = {}
    for one in encoded:
        missing = one.n_bytes - int(lengths[one.ids[one.trained]].sum())
        if missing > 0:
            lost[one.source] = lost.get(one.source, 0) + missing
    for source, count in lost.items():
        report.warn(f"{source}: {count:,} bytes of text have no token in this model's vocabulary and are left out.")


def show_ledger(ledger: Ledger, title: str, report: Report, *, result: bool = False) -> None:
    """One line a file, and the sum."""
    rows: list[list[object]] = [
        [file.source, *(getattr(file, name) for name in LEDGER_COLUMNS)] for file in ledger.files
    ]
    if len(rows) > 1:
        rows.append(["all", *(getattr(ledger, name) for name in LEDGER_COLUMNS)])
    report.table(f"{title}: {ledger.rows:,} rows", ["file", *LEDGER_COLUMNS], rows, result=result)


def show_data(config: Config, tokenizer: PreTrainedTokenizerFast, report: Report) -> dict[str, Any]:
    """The ledger, the lengths, and decoded samples with what is not learned marked: before any training."""
    options = config[DataOptions]
    text = to_text(*read_documents(options.data, config[TextOptions]), config[TextOptions], tokenizer, report)
    show_ledger(text.ledger, "Tokens", report, result=True)
    lengths = sorted(int((row.document >= 0).sum()) for row in text.rows)
    if lengths:
        filled = sum(lengths) / (len(lengths) * config[TextOptions].seq_len)
        report.result(f"{text.ledger.documents:,} documents in {len(lengths):,} rows, {filled:.1%} filled.")
    for row in text.rows[: options.samples]:
        report.result(f"\n{row.sources[0]} ([[..]] is read, not learned):\n{marked(row, tokenizer)}")
    return text.ledger.to_dict()


def marked(row: Row, tokenizer: PreTrainedTokenizerFast, most_tokens: int = 200) -> str:
    """The text of a row, what is read but not learned in [[..]]."""
    shown: list[str] = []
    for number in range(int(row.document.max()) + 1):
        places = np.flatnonzero(row.document == number)[:most_tokens]
        targets = row.labels[places]
        ids = [*row.ids[places].tolist(), int(targets[-1])]
        learned = [False, *(targets != packing.IGNORED).tolist()]
        if not learned[-1]:
            ids, learned = ids[:-1], learned[:-1]
        for learns, run in groupby(zip(learned, ids, strict=True), key=itemgetter(0)):
            text = tokenizer.decode([token for _, token in run])
            shown.append(text if learns else f"[[{text}]]")
    return "".join(shown)


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Any id does: padding is masked by its labels and its document number, never by its id."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
