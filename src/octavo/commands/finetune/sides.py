"""The training text and the held-out one, kept apart: what both hold is taken out of training, and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from octavo.commands.data import Encoded, Text, encode, read_documents, show_ledger, to_rows
from octavo.config import Config, TextOptions, TrainingData, TrainOptions
from octavo.data import holdout
from octavo.data.documents import Document, Reading
from octavo.errors import UsageError
from octavo.reporting import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_NAMED = 20  # documents that are named in a message; the ledger names up to MOST_RECORDED
MOST_RECORDED = 1000
NOTED_SHARE = 0.01  # of the held-out text in the training text, from which on it is a warning


@dataclass(frozen=True)
class _Sides:
    train: Encoded
    test: Encoded | None
    removed: Encoded | None  # documents of the training data that are held out too
    how: str  # in words, for the report


def read_sides(config: Config, tokenizer: PreTrainedTokenizerFast, report: Report) -> tuple[Text, Text | None]:
    """The training text and the held-out one, their ledgers shown.

    Documents of which the held-out side has a copy are counted in the training ledger as left out, and are in no row.
    The held-out ledger's `overlap` says how many these were and how much of the held-out text the training text still
    has.
    UsageError if nothing is left to learn.
    """
    sides = _sides(config, tokenizer, report)
    options = config[TextOptions]
    text = to_rows(sides.train, options, tokenizer, excluded=sides.removed)
    if text.ledger.learned == 0:
        if sides.removed:
            raise UsageError(
                "All of the training text is held out too: nothing is left to learn.",
                hint="Give other text with --test-data, or leave it out and hold out a share with --test-fraction.",
            )
        raise UsageError("The data hold no token to learn.", hint="Look at them with `octavo data`.")
    show_ledger(text.ledger, "Training text", report)
    if sides.test is None:
        report.warn("Nothing is held out to show whether the tuned model is better: give --test-data.")
        return text, None
    held_out = to_rows(sides.test, options, tokenizer)
    overlap = _overlap(sides, tokenizer, report)
    held_out = replace(held_out, ledger=replace(held_out.ledger, overlap=overlap))
    share = overlap["share"]
    show_ledger(held_out.ledger, f"Held-out text ({share:.1%} of it also in the training text)", report)
    if held_out.ledger.learned == 0:
        report.warn("The held-out text holds no token to measure on: give other text with --test-data.")
        return text, None
    return text, held_out


def _sides(config: Config, tokenizer: PreTrainedTokenizerFast, report: Report) -> _Sides:
    data, options = config[TrainingData], config[TextOptions]
    learned = read_documents(data.data, options, report)
    seed = config[TrainOptions].seed

    def encoded(reading: Reading) -> Encoded:
        return encode(reading, options, tokenizer, report)

    def part(some: Sequence[Document]) -> Encoded:
        return encoded(Reading(documents=list(some)))

    if data.test_data:
        if data.test_fraction not in (0, TrainingData().test_fraction):
            report.say("--test-fraction is not used: what --test-data names is held out.")
        held = read_documents(data.test_data, options, report)
        numbers = set(holdout.copies(learned.documents, held.documents))
        kept = [one for number, one in enumerate(learned.documents) if number not in numbers]
        twice = [one for number, one in enumerate(learned.documents) if number in numbers]
        train = encoded(replace(learned, documents=kept))
        return _Sides(train, encoded(held), part(twice) if twice else None, "as given")
    if data.test_fraction == 0:
        return _Sides(encoded(learned), None, None, "nothing")
    if len(learned.documents) == 1:
        return _tail(encoded(learned), data.test_fraction, tokenizer, report)
    kept, rest = holdout.split(learned.documents, fraction=data.test_fraction, seed=seed)
    report.say(f"Held out: {len(rest):,} of {len(learned.documents):,} documents, drawn by their content and the seed.")
    asked = holdout.share_of(len(learned.documents), data.test_fraction)
    if abs(len(rest) - asked) > 1:
        report.warn(
            f"--test-fraction {data.test_fraction:g} asks for {asked:,} documents. Copies of one text stay on one "
            "side, so that no text is both learned and measured."
        )
    return _Sides(encoded(replace(learned, documents=kept)), part(rest), None, "a share of the documents")


def _tail(encoded: Encoded, fraction: float, tokenizer: PreTrainedTokenizerFast, report: Report) -> _Sides:
    """A lone text, parted so that its last share of tokens is held out; a lone record cannot be."""
    (document,) = encoded.documents
    if not document.text or not encoded.tokens:
        return _Sides(encoded, None, None, "nothing")
    (tokens,) = encoded.tokens
    count = len(tokens.ids) - 1  # the end token is nobody's text
    at = count - max(1, round(fraction * count))
    if at < 2 or count - at < 2:
        return _Sides(encoded, None, None, "nothing")
    first, rest = holdout.cut(tokens, at, tokenizer)
    report.say(f"Held out: the last {count - at:,} of {count:,} tokens of {document.source}, its only document.")
    ending = replace(document, text=str(tokenizer.decode(tokens.ids[at:-1].tolist())))
    test = Encoded([ending], [rest], [], Counter(), Counter())
    return _Sides(replace(encoded, tokens=[first]), test, None, "the end of the one document")


def _overlap(sides: _Sides, tokenizer: PreTrainedTokenizerFast, report: Report) -> dict[str, object]:
    """What the training text has of the held-out one, white space aside; in words where it is worth them."""
    assert sides.test is not None
    test = sides.test.tokens
    bare = holdout.bare_tokens(tokenizer)
    shared = holdout.shared_text(
        (ids[ids >= 0] for ids in (bare[one.ids] for one in sides.train.tokens)),
        [ids[ids >= 0] for ids in (bare[one.ids] for one in test)],
        [one.trained[bare[one.ids] >= 0] for one in test],
    )
    removed = sides.removed
    removed_names = [one.where for one in removed.documents] if removed else []
    removed_tokens = sum(len(one.ids) for one in removed.tokens) if removed else 0
    near = [f"{test[number].source}:{test[number].line}" for number in shared.near_copies]
    if removed_names:
        report.warn(
            f"Taken out of training, since they are held out too: {_counted(removed_names)}, {removed_tokens:,} tokens "
            f"({_named(removed_names)})."
        )
    if near:
        report.warn(
            f"Near copies: of {_counted(near)} of the held-out text more than half also stands in the training text "
            f"({_named(near)}). The measured gain is partly memory."
        )
    elif shared.share >= NOTED_SHARE:
        report.warn(
            f"{shared.share:.1%} of the held-out text also stands in the training text, in runs of {holdout.NGRAM} "
            "tokens or more."
        )
    return {
        "held_out": sides.how,
        "removed_documents": len(removed_names),
        "removed_tokens": removed_tokens,
        "removed": removed_names[:MOST_RECORDED],
        "near_copies": len(near),
        "near": near[:MOST_RECORDED],
        "ngram": holdout.NGRAM,
        "tokens": shared.tokens,
        "shared_tokens": shared.shared,
        "share": shared.share,
    }


def _counted(names: Sequence[str]) -> str:
    return f"{len(names):,} document{'s' if len(names) > 1 else ''}"


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED:,} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
