"""Text files as rows of tokens, and what a user is shown of them before any training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.config import Config, DataOptions, TextOptions
from octavo.data import documents, packing, tokens
from octavo.data.bytes import token_bytes
from octavo.data.documents import Document, Reading, ReadOptions, Skipped, counted
from octavo.data.ledger import FileLedger, Ledger
from octavo.data.packing import Row
from octavo.errors import UsageError
from octavo.reporting import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEDGER_COLUMNS = {"text": "tokens", "learned": "learned", "read only": "read_only", "left out": "left_out"}
MOST_FILES = 11  # in a table for people: more are folded into one row; ledger.json and --json have all
MANY_BYTES = 20_000_000  # that take seconds to read
MOST_SKIPPED = 20  # records that are named one by one


@dataclass(frozen=True)
class Encoded:
    """Documents as tokens, and what was lost on the way."""

    documents: list[Document]
    tokens: list[tokens.Tokens]
    skipped: list[Skipped]
    not_read: Counter[str]
    unused: Counter[str]


@dataclass(frozen=True)
class Text:
    """Text files as rows of tokens, with the account of every token."""

    rows: list[Row]
    ledger: Ledger
    documents: list[Document]

    def measurable(self, most: int) -> list[Row]:
        """The first `most` rows (0: all) that hold targets: the others say nothing about a model."""
        rows = [row for row in self.rows if (row.labels != packing.IGNORE_INDEX).any()]
        return rows[: most or None]


def read_documents(paths: Sequence[str], options: TextOptions, report: Report | None = None) -> Reading:
    """The documents of the files that a user names. Before many megabytes are read the report says so."""
    if not paths:
        raise UsageError("No text files are named.", hint="Give files, folders or globs with --data.")
    reading = documents.read(
        paths,
        ReadOptions(
            split_on=options.split_on, skip_bad=options.skip_bad, ftfy=options.ftfy, columns=tuple(options.columns)
        ),
        begins=partial(_say_size, report=report) if report else None,
    )
    if options.template_date:
        now = datetime.fromisoformat(options.template_date)
        reading.documents = [replace(one, now=now) if one.messages else one for one in reading.documents]
    return reading


def _say_size(files: int, n_bytes: int, *, report: Report) -> None:
    if n_bytes >= MANY_BYTES:
        report.say(f"Reading {n_bytes / 1e6:,.0f} MB from {files:,} file{'' if files == 1 else 's'}.")


def encode(reading: Reading, options: TextOptions, tokenizer: PreTrainedTokenizerFast, report: Report) -> Encoded:
    """Documents as tokens; a bar of characters. What cannot be read or is not used is said."""
    lost, unused = list(reading.skipped), Counter(reading.unused)
    total = sum(map(tokens.characters, reading.documents))
    with report.progress(total, "Encoding characters") as bar:
        encoded = tokens.encode_all(
            reading.documents,
            tokenizer,
            end_id=int(tokenizer.eos_token_id),
            progress=bar.advance,
            skipped=lost if options.skip_bad else None,
            unused=unused,
        )
    for bad in lost[:MOST_SKIPPED]:
        report.warn(f"Skipped {bad.source}{f':{bad.line}' if bad.line else ''}: {bad.reason}")
    if len(lost) > MOST_SKIPPED:
        report.warn(f"Skipped {len(lost) - MOST_SKIPPED:,} more records; the ledger counts them by file.")
    if unused:
        named = ", ".join(f"{name[:80]} ({count:,})" for name, count in unused.most_common(MOST_SKIPPED))
        more = f" and {len(unused) - MOST_SKIPPED:,} more" if len(unused) > MOST_SKIPPED else ""
        report.say(f"Fields of the records that are not used: {named}{more}.")
    _warn_of_lost_bytes(encoded, tokenizer, report)
    return Encoded(list(reading.documents), encoded, lost, reading.not_read, unused)


def to_rows(
    encoded: Encoded,
    options: TextOptions,
    tokenizer: PreTrainedTokenizerFast,
    *,
    excluded: Encoded | None = None,
) -> Text:
    """Tokens to rows, and the ledger; the documents of `excluded` are counted there and in no row."""
    apart = excluded.tokens if excluded else []
    rows, ledger = packing.pack(
        [*encoded.tokens, *apart],
        seq_len=options.seq_len,
        pad_id=_pad_id(tokenizer),
        truncate=options.truncate,
        deduplicate=options.deduplicate,
        min_unique_tokens=options.min_unique_tokens,
        skipped=[*encoded.skipped, *(excluded.skipped if excluded else [])],
        excluded=range(len(encoded.tokens), len(encoded.tokens) + len(apart)),
    )
    ledger.check()
    ledger = replace(ledger, not_read=dict(encoded.not_read), unused=dict(encoded.unused))
    return Text(rows, ledger, encoded.documents)


def to_text(reading: Reading, options: TextOptions, tokenizer: PreTrainedTokenizerFast, report: Report) -> Text:
    """Documents to rows, and the ledger."""
    return to_rows(encode(reading, options, tokenizer, report), options, tokenizer)


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
    """One line a file, of many files the largest ones; the sum; and what in the folders is not read.

    All columns count tokens of the text: text = learned + read only + left out. Padding is in the title.
    """
    files = list(ledger.files)
    folded: list[FileLedger] = []
    if len(files) > MOST_FILES:
        largest = sorted(files, key=lambda file: -file.tokens)[: MOST_FILES - 1]
        shown = {file.source for file in largest}
        folded = [file for file in files if file.source not in shown]
        files = [file for file in files if file.source in shown]
    folder = _common_folder([file.source for file in ledger.files])
    rows: list[list[object]] = [
        [file.source.removeprefix(folder), *(getattr(file, name) for name in LEDGER_COLUMNS.values())] for file in files
    ]
    if folded:
        sums = [sum(getattr(file, name) for file in folded) for name in LEDGER_COLUMNS.values()]
        rows.append([f"and {len(folded):,} smaller files", *sums])
    if len(ledger.files) > 1:
        rows.append(["all", *(getattr(ledger, name) for name in LEDGER_COLUMNS.values())])
    first = f"file in {folder}" if folder else "file"
    padding = f", {ledger.padding:,} padding tokens" if ledger.padding else ""
    count = f"{ledger.rows:,} row{'' if ledger.rows == 1 else 's'}"
    report.table(f"{title}: {count}{padding}", [first, *LEDGER_COLUMNS], rows, result=result)
    if ledger.not_read:
        (report.result if result else report.say)(f"Not read: {counted(ledger.not_read)}.")


def _common_folder(sources: Sequence[str]) -> str:
    """The folder, with its separator, that more than one file lies in; "" where there is none."""
    if len(sources) < 2:
        return ""
    try:
        folder = os.path.commonpath([os.path.dirname(source) for source in sources])
    except ValueError:  # some from the root, some from here
        return ""
    return os.path.join(folder, "") if folder else ""


def show_data(config: Config, reading: Reading, tokenizer: PreTrainedTokenizerFast, report: Report) -> dict[str, Any]:
    """The ledger, the lengths, and decoded samples with what is not learned marked: before any training."""
    options = config[DataOptions]
    text = to_text(reading, config[TextOptions], tokenizer, report)
    show_ledger(text.ledger, "Tokens", report, result=True)
    lengths = sorted(int((row.document >= 0).sum()) for row in text.rows)
    if lengths:
        filled = sum(lengths) / (len(lengths) * config[TextOptions].seq_len)
        documents = f"{text.ledger.documents:,} document{'' if text.ledger.documents == 1 else 's'}"
        rows = f"{len(lengths):,} row{'' if len(lengths) == 1 else 's'}"
        report.result(f"{documents} in {rows}, {filled:.1%} filled.")
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
        learned = [False, *(targets != packing.IGNORE_INDEX).tolist()]
        if not learned[-1]:
            ids, learned = ids[:-1], learned[:-1]
        for lora_chunks, run in groupby(zip(learned, ids, strict=True), key=itemgetter(0)):
            text = tokenizer.decode([token for _, token in run])
            shown.append(text if lora_chunks else f"[[{text}]]")
    return "".join(shown)


def _pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Any id does: padding is masked by its labels and its document number, never by its id."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
