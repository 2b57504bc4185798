"""The pages of the documentation and their fenced blocks of code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Every page but the log, whose commands are those of former versions.
PAGES = sorted({ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "log.md"})
_FENCE = re.compile(r"^(?P<marks>```+)(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=marks)$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]+?) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block. `title` is the name of the file that it is; `not_run` the reason why it is not executed."""

    page: Path
    line: int
    language: str
    title: str
    code: str
    not_run: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        reason = _NOT_RUN.search(text[: match.start()])
        found.append(
            Block(
                page,
                text.count("\n", 0, match.start()) + 1,
                language,
                title[1] if title else "",
                match["code"],
                reason["reason"] if reason else "",
            )
        )
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block in the language sh; a line that ends with a backslash goes on."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
