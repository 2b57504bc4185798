"""`octavo data`: text files to packed rows of tokens, and their summary before training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.config import Config, DataOptions, ModelOptions, TextOptions, WindowOptions
from octavo.data import documents, packing, tokens
from octavo.data.bytes import token_bytes
from octavo.data.documents import Reading, ReadOptions, Skipped
from octavo.data.encoding import bos_ids
from octavo.data.finding import counted
from octavo.data.ledger import FileLedger, Ledger
from octavo.data.packing import Row
from octavo.data.records import Document
from octavo.errors import UsageError
from octavo.failures import cut
from octavo.reporting import Report
from octavo.store.hub_datasets import local_files
from octavo.system import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEDGER_COLUMNS = {"text": "tokens", "trained": "trained", "masked": "masked", "left out": "left_out"}  # -> fields
WINDOW = 1024  # tokens of a sliding window by default
MAX_FILES = 11  # rows of the printed table; the other files are summed up in one row (ledger.json and --json have all)
LARGE_BYTES = 20_000_000  # reading takes seconds from this size on
MAX_REPEATED_SHARE = 1 / 16  # of the rows that are repeated BOS tokens, from which on there is a warning
MAX_SKIPPED = 20  # skipped records that are listed one by one


@dataclass(frozen=True)
class Encoded:
    """Documents as tokens, with the records, files and fields that were not used."""

    documents: list[Document]
    tokens: list[tokens.Tokens]
    skipped: list[Skipped]
    not_read: Counter[str]
    unused: Counter[str]
    removed: dict[str, Counter[str]]
    unread: dict[str, Counter[str]]
    revisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """Text files as packed rows of tokens, with the ledger of all tokens."""

    rows: list[Row]
    ledger: Ledger
    documents: list[Document]
    windows: list[Row] | None = None  # what is evaluated in place of the rows

    def measurable(self, most: int) -> list[Row]:
        """The first `most` rows (0: all) that have trained tokens; the others have no loss."""
        scored = self.rows if self.windows is None else self.windows
        rows = [row for row in scored if (row.labels != packing.IGNORE_INDEX).any()]
        return rows[: most or None]


def check_device(options: ModelOptions, report: Report) -> None:
    """UsageError for --pretend, since `octavo data` needs no GPU. Reports a --device that is not used."""
    if options.pretend is not None:
        raise UsageError(
            f"octavo data runs on the CPU: --pretend {quoted([cut(options.pretend)])} has no effect.",
            hint="Leave the option out.",
        )
    if options.device not in ("auto", "cpu"):
        report.say(f"octavo data runs on the CPU; --device {cut(options.device)} is not used.")


def read_documents(paths: Sequence[str], options: TextOptions, report: Report | None = None) -> Reading:
    """The documents of `paths`. Reports the size before it reads many megabytes. UsageError without paths.

    Data sets of the hub are downloaded first.
    """
    if not paths:
        raise UsageError("No text files are given.", hint="Name files, folders or globs with --data.")
    local = local_files(paths, report)
    reading = documents.read(
        local.paths,
        ReadOptions(
            split_on=options.split_on, skip_bad=options.skip_bad, ftfy=options.ftfy, columns=tuple(options.columns)
        ),
        on_begin=partial(_say_size, report=report) if report else None,
        names=local.names,
    )
    reading.revisions = local.revisions
    if options.template_date:
        now = datetime.fromisoformat(options.template_date)
        reading.documents = [
            replace(document, now=now) if document.messages else document for document in reading.documents
        ]
    return reading


def _say_size(files: int, n_bytes: int, *, report: Report) -> None:
    if n_bytes >= LARGE_BYTES:
        report.say(f"Reading {n_bytes / 1e6:,.0f} MB from {files:,} file{'' if files == 1 else 's'}.")


def encode(reading: Reading, options: TextOptions, tokenizer: PreTrainedTokenizerFast, report: Report) -> Encoded:
    """Documents as tokens, with a progress bar of characters. Reports skipped records and unused fields."""
    skipped, unused = list(reading.skipped), Counter(reading.unused)
    total = sum(map(tokens.characters, reading.documents))
    with report.progress(total, "Encoding characters") as bar:
        encoded = tokens.encode_all(
            reading.documents,
            tokenizer,
            progress=bar.advance,
            skipped=skipped if options.skip_bad else None,
            unused=unused,
        )
    for bad in skipped[:MAX_SKIPPED]:
        report.warn(f"Skipped {bad.source}{f':{bad.line}' if bad.line else ''}: {bad.reason}")
    if len(skipped) > MAX_SKIPPED:
        report.warn(f"Skipped {len(skipped) - MAX_SKIPPED:,} more records; the ledger counts them by file.")
    if unused:
        named = ", ".join(f"{name[:80]} ({count:,})" for name, count in unused.most_common(MAX_SKIPPED))
        more = f" and {len(unused) - MAX_SKIPPED:,} more" if len(unused) > MAX_SKIPPED else ""
        report.say(f"Fields of the records that are not used: {named}{more}.")
    _warn_of_lost_bytes(encoded, tokenizer, report)
    return Encoded(
        list(reading.documents), encoded, skipped, reading.not_read, unused, reading.removed, reading.unread,
        reading.revisions,
    )  # fmt: skip


def to_rows(
    encoded: Encoded,
    options: TextOptions,
    tokenizer: PreTrainedTokenizerFast,
    *,
    excluded: Encoded | None = None,
) -> Text:
    """Packs tokens into rows and counts them in the ledger; `excluded` documents are counted but not packed."""
    excluded_tokens = excluded.tokens if excluded else []
    rows, ledger = packing.pack(
        [*encoded.tokens, *excluded_tokens],
        seq_len=options.seq_len,
        pad_id=pad_id_of(tokenizer),
        bos_ids=bos_ids(tokenizer),
        truncate=options.truncate,
        deduplicate=options.deduplicate,
        min_unique_tokens=options.min_unique_tokens,
        skipped=[*encoded.skipped, *(excluded.skipped if excluded else [])],
        excluded=range(len(encoded.tokens), len(encoded.tokens) + len(excluded_tokens)),
    )
    ledger = replace(
        ledger,
        not_read=dict(encoded.not_read),
        unused=dict(encoded.unused),
        removed={source: dict(counts) for source, counts in encoded.removed.items()},
        unread={source: dict(counts) for source, counts in encoded.unread.items()},
        revisions=dict(encoded.revisions),
    )
    return Text(rows, ledger, encoded.documents)


def with_windows(
    text: Text, encoded: Encoded, config: Config, tokenizer: PreTrainedTokenizerFast, *, context: int
) -> Text:
    """The text with the windows of --stride, if it is given. UsageError if they are longer than the model's context."""
    options, text_options = config[WindowOptions], config[TextOptions]
    if options.stride is None:
        if options.window is not None:
            raise UsageError(
                "--window is only for a sliding window.", hint="Add --stride, half of --window for example."
            )
        return text
    if text_options.truncate:
        raise UsageError(
            "--truncate cuts documents at --seq-len; --stride evaluates all of them.", hint="Leave one out."
        )
    window = options.window or min(WINDOW, context)
    if window > context:
        raise UsageError(f"--window {window:,} is more than the model's context of {context:,} tokens.")
    windows = packing.pack_windows(
        encoded.tokens,
        window=window,
        stride=options.stride,
        pad_id=pad_id_of(tokenizer),
        bos_ids=bos_ids(tokenizer),
        deduplicate=text_options.deduplicate,
        min_unique_tokens=text_options.min_unique_tokens,
    )
    return replace(text, windows=windows)


def to_text(reading: Reading, options: TextOptions, tokenizer: PreTrainedTokenizerFast, report: Report) -> Text:
    """Documents to packed rows and the ledger."""
    return to_rows(encode(reading, options, tokenizer, report), options, tokenizer)


def _warn_of_lost_bytes(encoded: Sequence[tokens.Tokens], tokenizer: PreTrainedTokenizerFast, report: Report) -> None:
    """Counts the bytes that have no token: some vocabularies lack a few, and their tokenizers drop them silently."""
    lengths = token_bytes(tokenizer)
    missing: dict[str, int] = {}
    for document in encoded:
        count = document.n_bytes - int(lengths[document.ids[document.trained]].sum())
        if count > 0:
            missing[document.source] = missing.get(document.source, 0) + count
    for source, count in missing.items():
        report.warn(f"{source}: {count:,} bytes of text have no token in this model's vocabulary and are left out.")


def show_ledger(
    ledger: Ledger,
    title: str,
    report: Report,
    *,
    deduplicated: bool = False,
    result: bool = False,
    held_out: bool = False,
) -> None:
    """Prints one line a file (the largest MAX_FILES - 1 of many), the sum, copies, and the files that were not read.

    All columns count tokens of the text: text = trained + masked + left out. Of `held_out` text the trained ones are
    scored. The title has the padding and the repeated BOS tokens. `deduplicated`: whether copies are left out.
    """
    files = list(ledger.files)
    smaller: list[FileLedger] = []
    if len(files) > MAX_FILES:
        largest = sorted(files, key=lambda file: -file.tokens)[: MAX_FILES - 1]
        shown = {file.source for file in largest}
        smaller = [file for file in files if file.source not in shown]
        files = [file for file in files if file.source in shown]
    folder = _common_folder([file.source for file in ledger.files])
    rows: list[list[object]] = [
        [file.source.removeprefix(folder), *(getattr(file, name) for name in LEDGER_COLUMNS.values())] for file in files
    ]
    if smaller:
        sums = [sum(getattr(file, name) for file in smaller) for name in LEDGER_COLUMNS.values()]
        rows.append([f"and {len(smaller):,} smaller files", *sums])
    if len(ledger.files) > 1:
        rows.append(["all", *(getattr(ledger, name) for name in LEDGER_COLUMNS.values())])
    first = f"file in {folder}" if folder else "file"
    padding = f", {ledger.padding:,} padding tokens" if ledger.padding else ""
    padding += f", {ledger.repeated_bos:,} repeated BOS tokens" if ledger.repeated_bos else ""
    count = f"{ledger.rows:,} row{'' if ledger.rows == 1 else 's'}"
    columns = ["scored" if held_out and name == "trained" else name for name in LEDGER_COLUMNS]
    report.table(f"{title}: {count}{padding}", [first, *columns], rows, result=result)
    if ledger.copies:
        (report.result if result else report.say)(copies_text(ledger, deduplicated=deduplicated))
    if ledger.repeated_bos:
        report.say("Repeated BOS tokens: each row that continues a document begins with BOS again.")
    if ledger.not_read:
        (report.result if result else report.say)(f"Not read: {counted(ledger.not_read)}.")
    for title, counts in (("Removed from", ledger.removed), ("Not read in", ledger.unread)):
        for source, kinds in list(counts.items())[: MAX_FILES - 1]:
            (report.result if result else report.say)(f"{title} {source.removeprefix(folder)}: {counted(kinds)}.")
        if len(counts) >= MAX_FILES:
            rest = sum((Counter(kinds) for kinds in list(counts.values())[MAX_FILES - 1 :]), Counter())
            report.say(f"{title} {len(counts) - MAX_FILES + 1:,} more files: {counted(rest)}.")


def copies_text(ledger: Ledger, *, deduplicated: bool) -> str:
    """How many documents are copies, and what becomes of them."""
    of = f"{ledger.copies:,} of {ledger.documents:,} documents"
    is_one = ledger.copies == 1
    what = f"{of} {'is' if is_one else 'are'} identical to an earlier one"
    if deduplicated:
        return f"{what} and left out (--deduplicate)."
    return f"{what}; --deduplicate removes {'it' if is_one else 'them'}."


def _common_folder(sources: Sequence[str]) -> str:
    """The common folder of several files, with a trailing separator; "" if there is none."""
    if len(sources) < 2:
        return ""
    try:
        folder = os.path.commonpath([os.path.dirname(source) for source in sources])
    except ValueError:  # absolute and relative paths
        return ""
    return os.path.join(folder, "") if folder else ""


def show_data(config: Config, reading: Reading, tokenizer: PreTrainedTokenizerFast, report: Report) -> dict[str, Any]:
    """Prints the ledger, the fill of the rows, and decoded samples with masked text marked; returns the ledger."""
    options = config[DataOptions]
    text = to_text(reading, config[TextOptions], tokenizer, report)
    show_ledger(text.ledger, "Tokens", report, result=True, deduplicated=config[TextOptions].deduplicate)
    report.say(_what_is_counted(tokenizer))
    _warn_of_short_rows(text, report)
    lengths = sorted(int((row.piece >= 0).sum()) for row in text.rows)
    if lengths:
        filled = sum(lengths) / (len(lengths) * config[TextOptions].seq_len)
        documents = f"{text.ledger.documents:,} document{'' if text.ledger.documents == 1 else 's'}"
        rows = f"{len(lengths):,} row{'' if len(lengths) == 1 else 's'}"
        report.result(f"{documents} in {rows}, {filled:.1%} filled.")
    for row in text.rows[: options.samples]:
        report.result(f"\n{row.sources[0]} ([[..]] is masked, not trained on):\n{marked(row, tokenizer)}")
    return text.ledger.to_dict()


def _what_is_counted(tokenizer: PreTrainedTokenizerFast) -> str:
    added = "a BOS and an EOS token" if bos_ids(tokenizer) else "an EOS token"
    return f"text: all tokens, with {added} of each document; the other columns are its parts."


def _warn_of_short_rows(text: Text, report: Report) -> None:
    """Warns if a large part of the rows is repeated BOS tokens."""
    size = sum(len(row.ids) for row in text.rows)
    if text.ledger.repeated_bos > MAX_REPEATED_SHARE * size:
        share = f"{text.ledger.repeated_bos / size:.0%}"
        report.warn(f"{share} of the rows are repeated BOS tokens: --seq-len is small. 512 is usual.")


def marked(row: Row, tokenizer: PreTrainedTokenizerFast, max_tokens: int = 200) -> str:
    """The text of a row with masked tokens in [[..]]."""
    shown: list[str] = []
    for number in range(int(row.piece.max()) + 1):
        positions = np.flatnonzero(row.piece == number)[:max_tokens]
        targets = row.labels[positions]
        ids = [*row.ids[positions].tolist(), int(targets[-1])]
        trained = [False, *(targets != packing.IGNORE_INDEX).tolist()]
        if not trained[-1]:
            ids, trained = ids[:-1], trained[:-1]
        for is_trained, run in groupby(zip(trained, ids, strict=True), key=itemgetter(0)):
            text = tokenizer.decode([token for _, token in run])
            shown.append(text if is_trained else f"[[{text}]]")
    return "".join(shown)


def pad_id_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The padding id. Any id works: padding is masked by labels and piece numbers, never by its id."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
