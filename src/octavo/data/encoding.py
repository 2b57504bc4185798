"""Text to token ids, with a user's text kept apart from a model's control tokens.

A tokenizer turns `<|im_end|>` into a control token wherever it stands, also in a text about chat templates.
So two copies of it are kept: one takes such strings as plain text, the other as control tokens.
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

BATCH_CHARACTERS = 2**20  # of text in hand at once; also how often progress is shown
MOST_WORDS = 2**20  # that are remembered with their ids, and
MOST_CHARACTERS = 2**26  # of all of them together
MANY_WORDS = 4096  # that are new at once: from here on it pays to find out how the tokenizer splits them
FIRST_CHARACTERS = 4096  # of a text that are looked at for its first token


@dataclass(eq=False)
class Words:
    """Stretches of text that were met, with their ids: ids[starts[n] : starts[n] + lengths[n]] are those of word n."""

    numbers: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, bytes] = field(default_factory=dict)  # what words are made of, with the ids of each as int32
    ids: bytearray = field(default_factory=bytearray)  # int32
    starts: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    characters: int = 0

    def learn_(self, words: Iterable[str], coder: Coder) -> None:
        """Encodes those of `words` that are new."""
        new = list(set(words).difference(self.numbers))
        split = list(coder.pieces.split(new)) if len(new) >= MANY_WORDS else [[word] for word in new]
        pieces = list(set(chain.from_iterable(split)).difference(self.pieces))
        with name_panics("The tokenizer"):
            codes = coder.plain.encode_batch_fast(pieces, add_special_tokens=False)
        self.pieces.update((piece, array("i", code.ids).tobytes()) for piece, code in zip(pieces, codes, strict=True))
        ids_of = self.pieces.__getitem__
        for word, parts in zip(new, split, strict=True):
            ids = b"".join(map(ids_of, parts))
            self.numbers[word] = len(self.starts)
            self.starts.append(len(self.ids) // 4)
            self.lengths.append(len(ids) // 4)
            self.ids += ids
        self.characters += sum(map(len, new)) + sum(map(len, pieces))

    def joined(self, words: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The ids of `words` one after the other, and how many each has."""
        numbers = np.fromiter(map(self.numbers.__getitem__, words), np.int64, len(words))
        lengths = np.frombuffer(self.lengths, dtype=np.int64)[numbers]
        starts = np.frombuffer(self.starts, dtype=np.int64)[numbers]
        ends = np.cumsum(lengths)
        places = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        return np.frombuffer(self.ids, dtype=np.int32)[places], lengths


@dataclass(eq=False)
class Coder:
    """Two private copies of one tokenizer; neither cuts or pads. The tokenizers are never changed."""

    plain: Tokenizer  # the strings of control tokens are text
    control: Tokenizer  # the strings of control tokens are control tokens
    controls: re.Pattern[str]  # finds the strings of control tokens
    control_ids: dict[str, int]

    @cached_property
    def cuts(self) -> Cuts:
        """Where a text may be cut without a change of its ids: found at the first text."""
        return cuts_of(self.plain)

    @cached_property
    def pieces(self) -> Pieces:
        """What `plain` splits a text into: found at the first long text."""
        return Pieces(self.plain)


@dataclass(frozen=True)
class Code:
    """One text as ids."""

    ids: npt.NDArray[np.int32]
    first_characters: int  # how many characters of the text the first token stands for


_CODERS: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, Coder]] = weakref.WeakKeyDictionary()


def coder_of(tokenizer: PreTrainedTokenizerFast) -> Coder:
    """The tokenizer's copies, made at its first use and again when tokens were added to it since."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        hint = "Use a model folder that holds a tokenizer.json."
        raise UsageError("the tokenizer has no fast form.", hint=hint)
    size = backend.get_vocab_size(with_added_tokens=True)
    known = _CODERS.get(tokenizer)
    if known is None or known[0] != size:
        known = (size, _copies(backend))
        _CODERS[tokenizer] = known
    return known[1]


def begin_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that the tokenizer itself puts before a text: the begin token of a Llama, of others mostly [].

    A Llama was trained with one before every text and predicts badly without; GPT-J and SmolLM2 have none.
    """
    # Not an empty text: behind that stands an end token, which in some models is the begin token too. The mask tells
    # what was added from a token of the text: an unknown word may be the begin token.
    for text in chain(("a", " the", "0"), _words(tokenizer)):
        try:
            with name_panics("The tokenizer"):
                added = tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True)
        except ModelError:  # of a vocabulary of words, without one for those that are unknown
            continue
        if 0 in (mask := added["special_tokens_mask"]):
            return [int(number) for number in added["input_ids"][: mask.index(0)]]
    return []


def _words(tokenizer: PreTrainedTokenizerFast, most: int = 16) -> Iterator[str]:
    """Some tokens that are not special. A generator: a large vocabulary takes milliseconds to list."""
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
    control_ids = {token.content: number for number, token in added if token.special}
    # The longest first, as the tokenizer matches; with none, a pattern that matches nothing.
    names = sorted(control_ids, key=lambda name: (-len(name), name))
    controls = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    return Coder(plain, control, controls, control_ids)


def plain_codes(texts: Iterable[str], coder: Coder, progress: Callable[[int], None] | None = None) -> Iterator[Code]:
    """The code of each text in order, none of it a control token. `progress` is told of the characters done.

    A text is cut where the tokenizer cuts it itself before anything else (`Coder.cuts`), and each different stretch is
    encoded once: a text of a hundred megabytes has a million of them. They in turn are made of some ten thousand pieces
    (`Coder.pieces`). The ids are those of the whole text. A tokenizer that has no such places gets each text whole.
    """
    known = Words()
    parts: list[npt.NDArray[np.int32]] = []
    first = ""
    for group in _groups(texts, coder.cuts):
        if len(known.numbers) > MOST_WORDS or known.characters > MOST_CHARACTERS:
            known = Words()
        words = list(chain.from_iterable(stretches for stretches, _ in group))
        known.learn_(words, coder)
        ids, lengths = known.joined(words)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        at = 0
        for stretches, is_last in group:
            first = first if parts else stretches[0]
            parts.append(ids[ends[at] : ends[at + len(stretches)]])
            at += len(stretches)
            if progress:
                progress(sum(map(len, stretches)))
            if is_last:
                yield Code(np.concatenate(parts) if len(parts) > 1 else parts[0], _first_characters(first, coder))
                parts = []


def _first_characters(word: str, coder: Coder) -> int:
    """How many characters the first token stands for, of a text that begins with `word`."""
    with name_panics("The tokenizer"):
        code = coder.plain.encode(word[:FIRST_CHARACTERS], add_special_tokens=False)
    _, end = (code.token_to_chars(0) if code.ids else None) or (0, 0)
    return end


def _groups(texts: Iterable[str], cuts: Cuts) -> Iterator[list[tuple[list[str], bool]]]:
    """Stretches of texts, some BATCH_CHARACTERS together, each list with whether it is the last of its text."""
    group: list[tuple[list[str], bool]] = []
    size = 0
    for text in texts:
        for words, is_last in cuts.words(text, BATCH_CHARACTERS):
            group.append((words, is_last))
            size += sum(map(len, words)) + 64
            if size >= BATCH_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group
