"""Cloze probes from held-out text: a word, name or number, the text before it, and wrong answers from other probes.

Only rarity in the user's text decides which spans are probes, so no list of words of a language is needed. A span of
held-out text is a probe if

- it is one word or number of at most MAX_ANSWER tokens, all of them trained ones (of a conversation: of an answer),
- at least MIN_CONTEXT tokens precede it in its document, and the word itself is not among them: it could be copied,
- it occurs in the training text, but rarely: what never occurs there cannot be learned from it,
- it does not end a run of 13 tokens that the training text has too: that would be a copy, which `holdout` counts.

Probes are spread evenly over the documents, the rarest words of each first, until their rows have BUDGET tokens.

The wrong answers of a probe are true answers of other probes, of the same kind (number, name, other word) and of
similar length in tokens, as far as there are enough. Of the WRONG + 1 wrong answers the first is that of the shuffled
control: the answers of all probes moved on by one. It competes with the same WRONG others as the true answer does.

Legend: n tokens of a piece, V vocabulary size.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.bytes import token_bytes
from octavo.data.encoding import bos_ids
from octavo.data.holdout import NGRAM
from octavo.data.ngrams import chunks_of, hashes, occurrences
from octavo.data.packing import IGNORE_INDEX, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = npt.NDArray[np.int32]

CONTEXT = 32  # tokens before the answer, at most: some 24 words. Each answer of a probe is scored with its own copy.
MIN_CONTEXT = 8  # with fewer a reader could not guess the answer either
MAX_ANSWER = 6  # tokens: invented names and years have several
WRONG = 3  # wrong answers that the true one competes with: by chance it is the likeliest of 4 in 25 % of the probes
BUDGET = 6144  # tokens of the rows of all probes: more would take a laptop longer than the samples do
MAX_PROBES = 100
MIN_PROBES = 10  # as many units as an interval needs
MAX_PIECES = 256  # of held-out rows that are searched
MAX_TRAINING_TOKENS = 2**21  # of the training text in which words are counted
COMMON = 5e-4  # share of the training text from which on a word is common, such as a function word
COMMON_COUNT = 20  # .. if it occurs more often than this
DISTANCE = 8  # tokens between two answers of one piece
_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}][^\W\d_]+)?")


@dataclass(frozen=True, eq=False)
class Span:
    """A possible probe: the tokens [start, stop) of a piece."""

    piece: Ids  # (n,)
    start: int
    stop: int
    word: str
    kind: str  # number, name or word
    document: int  # index of the document
    row: int

    @property
    def answer(self) -> Ids:
        return self.piece[self.start : self.stop]

    @property
    def key(self) -> bytes:
        """Orders spans without regard to where they stand."""
        return _digest(self.piece[: self.stop])


@dataclass(frozen=True, eq=False)
class Probe:
    """A context and its answers: the true one, that of the shuffled control, and WRONG others."""

    context: Ids
    answers: tuple[Ids, ...]  # 2 + WRONG
    words: tuple[str, ...]  # of the answers
    kind: str
    document: int
    row: int


def choose_probes(rows: Sequence[Row], training: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> list[Probe]:
    """The probes of held-out `rows`, in the order of the text; [] if there are fewer than MIN_PROBES.

    Words are counted in the `training` rows; without any, as for text whose training data are not known, in `rows`.
    """
    spans = list(_spans(rows, tokenizer))
    known = bool(training)
    counts, copied = _in_training(spans, _sample(training or rows))
    total = min(MAX_TRAINING_TOKENS, sum(len(row.ids) for row in training or rows))
    most = max(COMMON_COUNT, COMMON * total)
    rare = [
        (int(count), span)
        for span, count, copy in zip(spans, counts, copied, strict=True)
        if known <= count <= most and not (known and copy)
    ]
    chosen = _spread(rare)
    probes = _with_answers(chosen, np.array(bos_ids(tokenizer), dtype=np.int32))
    return probes if len(probes) >= MIN_PROBES else []


def probe_rows(probes: Sequence[Probe]) -> Iterator[tuple[Ids, npt.NDArray[np.bool_]]]:
    """(ids (c + a,), which of them are scored (c + a,)) of each answer of each probe, after the probe's context."""
    for probe in probes:
        for answer in probe.answers:
            ids = np.concatenate([probe.context, answer])
            yield ids, np.arange(len(ids)) >= len(probe.context)


def _spans(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast) -> Iterator[Span]:
    """All spans of the pieces of `rows`, of at most MAX_PIECES of them."""
    lengths = token_bytes(tokenizer)  # (V,)
    pieces = [(number, piece) for number, row in enumerate(rows) for piece in range(len(row.documents))]
    pieces.sort(key=lambda each: _digest(np.array(each, dtype=np.int32)))
    for number, piece in sorted(pieces[:MAX_PIECES]):
        row = rows[number]
        inside = row.piece == piece  # (T,)
        labels = row.labels[inside]
        last = labels[-1:][labels[-1:] != IGNORE_INDEX]
        ids = np.concatenate([row.ids[inside], last])  # (n,)
        trained = np.concatenate([[False], labels != IGNORE_INDEX])[: len(ids)]  # (n,)
        yield from _spans_of_piece(ids, trained, lengths, tokenizer, where=(row.documents[piece], number))


def _spans_of_piece(
    ids: Ids,
    trained: npt.NDArray[np.bool_],
    lengths: npt.NDArray[np.int64],
    tokenizer: PreTrainedTokenizerFast,
    *,
    where: tuple[int, int],
) -> Iterator[Span]:
    """The spans of one piece: words whose tokens are theirs alone, but for a space before the word."""
    text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    ends = np.cumsum(lengths[ids])  # (n,) bytes of the text up to and with each token
    byte_of = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])]).astype(np.int64)
    missing = int(ends[-1] - byte_of[-1]) if len(ends) else 0
    if missing not in (0, 1):  # the piece begins or ends within a character
        return
    byte_of += missing  # SentencePiece drops the first space of a text
    seen: set[str] = set()
    for match in _WORD.finditer(text):
        word, start, end = match[0], byte_of[match.start()], byte_of[match.end()]
        repeated, folded = word.casefold() in seen, word.casefold()
        seen.add(folded)
        first = int(np.searchsorted(ends, start, side="right"))
        last = int(np.searchsorted(ends, end))
        begins = int(ends[first] - lengths[ids[first]])
        whole = begins == start or (begins == start - 1 and text[match.start() - 1 : match.start()].isspace())
        if repeated or not whole or ends[last] != end or first < MIN_CONTEXT or last - first >= MAX_ANSWER:
            continue
        if trained[first : last + 1].all():
            yield Span(ids, first, last + 1, word, _kind(word, text[: match.start()]), *where)


def _kind(word: str, before: str) -> str:
    """A number has a digit; a name begins with a capital within a sentence."""
    if any(character.isdigit() for character in word):
        return "number"
    previous = before.rstrip()[-1:]
    return "name" if word[0].isupper() and (previous.isalnum() or previous in ",;") else "word"


def _sample(rows: Sequence[Row]) -> list[Row]:
    """Rows of at most about MAX_TRAINING_TOKENS, evenly from all."""
    step = max(1, -(-sum(len(row.ids) for row in rows) // MAX_TRAINING_TOKENS))
    return list(islice(rows, 0, None, step))


def _in_training(spans: Sequence[Span], training: Sequence[Row]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(how often the training text has the tokens of each answer, whether it has the NGRAM tokens that end with it)."""
    counts = np.zeros(len(spans), dtype=np.int64)
    for length in sorted({len(span.answer) for span in spans}):
        numbers = [number for number, span in enumerate(spans) if len(span.answer) == length]
        wanted = np.concatenate([hashes(spans[number].answer, length) for number in numbers])
        counts[numbers] = occurrences(wanted, chunks_of(training), length)
    copied = np.zeros(len(spans), dtype=np.bool_)
    numbers = [number for number, span in enumerate(spans) if span.stop >= NGRAM]
    if numbers:
        ends = (spans[number].piece[spans[number].stop - NGRAM : spans[number].stop] for number in numbers)
        wanted = np.concatenate([hashes(ids, NGRAM) for ids in ends])
        copied[numbers] = occurrences(wanted, chunks_of(training), NGRAM) > 0
    return counts, copied


def _spread(rare: Sequence[tuple[int, Span]]) -> list[Span]:
    """Spans within BUDGET: the rarest of each piece, then the second of each, and so on; in the order of the text."""
    of_piece: dict[tuple[int, int], list[tuple[int, bytes, Span]]] = {}
    for count, span in rare:
        of_piece.setdefault((span.row, span.document), []).append((count, span.key, span))
    queues = [sorted(spans, key=lambda each: each[:2]) for spans in of_piece.values()]
    queues.sort(key=lambda spans: spans[0][1])
    chosen: list[Span] = []
    tokens = 0
    while queues:
        for queue in queues:
            _, _, span = queue.pop(0)
            near = (abs(span.start - one.start) < DISTANCE for one in chosen if one.piece is span.piece)
            if any(near):
                continue
            tokens += (2 + WRONG) * (min(span.start, CONTEXT) + len(span.answer))
            if tokens > BUDGET or len(chosen) == MAX_PROBES:
                return sorted(chosen, key=lambda span: (span.row, span.document, span.start))
            chosen.append(span)
        queues = [queue for queue in queues if queue]
    return sorted(chosen, key=lambda span: (span.row, span.document, span.start))


def _with_answers(spans: Sequence[Span], begin: Ids) -> list[Probe]:
    """The probes of spans with their wrong answers, without those for which there are not enough."""
    groups: dict[str, list[Span]] = {"": sorted(spans, key=_order)}
    for span in groups[""]:
        groups.setdefault(span.kind, []).append(span)
    numbers = {kind: {id(span): number for number, span in enumerate(group)} for kind, group in groups.items()}
    probes = []
    for span in spans:
        words, answers = [span.word], [span.answer]
        for kind in (span.kind, ""):  # of the same kind, then of any
            group, number = groups[kind], numbers[kind][id(span)]
            for shift in range(1, len(group)):
                other = group[(number + shift) % len(group)]
                if len(answers) < 2 + WRONG and _differs(other, words):
                    words.append(other.word)
                    answers.append(other.answer)
        if len(answers) == 2 + WRONG:
            context = span.piece[max(0, span.start - CONTEXT) : span.start]
            if span.start > CONTEXT and len(begin):
                context = np.concatenate([begin, context])
            probes.append(Probe(context, tuple(answers), tuple(words), span.kind, span.document, span.row))
    return probes


def _order(span: Span) -> tuple[int, bytes]:
    """Answers of similar length are neighbours."""
    return len(span.answer), span.key


def _differs(other: Span, words: Sequence[str]) -> bool:
    return other.word.casefold() not in {word.casefold() for word in words}


def _digest(ids: npt.NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest()
