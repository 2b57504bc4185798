"""Builds the documentation site: `make docs`, or `python tools/build_docs.py` where zensical is installed.

The pages are staged in build/docs with the paths that they have in the repository, so that links between README.md,
docs/, benchmarks/ and the other pages hold on the site as they do in a viewer of the repository. A link that leads
nowhere, and anything that a page would load from another server, ends the build with an error.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
STAGED = ROOT / "build" / "docs"
SITE = ROOT / "site"
# What the pages are and what they link to, as globs from the root of the repository.
CONTENTS = (
    "*.md", "LICENSE", "docs/**/*.md", "docs/images/*.png", "benchmarks/README.md", "benchmarks/*.csv",
    "notebooks/*.ipynb", "src/octavo/shakespeare/README.md",
)  # fmt: skip
FOREIGN_WORKER = "https://unpkg.com/iframe-worker/shim"
OWN_WORKER = "worker.js"
_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LOADING_LINKS = {
    "stylesheet",
    "icon",
    "preconnect",
    "dns-prefetch",
    "preload",
    "prefetch",
    "modulepreload",
    "manifest",
}
_CSS_URL = re.compile(r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)")


def stage(root: Path, staged: Path) -> None:
    """Copies the pages to `staged`, with their paths."""
    shutil.rmtree(staged, ignore_errors=True)
    for pattern in CONTENTS:
        for path in sorted(root.glob(pattern)):
            target = staged / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for path in (root / "docs" / "site").iterdir():
        shutil.copyfile(path, staged / path.name)


class _Page(HTMLParser):
    """The anchors, links and loaded addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in _LOADED and _LOADED[tag] in values:
            self.loaded.append(values[_LOADED[tag]])
        if tag == "link" and _LOADING_LINKS & set(values.get("rel", "").split()):
            self.loaded.append(values.get("href", ""))


def problems(site: Path) -> Iterator[str]:
    """Links to files or anchors that do not exist, and addresses of other servers that a page or style sheet loads."""
    pages = {path.resolve(): _read(path) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        yield from (f"{name} loads {address}" for address in page.loaded if urlsplit(address).netloc)
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not (parts.path or parts.fragment):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                yield f"{name} links to {link}, which does not exist"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links to {link}, which has no such heading"
    for path in site.rglob("*.css"):
        found = _CSS_URL.findall(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(site)} loads {address}" for address in found)


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def without_foreign_worker(site: Path) -> None:
    """Replaces the script with which zensical searches a site that is opened from files: it is on another server."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        own = "../" * (len(path.relative_to(site).parts) - 1) + OWN_WORKER
        path.write_text(text.replace(f'src="{FOREIGN_WORKER}"', f'src="{own}"'), encoding="utf-8")


def main() -> None:
    stage(ROOT, STAGED)
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    built = subprocess.run(command, cwd=ROOT, check=False)
    if built.returncode:
        sys.exit(built.returncode)
    without_foreign_worker(SITE)
    found = list(problems(SITE))
    if found:
        sys.exit("\n".join(found))
    pages = sum(1 for _ in SITE.rglob("*.html"))
    print(f"{pages} pages in {SITE.relative_to(ROOT)}; open {SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
