"""Text to token ids, where the strings of control tokens in a user's text stay text.

A tokenizer turns `<|im_end|>` into a control token anywhere, also in a text about chat templates. So octavo keeps two
copies of each tokenizer: one encodes such strings as plain text, the other as control tokens.
"""

from __future__ import annotations

import re
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from octavo.data.cuts import Cuts, cuts_of
from octavo.data.panics import name_panics
from octavo.data.pieces import Pieces
from octavo.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH_CHARACTERS = 2**20  # characters encoded per step; progress is reported as often
MAX_SEGMENTS = 2**20  # segments in the cache
MAX_CHARACTERS = 2**26  # characters of all segments in the cache
MANY_SEGMENTS = 4096  # new segments per step from which finding the tokenizer's own split (`Pieces`) pays
FIRST_CHARACTERS = 4096  # characters of a text that are tokenized to measure its first token


@dataclass(eq=False)
class SegmentCache:
    """The ids of text segments. Those of segment n are ids[starts[n] : starts[n] + lengths[n]]."""

    numbers: dict[str, int] = field(default_factory=dict)  # segment -> n
    pieces: dict[str, bytes] = field(default_factory=dict)  # piece of a segment -> its ids as int32 bytes
    ids: bytearray = field(default_factory=bytearray)  # int32
    starts: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    characters: int = 0

    def add_(self, segments: Iterable[str], coder: Coder) -> None:
        """Encodes those of `segments` that are not in the cache."""
        new = list(set(segments).difference(self.numbers))
        split = list(coder.pieces.split(new)) if len(new) >= MANY_SEGMENTS else [[segment] for segment in new]
        pieces = list(set(chain.from_iterable(split)).difference(self.pieces))
        with name_panics("The tokenizer"):
            encodings = coder.plain.encode_batch_fast(pieces, add_special_tokens=False)
        self.pieces.update(
            (piece, array("i", encoding.ids).tobytes()) for piece, encoding in zip(pieces, encodings, strict=True)
        )
        ids_of = self.pieces.__getitem__
        for segment, parts in zip(new, split, strict=True):
            ids = b"".join(map(ids_of, parts))
            self.numbers[segment] = len(self.starts)
            self.starts.append(len(self.ids) // 4)
            self.lengths.append(len(ids) // 4)
            self.ids += ids
        self.characters += sum(map(len, new)) + sum(map(len, pieces))

    def concatenated(self, segments: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """(ids of all segments in order (n,), number of ids of each segment (len(segments),))."""
        numbers = np.fromiter(map(self.numbers.__getitem__, segments), np.int64, len(segments))
        lengths = np.frombuffer(self.lengths, dtype=np.int64)[numbers]  # (len(segments),)
        starts = np.frombuffer(self.starts, dtype=np.int64)[numbers]  # (len(segments),)
        ends = np.cumsum(lengths)
        # A gather index: id k of the output is at k plus the shift from its segment's output start to its cache start.
        indices = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)  # (n,)
        return np.frombuffer(self.ids, dtype=np.int32)[indices], lengths


@dataclass(eq=False)
class Coder:
    """Two private copies of one tokenizer, without truncation and padding. They are never changed."""

    plain: Tokenizer  # encodes the strings of control tokens as text
    control: Tokenizer  # encodes the strings of control tokens as control tokens
    controls: re.Pattern[str]  # matches the strings of control tokens
    control_ids: dict[str, int]

    @cached_property
    def cuts(self) -> Cuts:
        """Where a text may be split without changing its ids; computed at the first text."""
        return cuts_of(self.plain)

    @cached_property
    def pieces(self) -> Pieces:
        """The pre-tokenizer's split of a text; computed at the first long text."""
        return Pieces(self.plain)


@dataclass(frozen=True)
class EncodedText:
    """One text as token ids."""

    ids: npt.NDArray[np.int32]  # (n,)
    first_token_length: int  # of its first token, in characters of the text


_CODERS: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, Coder]] = weakref.WeakKeyDictionary()


def coder_of(tokenizer: PreTrainedTokenizerFast) -> Coder:
    """The two copies of a tokenizer, made at its first use and again when tokens have been added since."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        hint = "Use a model folder with a tokenizer.json."
        raise UsageError("the tokenizer has no fast form.", hint=hint)
    size = backend.get_vocab_size(with_added_tokens=True)
    cached = _CODERS.get(tokenizer)
    if cached is None or cached[0] != size:
        cached = (size, _copies(backend))
        _CODERS[tokenizer] = cached
    return cached[1]


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that the tokenizer puts before a text: the BOS token of a Llama, mostly [] for other models.

    A Llama was trained with a BOS token before every text and predicts badly without it. GPT-J and SmolLM2 have none.
    """
    # An empty text does not do: its EOS token follows at once, and in some models EOS and BOS are the same token. The
    # mask separates added tokens from tokens of the text: an unknown word may map to the BOS token.
    for text in chain(("a", " the", "0"), _some_tokens(tokenizer)):
        try:
            with name_panics("The tokenizer"):
                added = tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True)
        except ModelError:  # a word-level vocabulary without an unknown token
            continue
        if 0 in (mask := added["special_tokens_mask"]):
            return [int(token_id) for token_id in added["input_ids"][: mask.index(0)]]
    return []


def _some_tokens(tokenizer: PreTrainedTokenizerFast, most: int = 16) -> Iterator[str]:
    """Some non-special tokens. A generator, since listing a large vocabulary takes milliseconds."""
    special = set(tokenizer.all_special_tokens)
    yield from islice((token for token in tokenizer.get_vocab() if token not in special), most)


def _copies(backend: Tokenizer) -> Coder:
    text = backend.to_str()
    plain, control = Tokenizer.from_str(text), Tokenizer.from_str(text)
    for copy in (plain, control):
        copy.no_truncation()
        copy.no_padding()
    plain.encode_special_tokens = True
    control.encode_special_tokens = False
    added = backend.get_added_tokens_decoder().items()
    control_ids = {token.content: token_id for token_id, token in added if token.special}
    # The longest first, as the tokenizer matches. Without control tokens the pattern matches nothing.
    names = sorted(control_ids, key=lambda name: (-len(name), name))
    controls = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    return Coder(plain, control, controls, control_ids)


def encode_plain(
    texts: Iterable[str], coder: Coder, progress: Callable[[int], None] | None = None
) -> Iterator[EncodedText]:
    """Encodes each text in order, without control tokens. `progress` is called with the number of characters done.

    A text is split where the tokenizer's own first step splits it (`Coder.cuts`), and each distinct segment is encoded
    once: a text of 100 MB has a million of them. The segments consist of some ten thousand pieces (`Coder.pieces`),
    and each distinct piece is encoded once too. The ids equal those of the whole text. A text of a tokenizer without
    safe split points is encoded whole.
    """
    cache = SegmentCache()
    parts: list[npt.NDArray[np.int32]] = []
    first = ""
    for group in _groups(texts, coder.cuts):
        if len(cache.numbers) > MAX_SEGMENTS or cache.characters > MAX_CHARACTERS:
            cache = SegmentCache()
        flat = list(chain.from_iterable(segments for segments, _ in group))
        cache.add_(flat, coder)
        ids, lengths = cache.concatenated(flat)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        at = 0
        for segments, is_last in group:
            first = first if parts else segments[0]
            parts.append(ids[ends[at] : ends[at + len(segments)]])
            at += len(segments)
            if progress:
                progress(sum(map(len, segments)))
            if is_last:
                all_ids = np.concatenate(parts) if len(parts) > 1 else parts[0]
                yield EncodedText(all_ids, _first_token_length(first, coder))
                parts = []


def _first_token_length(segment: str, coder: Coder) -> int:
    """How many characters the first token of a text covers; `segment` is the text's first segment."""
    with name_panics("The tokenizer"):
        encoding = coder.plain.encode(segment[:FIRST_CHARACTERS], add_special_tokens=False)
    _, end = (encoding.token_to_chars(0) if encoding.ids else None) or (0, 0)
    return end


def _groups(texts: Iterable[str], cuts: Cuts) -> Iterator[list[tuple[list[str], bool]]]:
    """Groups of segment lists, about BATCH_CHARACTERS each. A list is marked if it is the last of its text."""
    group: list[tuple[list[str], bool]] = []
    size = 0
    for text in texts:
        for segments, is_last in cuts.segments(text, BATCH_CHARACTERS):
            group.append((segments, is_last))
            size += sum(map(len, segments)) + 64
            if size >= BATCH_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group
