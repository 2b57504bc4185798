"""The site has every page, and its build finds links that lead nowhere and what is loaded from other servers."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield import_module("build_docs")
    sys.path.remove(str(ROOT / "tools"))


def pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from pages_of(part)


def test_every_page_is_in_the_navigation() -> None:
    settings = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    listed = list(pages_of(settings["nav"]))
    assert len(set(listed)) == len(listed)
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    assert set(listed) == {str(path.relative_to(ROOT)) for path in paths}
    assert settings["theme"]["font"] is False  # else the pages load fonts from Google


def test_links_of_the_pages_lead_to_files_and_headings_also_without_a_build(script: ModuleType) -> None:
    """What the strict build checks, for `make test`, which has no generator. In a viewer of the repository too."""
    wrong = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            if not target.exists() or (heading and heading not in headings(target)):
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
            staged = any(target.match(pattern) or target in ROOT.glob(pattern) for pattern in script.CONTENTS)
            if target.is_file() and not staged:
                wrong.append(f"{page.relative_to(ROOT)}: {link} is not on the site")
    assert not wrong


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown name them."""
    lines = page.read_text(encoding="utf-8").splitlines()
    texts = (re.sub(r"[^\w\s-]", "", line.lstrip("# ").lower()).strip() for line in lines if re.match(r"#+ ", line))
    return {re.sub(r"\s+", "-", text) for text in texts}


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<a href="b.html">b</a>', None),
        ('<a href="b.html#there">b</a> <a href="#here">h</a> <p id="here">', None),
        ('<a href="https://example.org">elsewhere is fine to link to</a>', None),
        ('<a href="c.html">c</a>', "a.html links to c.html, which does not exist"),
        ('<a href="b.html#gone">b</a>', "a.html links to b.html#gone, which has no such heading"),
        ('<script src="https://example.org/x.js"></script>', "a.html loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "a.html loads //example.org/x.css"),
        ('<img src="gone.png">', "a.html links to gone.png, which does not exist"),
    ],
)
def test_problems_of_a_built_page(script: ModuleType, tmp_path: Path, html: str, problem: str | None) -> None:
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h2 id="there">There</h2>')
    assert list(script.problems(tmp_path)) == ([problem] if problem else [])


def test_fonts_of_other_servers_in_a_style_sheet_are_found(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("@font-face { src: url(https://example.org/a.woff2) } p { background: url(b.png) }")
    assert list(script.problems(tmp_path)) == ["a.css loads https://example.org/a.woff2"]


def test_the_worker_of_another_server_is_replaced(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.html"
    page.write_text(f'<script src="{script.FOREIGN_WORKER}"></script>')
    (tmp_path / "worker.js").write_text("")
    script.without_foreign_worker(tmp_path)
    assert page.read_text() == '<script src="../worker.js"></script>'
    assert not list(script.problems(tmp_path))
