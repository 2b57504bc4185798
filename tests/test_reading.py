"""docs/reading.md names files and definitions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "octavo"
TEXT = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")


def paths() -> list[str]:
    return re.findall(r"`([a-z0-9_/]+\.py)`", TEXT)


def defined(path: Path) -> set[str]:
    """Names of all functions and classes of a file, and of attributes in its classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return names


def test_all_files_exist_and_there_are_thirteen_stops() -> None:
    missing = [path for path in paths() if not (PACKAGE / path).is_file()]
    assert not missing
    assert len(re.findall(r"^\d+\. \*\*`", TEXT, re.MULTILINE)) == 13


def test_all_names_are_defined_in_the_files_of_their_paragraph() -> None:
    checked = 0
    for step in re.split(r"\n(?=\d+\. \*\*|## )", TEXT)[1:]:
        files = [PACKAGE / path for path in re.findall(r"`([a-z0-9_/]+\.py)`", step)]
        names = set().union(*(defined(file) for file in files))
        for word in re.findall(r"`(_?[A-Za-z]\w*(?:\.\w+)?)`s?", step):
            if not word.endswith(".py") and files:
                assert set(word.split(".")) <= names, (word, [file.name for file in files])
                checked += 1
    assert checked > 25
