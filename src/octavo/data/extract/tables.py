"""Tables of Word and OpenDocument texts. A row is one line, with tabs between its cells."""

from __future__ import annotations

from octavo.data.extract.text import TextBuilder


class Tables:
    """The open tables of a document, whose rows go to `builder`; a table within a cell is text of this cell.

    A document may end what it has not begun: such an end is ignored.
    """

    def __init__(self, builder: TextBuilder) -> None:
        self._builder = builder
        self._open: list[list[list[str]]] = []  # the cells of the current row of each table, each of paragraphs
        self._first_row = False

    def begin_table(self) -> None:
        self._open.append([])
        self._first_row = True

    def begin_row(self) -> None:
        if self._open:
            self._open[-1] = []

    def begin_cell(self) -> None:
        if self._open:
            self._open[-1].append([])

    def take(self, text: str) -> bool:
        """Appends a paragraph to the current cell. Whether there is one."""
        if not (self._open and self._open[-1]):
            return False
        self._open[-1][-1].append(text)
        return True

    def end_row(self) -> None:
        if not self._open:
            return
        cells = [" ".join(" ".join(paragraphs).split()) for paragraphs in self._open[-1]]
        self._open[-1] = []
        if len(self._open) > 1 and self._open[-2]:
            self._open[-2][-1].append(" ".join(cells))  # a table within a cell
        elif any(cells):
            self._builder.add("\t".join(cells).rstrip("\t"), "\n\n" if self._first_row else "\n")
            self._first_row = False

    def end_table(self) -> None:
        if self._open:
            self._open.pop()
