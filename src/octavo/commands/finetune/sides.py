"""Training text and held-out text: the split, the removal of copies from training, and the remaining overlap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo.commands.data import Encoded, Text, encode, read_documents, show_ledger, to_rows, with_windows
from octavo.config import Config, RunOptions, TextOptions, TrainingData, TrainOptions
from octavo.data import holdout, passages
from octavo.data.documents import Reading
from octavo.data.ledger import Overlap
from octavo.data.records import Document
from octavo.data.tokens import Tokens
from octavo.errors import UsageError
from octavo.intervals import MIN_UNITS
from octavo.reporting import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_NAMED = 20  # documents listed in a message
MAX_RECORDED = 1000  # documents listed in the ledger
WARN_SHARE = 0.01  # fraction of the held-out text that occurs in the training text, from which on there is a warning


@dataclass(frozen=True)
class _Sides:
    train: Encoded
    test: Encoded | None
    removed: Encoded | None  # documents of the training data with a copy in the held-out data
    how: str  # description of the split, for the ledger


def read_sides(
    config: Config, tokenizer: PreTrainedTokenizerFast, report: Report, *, context: int
) -> tuple[Text, Text | None]:
    """The training text and the held-out text; prints their ledgers.

    Training documents with a copy in the held-out text are counted in the training ledger as left out, and are not
    packed. The held-out ledger's `overlap` has their number, and the share of the held-out text that the training text
    still contains. `context` is the model's: the longest sliding window. UsageError if there is nothing to train on.
    """
    sides = _sides(config, tokenizer, report)
    options = config[TextOptions]
    text = to_rows(sides.train, options, tokenizer, excluded=sides.removed)
    if text.ledger.trained == 0:
        if sides.removed:
            raise UsageError(
                "All of the training text is also held out: nothing is left to train on.",
                hint="Name other text with --test-data, or leave it out and use --test-fraction.",
            )
        raise UsageError("The data have no token to train on.", hint="Inspect them with `octavo data`.")
    show_ledger(text.ledger, "Training text", report, deduplicated=options.deduplicate)
    if sides.test is None:
        report.warn("There is no held-out text to evaluate the tuned model on: give --test-data.")
        return text, None
    held_out = with_windows(to_rows(sides.test, options, tokenizer), sides.test, config, tokenizer, context=context)
    overlap = _overlap(sides, tokenizer, report)
    held_out = replace(held_out, ledger=replace(held_out.ledger, overlap=overlap))
    title = f"Held-out text ({overlap.share:.1%} of it also in the training text)"
    show_ledger(held_out.ledger, title, report, held_out=True, deduplicated=options.deduplicate)
    if held_out.ledger.trained == 0:
        report.warn("The held-out text has no token to evaluate: give other text with --test-data.")
        return text, None
    return text, held_out


def _sides(config: Config, tokenizer: PreTrainedTokenizerFast, report: Report) -> _Sides:
    data, options = config[TrainingData], config[TextOptions]
    training = read_documents(data.data, options, report)
    seed = config[TrainOptions].seed

    def encoded(reading: Reading) -> Encoded:
        return encode(reading, options, tokenizer, report)

    def encoded_documents(some: Sequence[Document]) -> Encoded:
        return encoded(Reading(documents=list(some), revisions=training.revisions))

    if data.test_data:
        resumed = RunOptions in config.kinds and config[RunOptions].resume  # its settings have every option
        if "test_fraction" in data.model_fields_set and not resumed:
            report.say("--test-fraction is not used: --test-data is given.")
        held_out_text = read_documents(data.test_data, options, report)
        numbers = set(holdout.copies(training.documents, held_out_text.documents))
        remaining = [document for number, document in enumerate(training.documents) if number not in numbers]
        copies = [document for number, document in enumerate(training.documents) if number in numbers]
        train = encoded(replace(training, documents=remaining))
        return _Sides(train, encoded(held_out_text), encoded_documents(copies) if copies else None, "as given")
    if data.test_fraction == 0:
        return _Sides(encoded(training), None, None, "nothing")
    if _few_texts(training.documents):
        sides = _passages(encoded(training), data.test_fraction, seed, tokenizer, report)
        if sides.test or len(training.documents) == 1:
            return sides
    remaining, rest = holdout.split(training.documents, fraction=data.test_fraction, seed=seed)
    count = len(training.documents)
    report.say(f"Held out: {len(rest):,} of {count:,} documents, chosen by their content and the seed.")
    expected = holdout.share_of(count, data.test_fraction)
    if abs(len(rest) - expected) > 1:
        report.warn(
            f"--test-fraction {data.test_fraction:g} is {expected:,} documents. The number differs because all copies "
            "of a text are on one side, so that no held-out text is trained on."
        )
    train = encoded(replace(training, documents=remaining))
    return _Sides(train, encoded_documents(rest), None, "a share of the documents")


def _few_texts(documents: Sequence[Document]) -> bool:
    """Whether all are plain texts, and so few that whole ones give no interval; copies of a text stay on one side."""
    if len(documents) >= MIN_UNITS or not all(document.text for document in documents):
        return len(documents) == 1
    return len({holdout.digest(document) for document in documents}) == len(documents)


def _passages(
    encoded: Encoded, fraction: float, seed: int, tokenizer: PreTrainedTokenizerFast, report: Report
) -> _Sides:
    """Holds passages of few texts out; of one that is too short for passages its end. A single record is not split."""
    if not encoded.tokens or not all(document.text for document in encoded.documents):
        return _Sides(encoded, None, None, "nothing")
    counts = [len(tokens.ids) - 1 for tokens in encoded.tokens]  # without the EOS token
    ends = passages.line_ends(tokenizer)
    wanted = [
        passages.to_lines(spans, tokens.ids[:count], ends)
        for spans, tokens, count in zip(
            passages.spans(counts, fraction=fraction, seed=seed), encoded.tokens, counts, strict=True
        )
    ]
    first, *others = encoded.documents
    are_passages = any(wanted)
    if not are_passages:
        at = counts[0] - max(1, round(fraction * counts[0]))
        if others or at < 2 or counts[0] - at < 2:
            return _Sides(encoded, None, None, "nothing")
        wanted = [[(at, counts[0])]]
    held_out = sum(stop - start for spans in wanted for start, stop in spans)
    of = f"{held_out:,} of {sum(counts):,} tokens of {first.source if not others else f'{len(counts)} documents'}"
    if are_passages:
        number = sum(map(len, wanted))
        report.say(f"Held out: {number} passages spread over all of the text, {of}, at places chosen by the seed.")
    else:
        report.say(f"Held out: the last {of}, its only document.")
    train: list[Tokens] = []
    test: list[Tokens] = []
    texts: list[Document] = []
    for document, tokens, spans in zip(encoded.documents, encoded.tokens, wanted, strict=True):
        kept, parts = passages.separate(tokens, spans, tokenizer)
        train += kept
        test += parts
        texts += [
            replace(document, line=part.line, positions=(), text=str(tokenizer.decode(tokens.ids[start:stop].tolist())))
            for part, (start, stop) in zip(parts, spans, strict=True)
        ]
    side = Encoded(texts, test, [], Counter(), Counter(), {}, {}, encoded.revisions)
    how = "passages of the documents" if are_passages else "the end of the one document"
    return _Sides(replace(encoded, tokens=train), side, None, how)


def _overlap(sides: _Sides, tokenizer: PreTrainedTokenizerFast, report: Report) -> Overlap:
    """The overlap of the held-out text with the training text, ignoring white space; warns if it is large."""
    assert sides.test is not None
    test = sides.test.tokens
    bare = holdout.bare_tokens(tokenizer)
    shared = holdout.shared_text(
        (ids[ids >= 0] for ids in (bare[document.ids] for document in sides.train.tokens)),
        [ids[ids >= 0] for ids in (bare[document.ids] for document in test)],
        [document.trained[bare[document.ids] >= 0] for document in test],
    )
    removed = sides.removed
    removed_names = [document.where for document in removed.documents] if removed else []
    removed_tokens = sum(len(document.ids) for document in removed.tokens) if removed else 0
    near = [f"{test[number].source}:{test[number].line}" for number in shared.near_copies]
    if removed_names:
        report.warn(
            f"Removed from the training text because they are also held out: {_counted(removed_names)}, "
            f"{removed_tokens:,} tokens ({_named(removed_names)})."
        )
    if near:
        report.warn(
            f"Near copies: more than half of the text of {_counted(near)} in the held-out data also occurs in the "
            f"training text ({_named(near)}). The measured gain is partly memorization."
        )
    elif shared.share >= WARN_SHARE:
        report.warn(
            f"{shared.share:.1%} of the held-out text also occurs in the training text, in runs of {holdout.NGRAM} or "
            "more tokens."
        )
    return Overlap(
        held_out=sides.how,
        removed_documents=len(removed_names),
        removed_tokens=removed_tokens,
        removed=tuple(removed_names[:MAX_RECORDED]),
        near_copies=len(near),
        near=tuple(near[:MAX_RECORDED]),
        ngram=holdout.NGRAM,
        tokens=shared.tokens,
        shared_tokens=shared.shared,
        share=shared.share,
    )


def _counted(names: Sequence[str]) -> str:
    return f"{len(names):,} document{'s' if len(names) > 1 else ''}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
