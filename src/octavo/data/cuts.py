"""Where a text may be cut before it is encoded, so that the pieces' ids are those of the whole.

Most tokenizers split a text at white space before anything else (byte-level ones with a pattern, WordPiece), or have
no token with white space inside (BPE made from SentencePiece). Then a text may be cut before a space behind a visible
character, and mostly behind a line break between two. Which of these a tokenizer allows is found from what it is made
of and by trying it on words of many kinds; where neither gives certainty, a text stays whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from octavo.data.panics import name_panics
from octavo.errors import ModelError

# A word with the spaces before it. It goes on over other white space, and takes what is left at the end of the text.
_AT_SPACES = r"\s*+\S++(?:[^\S ]\s*+\S++)*+(?:\s++\Z)?+|\s++"
# The same, ended also behind a single line break that a letter or digit follows.
_AT_LINES = r"\s*+\S++(?:(?!\n\w)[^\S ]\s*+\S++)*+(?:\n(?=\w)|\s++\Z)?+|\s++"
_SPACE = re.compile(r"\S(?= (?!\Z))")  # a lone space at the end belongs to the word before it
_SPACE_OR_LINE = re.compile(r"\S(?= (?!\Z))|\S\n(?=\w)")

_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend"}
_SPACES = " \u2581\u0120"  # a space as it is, and as SentencePiece and byte-level vocabularies write it
_TRIED_WORDS = """
a The king it's don't we'll 12 1234567 3.14 x1 0 00 end. end, so: so; what?! A.B.C. I ( (a) [b] {c} - -- — … _ a_b / a/b
* # ' " "quoted" “left” ’ <b> </b> &amp; @you $5 50% ~ `code` = == http://x.y/z?a=b \\n <|x|> é naïve ß
İ Σ e\u0301 ² ½ Ⅷ 世界 。 日本語 한국 ไทย नमस्ते عربي שלום 🙂 👍🏽
"""
_TRIED_ADDED = 64  # added tokens
_TRIED = (*_TRIED_WORDS.split(), "a\tb", "a\n\nb", "a  b", "a" * 40)


@dataclass(frozen=True, eq=False)
class Cuts:
    """How texts become stretches that are encoded apart."""

    stretch: re.Pattern[str] | None  # finds one stretch after the other; None: a text stays whole
    end: re.Pattern[str]  # ends where a text may be cut
    drops_space: bool  # the space in front of a stretch that is not the first: the tokenizer puts one before every text

    def words(self, text: str, most: int) -> Iterator[tuple[list[str], bool]]:
        """The stretches of a text, in lists of some `most` characters or more, each with whether it is the last."""
        if self.stretch is None:
            yield [text], True
            return
        start = 0
        while True:
            found = self.end.search(text, start + most) if len(text) - start > 2 * most else None
            stop = found.end() if found else len(text)
            block = text[start:stop] if (start, stop) != (0, len(text)) else text
            words = self.stretch.findall(block) or [""]
            if self.drops_space:
                words = [word.removeprefix(" ") if start or place else word for place, word in enumerate(words)]
            yield words, stop == len(text)
            if stop == len(text):
                return
            start = stop


WHOLE = Cuts(None, _SPACE, drops_space=False)
_WAYS = (
    Cuts(re.compile(_AT_LINES), _SPACE_OR_LINE, drops_space=False),
    Cuts(re.compile(_AT_SPACES), _SPACE, drops_space=False),
    Cuts(re.compile(_AT_SPACES), _SPACE, drops_space=True),
)


_FOUND: dict[bytes, Cuts] = {}  # by the digest of a tokenizer's content: a process opens the same one several times


def cuts_of(tokenizer: Tokenizer) -> Cuts:
    """Where `tokenizer` allows a text to be cut: at most places, or nowhere (WHOLE)."""
    content = tokenizer.to_str()
    digest = hashlib.sha256(content.encode()).digest()
    if digest not in _FOUND:
        _FOUND[digest] = _found(tokenizer, json.loads(content))
    return _FOUND[digest]


def _found(tokenizer: Tokenizer, parts: dict[str, Any]) -> Cuts:
    added = [token for token in parts.get("added_tokens") or [] if not token["special"]]  # special ones are text here
    if not _is_local(parts.get("normalizer")) or any(map(_crosses, added)):
        return WHOLE
    with name_panics("The tokenizer"):
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str("ab cd ef") if tokenizer.pre_tokenizer else []
    splits = len(pieces) >= 3
    if not splits and not _has_no_token_across_spaces(parts["model"]):
        return WHOLE
    # Behind an added token a text begins anew, and what a tokenizer puts before every text it may put there too.
    ways = [way for way in (_WAYS if splits else _WAYS[1:]) if not (way.drops_space and added)]
    names = [token["content"] for token in added[:_TRIED_ADDED]]
    try:
        return next((way for way in ways if _holds(way, tokenizer, names)), WHOLE)
    except ModelError:  # it fails on unknown words
        return WHOLE


def _is_local(normalizer: dict[str, Any] | None) -> bool:
    """Whether what it does to a character depends on no far one."""
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_is_local, normalizer["normalizers"]))
    if normalizer["type"] == "Replace":
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] in tuple(_SPACES))
    return normalizer["type"] in _LOCAL_NORMALIZERS


def _crosses(token: dict[str, Any]) -> bool:
    """Whether an added token may reach over a cut."""
    content = token["content"].translate(dict.fromkeys(map(ord, _SPACES), " "))
    return bool(token["lstrip"] or token["rstrip"] or re.search(r"\S\s|\s\S", content))


def _has_no_token_across_spaces(model: dict[str, Any]) -> bool:
    """Merges never cross a place that no token of the vocabulary crosses: its sides are independent of each other."""
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    across = re.compile(f"[^{_SPACES}][{_SPACES}]")
    return not any(across.search(token) for token in model["vocab"])


def _holds(way: Cuts, tokenizer: Tokenizer, added: Sequence[str]) -> bool:
    """Whether pairs of words of many kinds, and of these and `added` tokens, have the ids of the two, cut so."""
    pairs = [(left, right) for left in _TRIED for right in _TRIED]
    pairs += [pair for name in added for word in (*_TRIED[:8], name) for pair in ((name, word), (word, name))]
    texts = [f"{left} {right}" for left, right in pairs]
    if way.end is _SPACE_OR_LINE:
        texts += [f"{left}\n{right}" for left, right in pairs]
    cut = [words for text in texts for words, _ in way.words(text, len(text))]
    distinct = list(dict.fromkeys([*texts, *(word for words in cut for word in words)]))
    with name_panics("The tokenizer"):
        codes = tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
    ids = {text: code.ids for text, code in zip(distinct, codes, strict=True)}
    return all(ids[text] == [n for word in words for n in ids[word]] for text, words in zip(texts, cut, strict=True))
