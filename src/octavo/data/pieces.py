"""The pieces that a byte-level tokenizer splits a text into before its merges, found without the tokenizer.

Each piece is encoded for itself, and a text of millions of words has few different ones. The tokenizer takes some 15
microseconds to split a word, since it follows the place of every character; its pattern alone takes a tenth of that.
The pattern is taken only where it is known, and only after it has split a text with every order of four kinds of
characters, and with every character of DOMAIN, as the tokenizer does. Later characters change their kind from one
version of Unicode to the next: what holds them is left whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from octavo.data.panics import name_panics

# The pattern of GPT-2, which `ByteLevel` splits with, and the same behind `Digits`, which parts every digit from all.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_KINDS = "aB1 \n\r\t.'s_"  # characters of each kind that patterns tell apart
_CONTRACTIONS = "it's don't we're I've I'm he'll you'd It'S 'tis o'clock 's 1's  's\n're 12345 1,234.5 x1y2 "
# Latin, Greek and Cyrillic, and the spaces, dashes and quotation marks of print.
DOMAIN = (range(0x0530), range(0x2000, 0x2070))
ASCII = (range(0x80),)
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's; Python's \s has more


class Pieces:
    """How to split a text as `tokenizer` does; not at all where its way is not known."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        parts: dict[str, Any] = json.loads(tokenizer.to_str())
        domain = {None: DOMAIN, "NFC": ASCII}.get((parts.get("normalizer") or {}).get("type"), ())
        source = _source(parts.get("pre_tokenizer") or {})
        self._pattern: re.Pattern[str] | None = None
        self._added: re.Pattern[str] | None = None
        self._inside = re.compile("[" + "".join(f"{chr(r.start)}-{chr(r.stop - 1)}" for r in domain or ASCII) + "]*+")
        if source is None or not domain:
            return
        pattern = _compiled(source, domain)
        if pattern is None or pattern.groups or not _agrees(pattern, tokenizer, domain):
            return
        self._pattern = pattern
        # They are found before anything is split. Special ones are text here.
        added = [token["content"] for token in parts.get("added_tokens") or [] if not token["special"]]
        if added:
            self._added = re.compile("|".join(map(re.escape, added)))

    def split(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """The pieces of each text; the text itself where they are not certain."""
        pattern, added, inside = self._pattern, self._added, self._inside
        if pattern is None:
            yield from ([text] for text in texts)
            return
        for text in texts:
            if (text.isascii() or inside.fullmatch(text)) and not (added and added.search(text)):
                yield pattern.findall(text)
            else:
                yield [text]


def _source(parts: dict[str, Any]) -> str | None:
    """The pattern that a pre-tokenizer splits with, if it is one that is known."""
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
        found = first["pattern"].get("Regex")
        return str(found) if found else None
    return None


def _compiled(source: str, domain: Sequence[range]) -> re.Pattern[str] | None:
    """A pattern of the tokenizers library as one of Python's, of the same meaning for characters of `domain`."""
    found: list[str] = []
    in_class = False
    for part in re.findall(r"\\[pP]\{\w+\}|\\.|.", source, re.DOTALL):
        if part in ("\\s", "\\S") or part[:2] in ("\\p", "\\P"):
            inner = _WHITE if part in ("\\s", "\\S") else _category(part[3:-1], domain)
            if in_class and part[1].isupper():
                return None
            found.append(inner if in_class else f"[{'^' * part[1].isupper()}{inner}]")
            continue
        if in_class and part == "[":  # a class within a class
            return None
        in_class = part == "[" or (in_class and part != "]")
        found.append(part)
    try:
        return re.compile("".join(found))
    except re.error:
        return None


def _category(name: str, domain: Sequence[range]) -> str:
    """The characters of a Unicode category as the inside of a class; one that has none holds the last character."""
    spans: list[list[int]] = []
    for number in (number for numbers in domain for number in numbers):
        if unicodedata.category(chr(number)).startswith(name):
            if spans and spans[-1][1] == number - 1:
                spans[-1][1] = number
            else:
                spans.append([number, number])
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in spans) or "\\U0010ffff"


def _agrees(pattern: re.Pattern[str], tokenizer: Tokenizer, domain: Sequence[range]) -> bool:
    """Whether the pattern splits as the tokenizer does, and each piece is one piece for itself."""
    every = (chr(number) for numbers in domain for number in numbers)
    texts = [_orders(_KINDS, 4), _CONTRACTIONS, "".join(f"a{c}a {c} {c}{c}1{c}.{c}'{c}\n" for c in every)]
    for text in texts:
        with name_panics("The tokenizer"):
            theirs = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if pattern.findall(text) != theirs or any(pattern.findall(piece) != [piece] for piece in set(theirs)):
            return False
    return True


def _orders(characters: str, length: int) -> str:
    """A text in which every sequence of `length` of the characters occurs: a de Bruijn sequence, in Lyndon words."""
    size = len(characters)
    word = [0] * (size * length)
    found: list[int] = []

    def extend(place: int, period: int) -> None:
        if place > length:
            if length % period == 0:
                found.extend(word[1 : period + 1])
            return
        word[place] = word[place - period]
        extend(place + 1, period)
        for number in range(word[place - period] + 1, size):
            word[place] = number
            extend(place + 1, place)

    extend(1, 1)
    text = "".join(characters[number] for number in found)
    return text + text[: length - 1]
