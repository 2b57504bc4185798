"""Where a text may be split before it is tokenized, so that the concatenated ids equal those of the whole text.

The tokenizer then gets segments, of which equal ones are encoded only once (data/encoding.py).

Most tokenizers either split a text at white space first (byte-level BPE with a pattern, WordPiece) or have no token
with white space inside (BPE converted from SentencePiece). Such a text may be split before a space that follows a
visible character, and mostly after a line break between two visible characters. `cuts_of` finds the split points that
a tokenizer allows from its configuration, and checks them on pairs of many kinds of words. If neither gives certainty,
a text is not split.
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

# A word with the spaces before it. It continues over other white space, and takes the white space that ends the text.
_AT_SPACES = r"\s*+\S++(?:[^\S ]\s*+\S++)*+(?:\s++\Z)?+|\s++"
# The same, but also ended after a single line break that a letter or digit follows.
_AT_LINES = r"\s*+\S++(?:(?!\n\w)[^\S ]\s*+\S++)*+(?:\n(?=\w)|\s++\Z)?+|\s++"
_SPACE = re.compile(r"\S(?= (?!\Z))")  # a lone space at the end belongs to the word before it
_SPACE_OR_LINE = re.compile(r"\S(?= (?!\Z))|\S\n(?=\w)")

_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend"}
_SPACES = " \u2581\u0120"  # the space in a text, in SentencePiece vocabularies ("▁") and in byte-level ones ("Ġ")
_TEST_WORDS = """
a The king it's don't we'll 12 1234567 3.14 x1 0 00 end. end, so: so; what?! A.B.C. I ( (a) [b] {c} - -- — … _ a_b / a/b
* # ' " "quoted" “left” ’ <b> </b> &amp; @you $5 50% ~ `code` = == http://x.y/z?a=b \\n <|x|> é naïve ß
İ Σ e\u0301 ² ½ Ⅷ 世界 。 日本語 한국 ไทย नमस्ते عربي שלום 🙂 👍🏽
"""
_MAX_TESTED_ADDED = 64  # of the added tokens only so many are tested
_TESTED = (*_TEST_WORDS.split(), "a\tb", "a\n\nb", "a  b", "a" * 40)


@dataclass(frozen=True, eq=False)
class Cuts:
    """One way to split a text into segments that are tokenized separately."""

    segment: re.Pattern[str] | None  # matches one segment after the other; None: a text is not split
    end: re.Pattern[str]  # matches the characters before a split point; finds one near a position without all segments
    drops_space: bool  # remove the space at the start of every segment but the first: the tokenizer adds one there

    def segments(self, text: str, block_characters: int) -> Iterator[tuple[list[str], bool]]:
        """Yields (segments of the next block of the text, whether it is the last block).

        A block is `block_characters` or a little more, up to the next split point; the last one may have twice as many.
        """
        if self.segment is None:
            yield [text], True
            return
        start = 0
        while True:
            is_long = len(text) - start > 2 * block_characters
            match = self.end.search(text, start + block_characters) if is_long else None
            stop = match.end() if match else len(text)
            block = text[start:stop] if (start, stop) != (0, len(text)) else text  # no copy of a whole text
            segments = self.segment.findall(block) or [""]
            if self.drops_space:
                segments = [part.removeprefix(" ") if start or n else part for n, part in enumerate(segments)]
            yield segments, stop == len(text)
            if stop == len(text):
                return
            start = stop


WHOLE = Cuts(None, _SPACE, drops_space=False)  # no split
_CANDIDATES = (  # the finest split first
    Cuts(re.compile(_AT_LINES), _SPACE_OR_LINE, drops_space=False),
    Cuts(re.compile(_AT_SPACES), _SPACE, drops_space=False),
    Cuts(re.compile(_AT_SPACES), _SPACE, drops_space=True),
)


_CACHE: dict[bytes, Cuts] = {}  # by the SHA-256 of a tokenizer's JSON: a process opens the same tokenizer several times


def cuts_of(tokenizer: Tokenizer) -> Cuts:
    """The split points that `tokenizer` allows: as many as possible, or none (WHOLE)."""
    content = tokenizer.to_str()
    digest = hashlib.sha256(content.encode()).digest()
    if digest not in _CACHE:
        _CACHE[digest] = _find_cuts(tokenizer, json.loads(content))
    return _CACHE[digest]


def _find_cuts(tokenizer: Tokenizer, parts: dict[str, Any]) -> Cuts:
    # Special tokens are text here: the tokenizer has encode_special_tokens set.
    added = [token for token in parts.get("added_tokens") or [] if not token["special"]]
    if not _is_local(parts.get("normalizer")) or any(map(_crosses, added)):
        return WHOLE
    with name_panics("The tokenizer"):
        words = tokenizer.pre_tokenizer.pre_tokenize_str("ab cd ef") if tokenizer.pre_tokenizer else []
    splits_at_spaces = len(words) >= 3
    if not splits_at_spaces and not _has_no_token_across_spaces(parts["model"]):
        return WHOLE
    # After an added token the tokenizer starts a new text, and may add there the space that it adds before each text.
    finest = 0 if splits_at_spaces else 1
    candidates = [cuts for cuts in _CANDIDATES[finest:] if not (cuts.drops_space and added)]
    names = [token["content"] for token in added[:_MAX_TESTED_ADDED]]
    try:
        return next((cuts for cuts in candidates if _keeps_ids(cuts, tokenizer, names)), WHOLE)
    except ModelError:  # the tokenizer fails on unknown words
        return WHOLE


def _is_local(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normalizer is known to change a character independently of distant characters."""
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_is_local, normalizer["normalizers"]))
    if normalizer["type"] == "Replace":
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] in tuple(_SPACES))
    return normalizer["type"] in _LOCAL_NORMALIZERS


def _crosses(token: dict[str, Any]) -> bool:
    """Whether an added token may match across a split point."""
    content = token["content"].translate(dict.fromkeys(map(ord, _SPACES), " "))
    return bool(token["lstrip"] or token["rstrip"] or re.search(r"\S\s|\s\S", content))


def _has_no_token_across_spaces(model: dict[str, Any]) -> bool:
    """Whether no token of a BPE vocabulary crosses a space. Then no merge does, and both sides are independent."""
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    across = re.compile(f"[^{_SPACES}][{_SPACES}]")
    return not any(across.search(token) for token in model["vocab"])


def _keeps_ids(cuts: Cuts, tokenizer: Tokenizer, added: Sequence[str]) -> bool:
    """Whether all pairs of test words and `added` tokens get the same ids whole and split by `cuts`."""
    pairs = [(left, right) for left in _TESTED for right in _TESTED]
    pairs += [pair for name in added for word in (*_TESTED[:8], name) for pair in ((name, word), (word, name))]
    texts = [f"{left} {right}" for left, right in pairs]
    if cuts.end is _SPACE_OR_LINE:
        texts += [f"{left}\n{right}" for left, right in pairs]
    split = [segments for text in texts for segments, _ in cuts.segments(text, len(text))]
    distinct = list(dict.fromkeys([*texts, *(part for segments in split for part in segments)]))
    with name_panics("The tokenizer"):
        encodings = tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
    ids = {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}
    return all(ids[text] == [n for part in parts for n in ids[part]] for text, parts in zip(texts, split, strict=True))
