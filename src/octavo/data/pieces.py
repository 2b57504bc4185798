"""The pre-tokenizer of a byte-level tokenizer as a Python regular expression: it splits a text into pieces.

A piece is mostly a word with the space before it. BPE merges never cross the border of a piece, so each piece can be
encoded on its own, and a text of millions of words has few distinct pieces. The tokenizers library takes some 15
microseconds to split a word, since it tracks the offset of every character. The pattern alone takes a tenth of that.

The pattern is used only for known pre-tokenizers, and only after it has split two test texts exactly as the tokenizer
does: one with every sequence of four kinds of characters, one with every character of DOMAIN. Characters beyond DOMAIN
may change their category from one Unicode version to the next, so a text with any of them is not split.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from octavo.data.panics import name_panics

# The pattern of GPT-2, which `ByteLevel` uses, and the same after `Digits`, which separates every digit.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_KINDS = "aB1 \n\r\t.'s_"  # one character of each kind that patterns distinguish
_CONTRACTIONS = "it's don't we're I've I'm he'll you'd It'S 'tis o'clock 's 1's  's\n're 12345 1,234.5 x1y2 "
# Latin, Greek and Cyrillic, and the typographic spaces, dashes and quotation marks.
DOMAIN = (range(0x0530), range(0x2000, 0x2070))  # code points
ASCII = (range(0x80),)
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of Unicode; Python's \s has more


class Pieces:
    """Splits texts as the pre-tokenizer of `tokenizer` does. If its split is not known, texts are not split."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        parts: dict[str, Any] = json.loads(tokenizer.to_str())
        # NFC may change a text before the split, except ASCII. With any other normalizer texts are not split.
        domain = {None: DOMAIN, "NFC": ASCII}.get((parts.get("normalizer") or {}).get("type"), ())
        source = _source(parts.get("pre_tokenizer") or {})
        self._pattern: re.Pattern[str] | None = None
        self._added: re.Pattern[str] | None = None
        ranges = "".join(f"{chr(r.start)}-{chr(r.stop - 1)}" for r in domain or ASCII)
        self._in_domain = re.compile(f"[{ranges}]*+")
        if source is None or not domain:
            return
        pattern = _compiled(source, domain)
        if pattern is None or pattern.groups or not _agrees(pattern, tokenizer, domain):
            return
        self._pattern = pattern
        # Non-special added tokens are matched before the split. Special ones are text here.
        added = [token["content"] for token in parts.get("added_tokens") or [] if not token["special"]]
        if added:
            self._added = re.compile("|".join(map(re.escape, added)))

    def split(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """The pieces of each text; [text] if it is not certain that the tokenizer splits it so."""
        pattern, added, in_domain = self._pattern, self._added, self._in_domain
        if pattern is None:
            yield from ([text] for text in texts)
            return
        for text in texts:
            if (text.isascii() or in_domain.fullmatch(text)) and not (added and added.search(text)):
                yield pattern.findall(text)
            else:
                yield [text]


def _source(parts: dict[str, Any]) -> str | None:
    """The pattern by which a pre-tokenizer splits, in the syntax of the tokenizers library; None if it is unknown."""
    steps = parts.get("pretokenizers", [parts])
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return _GPT_2 if last.get("use_regex", True) else None
    if len(before) > 1:
        return None
    (first,) = before
    if first["type"] == "Digits" and first["individual_digits"] and last.get("use_regex", True):
        return _DIGITS
    if first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"] and not last["use_regex"]:
        pattern = first["pattern"].get("Regex")
        return str(pattern) if pattern else None
    return None


def _compiled(source: str, domain: Sequence[range]) -> re.Pattern[str] | None:
    """A pattern of the tokenizers library as a Python pattern that is equivalent for characters of `domain`."""
    compiled: list[str] = []
    in_class = False
    for part in re.findall(r"\\[pP]\{\w+\}|\\.|.", source, re.DOTALL):
        if part in ("\\s", "\\S") or part[:2] in ("\\p", "\\P"):
            ranges = _WHITE if part in ("\\s", "\\S") else _category(part[3:-1], domain)
            if in_class and part[1].isupper():  # a complement within a class
                return None
            compiled.append(ranges if in_class else f"[{'^' * part[1].isupper()}{ranges}]")
            continue
        if in_class and part == "[":  # a nested character class: Python has none
            return None
        in_class = part == "[" or (in_class and part != "]")
        compiled.append(part)
    try:
        return re.compile("".join(compiled))
    except re.error:
        return None


def _category(name: str, domain: Sequence[range]) -> str:
    """The characters of a Unicode category in `domain`, as the inside of a character class.

    A category without characters in `domain` gets U+10FFFF, since a class cannot be empty.
    """
    spans: list[list[int]] = []
    for codepoint in (codepoint for codepoints in domain for codepoint in codepoints):
        if unicodedata.category(chr(codepoint)).startswith(name):
            if spans and spans[-1][1] == codepoint - 1:
                spans[-1][1] = codepoint
            else:
                spans.append([codepoint, codepoint])
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in spans) or "\\U0010ffff"


def _agrees(pattern: re.Pattern[str], tokenizer: Tokenizer, domain: Sequence[range]) -> bool:
    """Whether the pattern splits the test texts as the tokenizer does, and splits no piece any further."""
    characters = (chr(codepoint) for codepoints in domain for codepoint in codepoints)
    texts = [_all_sequences(_KINDS, 4), _CONTRACTIONS]
    texts.append("".join(f"a{c}a {c} {c}{c}1{c}.{c}'{c}\n" for c in characters))
    for text in texts:
        with name_panics("The tokenizer"):
            expected = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if pattern.findall(text) != expected or any(pattern.findall(piece) != [piece] for piece in set(expected)):
            return False
    return True


def _all_sequences(characters: str, length: int) -> str:
    """A text that contains every sequence of `length` of the characters: a de Bruijn sequence.

    It is the concatenation of the Lyndon words whose length divides `length`, in order (Fredricksen, Maiorana).
    """
    size = len(characters)
    word = [0] * (size * length)
    sequence: list[int] = []

    def extend(index: int, period: int) -> None:
        if index > length:
            if length % period == 0:
                sequence.extend(word[1 : period + 1])
            return
        word[index] = word[index - period]
        extend(index + 1, period)
        for symbol in range(word[index - period] + 1, size):
            word[index] = symbol
            extend(index + 1, index)

    extend(1, 1)
    text = "".join(characters[symbol] for symbol in sequence)
    return text + text[: length - 1]
