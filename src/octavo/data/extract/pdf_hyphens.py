"""Joins words that a PDF breaks with a hyphen at the end of a line.

A hyphen may be the program's, which is removed, or the author's, as in "self-confident". The rest of the text decides:
whichever form of the word occurs in it. If neither does, the hyphen is removed if most of the halves at the line ends
of the document are no words, so that a program broke them, or if this half is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from octavo.data.extract.pdf_glyphs import HYPHEN_AT_BREAK

BREAK_HYPHEN = "\u2010"  # a hyphen that programs write at breaks only
_ENDS = ("-", BREAK_HYPHEN, HYPHEN_AT_BREAK)
_WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")
_LAST = re.compile(r"((?:[^\W\d_]|['’-])*[^\W\d_])[-\u2010\ufffe]\Z")
_FIRST = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_DASHES = ("--", "\u2014", "-\ufffe")
_DASH_JOINED = re.compile(r"\S(?:--|\u2014)\w")
_DASH_SPACED = re.compile(r"\S(?:--|\u2014) ")
_LEAST_BREAKS = 5  # line ends with a hyphen, from which on their halves show whether a program breaks words
_LEAST_SHARE = 0.45  # of them after halves that are no words: 0.7 and more where it does, 0.2 and less where not


class Hyphens:
    """Decides for each line end with a hyphen, from all lines of the document."""

    def __init__(self, lines: Iterable[tuple[str, str]]) -> None:
        """`lines` are (line, next line) pairs in reading order."""
        self._words: set[str] = set()
        broken: list[str] = []
        n_marked = n_joined = n_spaced = 0
        for line, following in lines:
            words = _WORD.findall(line.lower())
            n_joined += len(_DASH_JOINED.findall(line))
            n_spaced += len(_DASH_SPACED.findall(line))
            ends = line.endswith(_ENDS)
            self._words.update(words[:-1] if ends else words)
            if ends and (last := _LAST.search(line)) and following[:1].islower():
                broken.append(last[1].lower())
                n_marked += line.endswith(BREAK_HYPHEN)
        self._dash_joins = n_joined > n_spaced
        self._marks_breaks = n_marked > 2
        no_words = sum(word.rpartition("-")[2] not in self._words for word in broken)
        self._breaks_words = len(broken) >= _LEAST_BREAKS and no_words >= _LEAST_SHARE * len(broken)

    def joined(self, line: str, following: str, *, is_wrapped: bool = True) -> str | None:
        """`line` as it precedes `following` without a space; None if no word continues over the line end.

        Words with a dash between them continue only over the end of a line that is as long as its column.
        """
        if line.endswith("-") and following.startswith("-"):  # a dash of two hyphens, broken between them
            return line
        if line.endswith(_DASHES) and not line.endswith(tuple(f" {dash}" for dash in _DASHES)):
            return line if self._dash_joins and is_wrapped else None
        last, first = _LAST.search(line), _FIRST.match(following)
        if last is None or first is None:
            return None
        stem, mark = line[:-1], line[-1]
        whole, hyphenated = (last[1] + first[0]).lower(), f"{last[1]}-{first[0]}".lower()
        if hyphenated in self._words and whole not in self._words:
            return stem + "-"
        if first[0][0].isupper() and not last[1].isupper():
            return stem + "-"
        if whole in self._words or mark == BREAK_HYPHEN:
            return stem
        is_word = last[1].lower().rpartition("-")[2] in self._words
        return stem if not self._marks_breaks and (self._breaks_words or not is_word) else stem + "-"
