"""Text to token ids, with a user's text kept apart from a model's control tokens.

A tokenizer turns `<|im_end|>` into a control token wherever it stands, also in a text about chat templates.
So two copies of it are kept: one takes such strings as plain text, the other as control tokens.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from octavo.bounded_json import shortened
from octavo.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A tokenizer holds about a hundred bytes for each token of a call until it returns, so a book is cut up;
# blocks of this size also take half the time of blocks of a megabyte.
BLOCK_CHARACTERS = 2**17
BATCH_CHARACTERS = 2**22
BATCH_TEXTS = 4096

# A single line break between two characters that are not white space, and a single space likewise.
_LINE_END = re.compile(r"\S\n(?=\S)")
_WORD_END = re.compile(r"\S(?=\s\S)")


@dataclass(frozen=True, eq=False)
class Coder:
    """Two private copies of one tokenizer; neither cuts or pads. Never changed, so threads may share it."""

    plain: Tokenizer  # the strings of control tokens are text
    control: Tokenizer  # the strings of control tokens are control tokens
    controls: re.Pattern[str]  # finds the strings of control tokens
    control_ids: dict[str, int]


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


@contextmanager
def name_panics(what: str) -> Iterator[None]:
    """Turns what the tokenizers library raises on a text into a ModelError about `what`: a panic, which no
    `except Exception` sees, or an Exception of no class of its own.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and type(error) is not Exception:
            raise
        hint = "A regular expression in its tokenizer.json may have no end. " if panic else ""
        raise ModelError(
            f"{what} fails on a text ({shortened(str(error))}).",
            hint=hint + "Take the tokenizer files of the model's publisher.",
        ) from error


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
    return Coder(plain, control, re.compile("|".join(map(re.escape, names)) or r"(?!)"), control_ids)


def plain_codes(texts: Iterable[str], coder: Coder) -> Iterator[Code]:
    """The code of each text in order, none of it a control token; many texts are encoded at once."""
    parts: list[npt.NDArray[np.int32]] = []
    first = 0
    for group in _groups(texts):
        with name_panics("The tokenizer"):
            encodings = coder.plain.encode_batch([block for block, _ in group], add_special_tokens=False)
        for encoding, (_, is_last) in zip(encodings, group, strict=True):
            if not parts:
                _, first = (encoding.token_to_chars(0) if encoding.ids else None) or (0, 0)
            parts.append(np.array(encoding.ids, dtype=np.int32))
            if is_last:
                yield Code(np.concatenate(parts), first)
                parts = []


def _groups(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Blocks to encode in one call, each with whether it is the last of its text."""
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        start = 0
        for end in block_ends(text):
            group.append((text[start:end], end == len(text)))
            size += end - start
            start = end
            if size >= BATCH_CHARACTERS or len(group) >= BATCH_TEXTS:
                yield group
                group, size = [], 0
    if group:
        yield group


def block_ends(text: str) -> Iterator[int]:
    """Where to cut a text into blocks of 1 to 2 times BLOCK_CHARACTERS, the last one aside; then its end.

    The cut is behind a line break, else before a space, that stands alone between two visible characters.
    Byte-level tokenizers (GPT-2, GPT-J, Llama 3, Qwen, SmolLM2) split there before they merge anything, so
    the ids are those of the whole text. Where a text has no such place, or a tokenizer does not split there
    (SentencePiece style), a block may begin with one token more or less than the whole text would have.
    """
    start = 0
    while len(text) - start > 2 * BLOCK_CHARACTERS:
        low, high = start + BLOCK_CHARACTERS, start + 2 * BLOCK_CHARACTERS
        found = _LINE_END.search(text, low, high) or _WORD_END.search(text, low, high)
        start = found.end() if found else high
        yield start
    yield len(text)
