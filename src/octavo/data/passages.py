"""Held-out passages of few long texts: where they are, and the texts without them.

The end of a novel is not like its middle, so the end says little about the whole. Passages spread over all of the text
do: each text is divided into stretches of equal length, and one passage is held out at a random place of each. They
are far from each other, so their losses are nearly independent, and an interval over them (octavo.intervals) is about
the whole text. `python benchmarks/interval_coverage.py` measures how often it contains the truth.

Legend: V vocabulary size, n tokens of a text.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octavo.data.bytes import token_bytes
from octavo.data.encoding import bos_ids
from octavo.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MIN_PASSAGES, MAX_PASSAGES = 10, 40  # fewer give no interval; more are no better and have less context each
MIN_TOKENS, USUAL_TOKENS = 64, 256  # of a passage: with fewer, most of its tokens are predicted from too little
_SHIFT = 4  # a passage is moved by at most 1 / _SHIFT of its length to begin and end with a line
_LINE_ENDS = ("\n", "\u010a", "<0x0A>")  # as vocabularies write the end of a line

Span = tuple[int, int]  # first token, first token after it


def count_of(held_out: int) -> int:
    """How many passages `held_out` tokens become; 0 if they are too few for MIN_PASSAGES."""
    if held_out < MIN_PASSAGES * MIN_TOKENS:
        return 0
    return min(MAX_PASSAGES, max(MIN_PASSAGES, held_out // USUAL_TOKENS))


def spans(lengths: Sequence[int], *, fraction: float, seed: int) -> list[list[Span]]:
    """The held-out passages of each text of so many tokens, in order, together about `fraction` of all tokens.

    [] for each text if there are too few tokens for MIN_PASSAGES. A passage's place in its stretch is a hash of (seed,
    text, passage), so it is the same with every version of Python and numpy.
    """
    total = sum(lengths)
    held_out = round(fraction * total)
    count = count_of(held_out)
    found: list[list[Span]] = [[] for _ in lengths]
    if not count:
        return found
    for text, (length, passages) in enumerate(zip(lengths, _shares(lengths, count), strict=True)):
        for number in range(passages):
            first, last = length * number // passages, length * (number + 1) // passages  # the stretch
            size = min(max(1, round(fraction * (last - first))), last - first - 1)
            place = first + _hashed(seed, text, number) % (last - first - size + 1)
            found[text].append((place, place + size))
    return found


def _shares(lengths: Sequence[int], count: int) -> list[int]:
    """`count` passages shared out by length (largest remainders); a text too short for a passage gets none."""
    exact = [count * length / sum(lengths) for length in lengths]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(lengths)), key=lambda text: (shares[text] - exact[text], text))
    for text in by_remainder[: count - sum(shares)]:
        shares[text] += 1
    return shares


def _hashed(*numbers: int) -> int:
    content = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def to_lines(wanted: Sequence[Span], ids: npt.NDArray[np.int32], ends: npt.NDArray[np.bool_]) -> list[Span]:
    """The spans of a text, moved to the nearest ends of lines; `ends` (V,) from `line_ends`.

    A place stays as it is if no line ends within a quarter of the passage's length. Between two passages, and before
    the first, there are no tokens or at least two: a single one could not be trained on.
    """
    after = np.flatnonzero(ends[ids]) + 1  # the tokens that begin a line
    moved: list[Span] = []
    stop = 0  # of the passage before
    for start, end in wanted:
        most = (end - start) // _SHIFT
        start, end = (_nearest(place, after, most) for place in (start, end))
        start = start if start - stop >= 2 else stop
        if end - start >= 2:
            moved.append((start, end))
            stop = end
    return moved


def _nearest(place: int, after: npt.NDArray[np.int64], most: int) -> int:
    index = int(np.searchsorted(after, place))
    near = min(after[max(0, index - 1) : index + 1].tolist(), key=lambda other: abs(other - place), default=place)
    return near if abs(near - place) <= most else place


def line_ends(tokenizer: PreTrainedTokenizerFast) -> npt.NDArray[np.bool_]:
    """(V,) Whether a token is the last one of a line."""
    ends = np.zeros(len(tokenizer), dtype=np.bool_)  # (V,)
    for token, token_id in tokenizer.get_vocab().items():
        ends[token_id] = token.endswith(_LINE_ENDS)
    return ends


def separate(
    tokens: Tokens, held_out: Sequence[Span], tokenizer: PreTrainedTokenizerFast
) -> tuple[list[Tokens], list[Tokens]]:
    """A plain text divided at its held-out spans: (the parts between them, the held-out parts).

    A part that is not the first begins with a BOS token if the model has one, since it is read without the tokens
    before it. Only the last part of the text ends with the EOS token. Each part has its line.
    """
    lengths = token_bytes(tokenizer)  # (V,)
    begin = np.array(bos_ids(tokenizer), dtype=np.int32)
    n = len(tokens.ids)
    places = sorted({0, n, *(place for span in held_out for place in span if place < n - 1)})  # n - 1: the EOS token
    sides: tuple[list[Tokens], list[Tokens]] = ([], [])
    line = tokens.line
    for first, last in itertools.pairwise(places):
        side = sides[any(start <= first < stop for start, stop in held_out)]
        side.append(_part(tokens, (first, last), begin, lengths, line=line))
        line += str(tokenizer.decode(tokens.ids[first:last].tolist())).count("\n")
    return sides


def _part(
    tokens: Tokens,
    span: Span,
    begin: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int64],
    *,
    line: int,
) -> Tokens:
    first, last = span
    ids, trained = tokens.ids[first:last], tokens.trained[first:last]
    if first:
        ids = np.concatenate([begin, ids])
        trained = np.arange(len(ids)) >= max(1, len(begin))
    shift = first - (len(begin) if first else 0)
    positions = tuple((max(0, index - shift), name) for index, name in tokens.positions if index < last)
    return replace(
        tokens,
        ids=ids,
        trained=trained,
        n_bytes=int(lengths[ids[trained]].sum()),
        line=line,
        positions=positions,
        is_passage=True,
    )
