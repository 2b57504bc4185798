"""reStructuredText (.rst): the text without its markup, as docutils displays it.

Directives with text, such as notes, keep it; images, code of Sphinx (toctree, include) and comments are left out and
counted. Nothing that a directive names is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from octavo.data.extract.front_matter import front_matter
from octavo.data.extract.text import TextBuilder
from octavo.data.files import FileSection, decode, name_of, sections
from octavo.data.raw_records import RawRecord

_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*\Z")
_EXPLICIT = re.compile(r"\.\.(?:\s|\Z)")
_NOTE = re.compile(r"\.\. \[(?:#?[\w.-]*|\*)\](?:\s+|\Z)")
_DIRECTIVE = re.compile(r"\.\. (?:\|[^|]+\| )?([\w:.-]+)::\s*(.*)")
_FIELD = re.compile(r":[^:\s][^:]*:(?:\s|\Z)")
_OPTION = re.compile(r"\s+:[\w-]+:")
_TEXT_DIRECTIVES = {
    *("note", "warning", "tip", "hint", "important", "caution", "danger", "attention", "error", "admonition", "topic"),
    *("sidebar", "epigraph", "highlights", "pull-quote", "compound", "container", "rubric", "parsed-literal"),
    "line-block",
    *("table", "seealso", "versionadded", "versionchanged", "centered", "code", "code-block", "sourcecode", "math"),
}
_NO_ARGUMENT = {"code", "code-block", "sourcecode", "container"}  # whose argument is no text
_LINE_BLOCK = re.compile(r"\|(?: (.*)|\Z)")
_ITEM = re.compile(r"\s*(?:[*+•-]|#\.|\(?\w{1,3}[.)])\s")
_GRID = re.compile(r"\+[-=+]+\+\s*\Z")
_SIMPLE = re.compile(r"=+(?: +=+)+\s*\Z")
_INLINE = (
    (re.compile(r"\s?\[(?:#?[\w.-]*|\*)\]_(?!\w)"), "footnote mark", ""),
    (re.compile(r"(?<![\w`])``(.+?)``(?![\w`])", re.DOTALL), "", r"\1"),
    (re.compile(r"(?::[\w:+.-]+:)?`([^`<]+?)\s*<[^`>]*>`_{0,2}"), "", r"\1"),
    (re.compile(r":[\w:+.-]+:`~?([^`]+)`"), "", r"\1"),
    (re.compile(r"`([^`]+)`_{0,2}"), "", r"\1"),
    (re.compile(r"(?<![\w*])\*\*(\S(?:.*?\S)?)\*\*(?![\w*])", re.DOTALL), "", r"\1"),
    (re.compile(r"(?<![\w*\\])\*(\S(?:[^*]*?[^\s*\\])?)\*(?![\w*])"), "", r"\1"),
    (re.compile(r"(?<!\w)\|(\S[^|\n]*?)\|_{0,2}(?!\w)"), "", r"\1"),
    (re.compile(r"(?<=\w)__?(?![\w`])"), "", ""),
    (re.compile(r"\\(\s)"), "", ""),
    (re.compile(r"\\(.)"), "", r"\1"),
)


def read_rst(path: Path, split_on: str | None) -> Iterator[RawRecord]:
    """The text of the file as one record; its positions are the chapters that titles begin."""
    source = name_of(path)
    for section in sections(path, None):
        builder = TextBuilder()
        start = front_matter(section.data)
        builder.removed["front matter"] += bool(start)
        data = FileSection(1, start, section.data[start:])
        text = decode(data, source).replace("\r\n", "\n").replace("\r", "\n").expandtabs(8)
        _Reader(builder).read(text.split("\n"))
        yield builder.record(len(section.data))


class _Reader:
    """Reads lines into a TextBuilder, block by block."""

    def __init__(self, builder: TextBuilder) -> None:
        self._builder = builder
        self._adornments: list[str] = []  # of titles, those of the highest level first

    def read(self, lines: Sequence[str], *, is_nested: bool = False) -> None:
        """The blocks of a document, or of the body of a directive."""
        at = self._docinfo(lines) if not is_nested else 0
        while at < len(lines):
            if not lines[at].strip():
                at += 1
            elif (after := self._title(lines, at)) or (after := self._table(lines, at)):
                at = after
            elif _EXPLICIT.match(lines[at]) or lines[at].startswith("__ "):
                at = self._explicit(lines, at)
            elif _LINE_BLOCK.match(lines[at]):
                at = self._line_block(lines, at)
            else:
                at = self._paragraph(lines, at)

    def _plain(self, text: str) -> str:
        for pattern, kind, replacement in _INLINE:
            text, count = pattern.subn(replacement, text)
            if kind:
                self._builder.removed[kind] += count
        return text

    def _docinfo(self, lines: Sequence[str]) -> int:
        """Skips fields such as `:author:` before the text or after the title, which is added."""
        at = next((index for index, line in enumerate(lines) if line.strip()), len(lines))
        after = self._title(lines, at) or at
        start = next((index for index in range(after, len(lines)) if lines[index].strip()), len(lines))
        end = start
        while end < len(lines) and (_FIELD.match(lines[end]) or (end > start and lines[end].startswith(" "))):
            end += 1
        self._builder.removed["front matter"] += end > start
        return end if end > start else after

    def _title(self, lines: Sequence[str], at: int) -> int:
        """The index after a title with a line of punctuation under it, or over and under it; 0 for none."""
        over = _ADORNMENT.match(lines[at])
        text_at = at + 1 if over else at
        if text_at + 1 >= len(lines) or not lines[text_at].strip() or (not over and lines[text_at].startswith(" ")):
            return at + 1 if over and not _SIMPLE.match(lines[at]) else 0  # a line of punctuation alone
        under = _ADORNMENT.match(lines[text_at + 1])
        text = lines[text_at].strip()
        if not under or len(lines[text_at + 1].rstrip()) < min(4, len(text)):
            return 0
        if over and over[1] != under[1]:
            return 0
        key = under[1] + ("^" if over else "")
        if key not in self._adornments:
            self._adornments.append(key)
        text = self._plain(text)
        if self._adornments.index(key) < 3:  # the title of the document, chapters, and sections
            self._builder.chapter(text)
        self._builder.add(text)
        return text_at + 2

    def _explicit(self, lines: Sequence[str], at: int) -> int:
        """A footnote, directive, target, substitution or comment."""
        end = _block_end(lines, at)
        block = lines[at:end]
        if note := _NOTE.match(block[0]):
            body = [block[0][note.end() :], *_dedented(block[1:])]
            self._builder.note(self._plain(" ".join(line.strip() for line in body if line.strip())))
        elif directive := _DIRECTIVE.match(block[0]):
            self._directive(directive[1].lower(), directive[2], block[1:])
        elif not re.match(r"\.\. _|__ ", block[0]):
            self._builder.removed["comment"] += 1
        return end

    def _directive(self, name: str, argument: str, body: Sequence[str]) -> None:
        if name not in _TEXT_DIRECTIVES:
            self._builder.removed[f"directive of {name}"] += 1
            return
        first = 0
        while first < len(body) and _OPTION.match(body[first]):
            first += 1
        if argument and name not in _NO_ARGUMENT:
            self._builder.add(self._plain(argument))
        if name in ("code", "code-block", "sourcecode", "math"):
            self._builder.add("\n".join(_dedented(body[first:])))
        else:
            self.read(_dedented(body[first:]), is_nested=True)

    def _line_block(self, lines: Sequence[str], at: int) -> int:
        parts: list[str] = []
        while at < len(lines) and (_LINE_BLOCK.match(lines[at]) or (lines[at].startswith(" ") and lines[at].strip())):
            match = _LINE_BLOCK.match(lines[at])
            if match:
                parts.append((match[1] or "").strip())
            else:
                parts[-1] += f" {lines[at].strip()}"
            at += 1
        self._builder.add(self._plain("\n".join(parts)))
        return at

    def _paragraph(self, lines: Sequence[str], at: int) -> int:
        """Lines up to a blank one, joined; after `::` follows a literal block."""
        end = at + 1
        is_item = _ITEM.match(lines[at])
        while end < len(lines) and lines[end].strip() and not (is_item and _ITEM.match(lines[end])):
            end += 1
        first = lines[at].strip()
        text = " ".join(line.strip() for line in lines[at:end])
        if text.endswith("::"):
            text = "" if text == "::" else text[:-1]
            self._builder.add(self._plain(text))
            literal = _block_end(lines, end - 1)
            self._builder.add("\n".join(_dedented(lines[end:literal])))
            return literal
        text = text if first.startswith(">>>") else self._plain(text)
        self._builder.add(re.sub(r"\A(?:[*+•-]|#\.)\s+", "", text))
        return end

    def _table(self, lines: Sequence[str], at: int) -> int:
        """The index after a table, whose rows become lines with tabs; 0 for none."""
        if not (_GRID.match(lines[at]) or _SIMPLE.match(lines[at])):
            return 0
        is_grid = bool(_GRID.match(lines[at]))
        end = at + 1
        while end < len(lines) and lines[end].strip():
            end += 1
        rows = _grid_rows(lines[at:end]) if is_grid else _simple_rows(lines[at:end])
        for number, row in enumerate(rows):
            self._builder.add(self._plain("\t".join(row)), "\n" if number else "\n\n")
        return end


def _grid_rows(lines: Sequence[str]) -> Iterator[list[str]]:
    cells: list[list[str]] = []
    for line in lines:
        if _GRID.match(line) or line.startswith("+"):
            if any(any(cell) for cell in cells):
                yield [" ".join(filter(None, cell)) for cell in cells]
            cells = []
            continue
        parts = [part.strip() for part in line.strip().strip("|").split("|")]
        cells = cells or [[] for _ in parts]
        for cell, part in zip(cells, parts, strict=False):
            cell.append(part)


def _simple_rows(lines: Sequence[str]) -> Iterator[list[str]]:
    spans = [match.span() for match in re.finditer(r"=+", lines[0])]
    spans = [(begin, following[0]) for (begin, _), following in zip(spans, [*spans[1:], (10**9, 0)], strict=True)]
    row: list[str] = []
    for line in lines[1:]:
        if re.match(r"[= ]+\Z|[- ]+\Z", line):
            continue
        cells = [line[begin:end].strip() for begin, end in spans]
        if cells[0] or not row:  # a row without a first cell continues the row before it
            if row:
                yield row
            row = cells
        else:
            row = [f"{old} {new}".strip() for old, new in zip(row, cells, strict=True)]
    if row:
        yield row


def _block_end(lines: Sequence[str], at: int) -> int:
    """The index after the indented lines that follow line `at`."""
    end = at + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    return end


def _dedented(lines: Sequence[str]) -> list[str]:
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    return [line[min(indents, default=0) :] for line in lines]
