"""Collects the text of one document, with the places at which its pages or chapters begin."""

from __future__ import annotations

import re
from collections import Counter

from octavo.bounded_json import shortened
from octavo.data.raw_records import RawRecord

# Typographic ligatures, and the letters that they stand for. NFKC would also change fractions and superscripts.
_LIGATURES = dict(zip(range(0xFB00, 0xFB07), ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True))
# Characters that mark a possible break within a word, and that no reader sees.
_INVISIBLE = dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF))
_TITLE_CHARACTERS = 60


def clean(text: str) -> str:
    """`text` with ligatures as letters, and without soft hyphens and other invisible marks."""
    return text.translate(_LIGATURES | _INVISIBLE)


class TextBuilder:
    """Paragraphs of a document in reading order, its footnotes, and counts of what is not in its text."""

    def __init__(self) -> None:
        self.removed: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self._parts: list[str] = []
        self._length = 0
        self._notes: list[str] = []
        self._positions: list[tuple[int, str]] = []
        self._begins: list[str] = []  # names of the parts that begin with the next paragraph
        self._chapters = 0

    def add(self, text: str, gap: str = "\n\n") -> None:
        """Appends a paragraph or a row of a table, `gap` after the text before it. Blank text is left out."""
        text = re.sub(r"\n{3,}", "\n\n", clean(text)).strip("\n ")
        if text.strip():
            gap = gap if self._parts else ""
            self._positions += [(self._length + len(gap), name) for name in self._begins]
            self._begins.clear()
            text = gap + text
            self._parts.append(text)
            self._length += len(text)

    def note(self, text: str) -> None:
        """Appends a footnote to those that follow the text."""
        if text.strip():
            self._notes.append(clean(text).strip())

    def chapter(self, title: str = "") -> None:
        """The next paragraph begins a chapter."""
        self._chapters += 1
        title = shortened(" ".join(title.split()), _TITLE_CHARACTERS)
        self.position(f"chapter {self._chapters}" + (f" ({title})" if title else ""))

    def position(self, name: str) -> None:
        """The next paragraph begins the part of the document that errors and samples call `name`."""
        self._begins.append(name)

    def record(self, n_bytes: int) -> RawRecord:
        """The document as a record. Its value is "" if it holds no text."""
        if self._notes:
            self.position("footnotes")
        for note in self._notes:
            self.add(note)
        return RawRecord(
            1,
            "".join(self._parts),
            n_bytes,
            positions=tuple(self._positions),
            removed=dict(+self.removed),
            unread=dict(+self.unread),
        )
