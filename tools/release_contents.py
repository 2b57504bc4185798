"""What a release must contain: SECURITY.md with current facts, licenses, and the sources of the plays."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import metadata
from pathlib import Path
from typing import cast

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "octavo"
PLAYS = SOURCE / "shakespeare"
# Written formats: (title, file with `FORMAT = n`).
FORMATS = (
    ("run folder", "runs/folder.py"),
    ("training checkpoint", "runs/checkpoint_folder.py"),
    ("adapter (octavo.json)", "store/peft.py"),
    ("manifest of a model folder", "store/manifest.py"),
    ("int8, nf4, nf4-double and dynamic8 weights", "store/contents.py"),
)
# Files of another author that the package has: (pattern below src/octavo, what they are, license, where it is written).
VENDORED = (("shakespeare/*/*.txt", "seven plays by William Shakespeare", "public domain", "shakespeare/README.md"),)
OWN_TEXTS = ("general_text/documents.txt",)  # written for octavo, under its license
# Suffixes of files that would be vendored code, fonts or pictures: octavo's package has none.
FOREIGN = (".js", ".css", ".woff", ".woff2", ".ttf", ".svg", ".png", ".ico", ".so", ".dll", ".dylib", ".ipynb")
# Beginnings of licenses under which a required package may be, as its metadata words them.
ACCEPTED = ("MIT", "Apache", "BSD", "PSF", "Python Software Foundation", "ISC", "MPL-2.0", "Mozilla Public License 2.0")
REQUIRED_FILES = ("LICENSE", "shakespeare/README.md", "py.typed", "shakespeare/test/hamlet.txt")


def version() -> str:
    """octavo's version."""
    return str(re.findall(r'__version__ = "([^"]+)"', (SOURCE / "_version.py").read_text(encoding="utf-8"))[0])


def security(page: str) -> str:
    """SECURITY.md with its versions, formats and contact as the code and pyproject.toml have them."""
    minor = ".".join(version().split(".")[:2])
    formats = [f"| {title} | {_format(path)} |" for title, path in FORMATS]
    tables = {
        "versions": f"| version | fixes of security faults |\n|---|---|\n| {minor} | yes |\n| earlier | no |",
        "contact": _contact(repository()),
        "formats": "\n".join(["| written | version |", "|---|---|", *formats]),
    }  # fmt: skip
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert page.count(begin) == page.count(end) == 1, name
        page = page[: page.index(begin) + len(begin)] + f"{table}\n" + page[page.index(end) :]
    return page


def repository() -> str:
    """The address of the repository on GitHub, from the URLs of pyproject.toml; "" if they have none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = [str(url).rstrip("/").removesuffix(".git") for url in project.get("urls", {}).values()]
    return next((url for url in urls if re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url)), "")


def _contact(url: str) -> str:
    """How a fault is reported: the private reports of GitHub, which need no address of a person."""
    page = f"[octavo's repository]({url})" if url else "the GitHub repository that you have octavo from"
    form = f" ([the form]({url}/security/advisories/new))" if url else ""
    return (
        f"Report it privately, not in a public issue: open the tab **Security** of {page}\n"
        f"and choose **Report a vulnerability**{form}. Only its maintainers can read the report, and they answer in it."
    )


def _format(path: str) -> str:
    return str(re.findall(r"^FORMAT = (\d+)", (SOURCE / path).read_text(encoding="utf-8"), re.MULTILINE)[0])


def source_problems() -> list[str]:
    """What is wrong with the sources of a release."""
    return [*_page_problems(), *_vendored_problems(), *_license_problems()]


def _page_problems() -> Iterator[str]:
    page = ROOT / "SECURITY.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not text:
        yield "SECURITY.md is missing."
    elif security(text) != text:
        yield "SECURITY.md has other versions or another contact than the code: python tools/release.py --write"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"## {version()}" not in changes and "## Unreleased" not in changes:
        yield f"CHANGELOG.md has no section for {version()}."


def _vendored_problems() -> Iterator[str]:
    known = {path for pattern, *_ in VENDORED for path in SOURCE.glob(pattern)} | {SOURCE / name for name in OWN_TEXTS}
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix in FOREIGN:
            yield f"{path.relative_to(ROOT)} is not code of octavo: list it in VENDORED with its license."
        if path.suffix == ".txt" and path not in known:
            yield f"{path.relative_to(ROOT)} has no license: list it in VENDORED."
    for pattern, _, _, where in VENDORED:
        text = (SOURCE / where).read_text(encoding="utf-8")
        unnamed = [path.name for path in SOURCE.glob(pattern) if path.name not in text]
        if unnamed or "public domain" not in text:
            yield f"{where} does not name the source and the license of {', '.join(unnamed) or pattern}."


def _license_problems() -> Iterator[str]:
    for name, license_name in dependencies():
        if not license_name.startswith(ACCEPTED):
            yield f"The required package {name} has the license {license_name!r}, which is not in ACCEPTED."


def requirements() -> list[str]:
    """What octavo requires without extras, as in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [str(one) for one in project["dependencies"]]


def dependencies() -> list[tuple[str, str]]:
    """(name, license) of each package that octavo requires, without extras, from the metadata of those installed."""
    names = sorted(re.split(r"[^\w.-]", one)[0] for one in requirements())
    return [(name, _license(name)) for name in names]


def _license(name: str) -> str:
    found = cast(Message, metadata(name))
    classifiers = [
        one.rpartition(" :: ")[2] for one in found.get_all("Classifier") or [] if one.startswith("License ::")
    ]
    short = (found.get("License") or "").strip().splitlines()[:1]
    candidates = [found.get("License-Expression") or "", *(one for one in short if len(one) < 60), *classifiers]
    return next((one for one in candidates if one), "not stated").removesuffix(" License")


def license_table() -> str:
    """A Markdown table of what the archives contain of others, and of what they require."""
    lines = ["\n| what | license | where |", "|---|---|---|", "| octavo | Apache-2.0 | LICENSE, in both archives |"]
    lines += [f"| {title} | {name} | {where}, in both archives |" for _, title, name, where in VENDORED]
    lines += [f"| {name} | {license_name} | required, not contained |" for name, license_name in dependencies()]
    return "\n".join(lines) + "\n"


def archives(dist: Path) -> list[Path]:
    """The wheel and the sdist of a folder."""
    found = [*dist.glob("*.whl"), *dist.glob("*.tar.gz")]
    assert len(found) == 2, found
    return found


def archive_problems(archive: Path) -> list[str]:
    """Files that an archive lacks, or has and should not have."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
    else:
        with tarfile.open(archive) as sdist:
            names = sdist.getnames()
    problems = [
        f"{archive.name} has no {wanted}"
        for wanted in REQUIRED_FILES
        if not any(name.endswith(f"/{wanted}") for name in names)
    ]
    if archive.suffix != ".whl":
        top = {name.partition("/")[2] for name in names}
        problems += [f"{archive.name} has no {one}" for one in ("README.md", "pyproject.toml") if one not in top]
        # setuptools adds tests/test*.py by itself, without the files that they need.
        problems += [f"{archive.name} has {one}" for one in sorted(top) if one.startswith("tests/")]
    plays = sorted(path.name for path in PLAYS.glob("*/*.txt"))
    problems += [
        f"{archive.name} has no {play}" for play in plays if not any(name.endswith(f"/{play}") for name in names)
    ]
    problems += [
        f"{archive.name} has {name}" for name in names if "__pycache__" in name or name.endswith((".pyc", ".ipynb"))
    ]
    return problems
