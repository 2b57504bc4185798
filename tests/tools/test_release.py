"""The facts of a release that need no build: SECURITY.md, licenses, the plays, the files of the archives."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "LICENSE", "shakespeare/README.md", "py.typed", "shakespeare/test/hamlet.txt",
    *(f"shakespeare/train/{path.name}" for path in (ROOT / "src/octavo/shakespeare/train").glob("*.txt")),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _tools() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture
def contents() -> ModuleType:
    return import_module("release_contents")


@pytest.fixture
def release() -> ModuleType:
    return import_module("release")


def test_the_sources_can_be_released(contents: ModuleType) -> None:
    """If it fails because of SECURITY.md: `python tools/release.py --write`."""
    assert contents.source_problems() == []


def test_a_format_with_a_new_version_makes_the_page_old(contents: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert contents.security(page) == page
    monkeypatch.setattr(contents, "_format", lambda path: "7")
    assert "| run folder | 7 |" in contents.security(page)
    monkeypatch.setattr(contents, "version", lambda: "0.9.3")
    assert "| 0.9 | yes |" in contents.security(page)


def test_the_page_says_how_to_report_a_fault_without_a_persons_address(
    contents: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "**Report a vulnerability**" in page
    assert "@" not in page
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    for urls, address in (
        ("", ""),
        ('urls = { Site = "https://octavo.example" }', ""),
        ('urls = { Repository = "https://github.com/some/octavo.git" }', "https://github.com/some/octavo"),
    ):
        (tmp_path / "pyproject.toml").write_text(f"[project]\n{urls}\n")
        assert contents.repository() == address
        assert (f"({address}/security/advisories/new)" in contents.security(page)) == bool(address)


def test_files_of_others_need_a_license(contents: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare" / "train").mkdir(parents=True)
    (tmp_path / "shakespeare" / "README.md").write_text("hamlet.txt is in the public domain")
    (tmp_path / "shakespeare" / "train" / "hamlet.txt").write_text("Ham.")
    monkeypatch.setattr(contents, "SOURCE", tmp_path)
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    assert list(contents._vendored_problems()) == []
    (tmp_path / "chart.js").write_text("")
    (tmp_path / "words.txt").write_text("")
    (tmp_path / "shakespeare" / "train" / "other.txt").write_text("")
    found = "\n".join(contents._vendored_problems())
    assert "chart.js is not code of octavo" in found
    assert "words.txt has no license" in found
    assert "does not name the source and the license of other.txt" in found


def test_licenses_of_required_packages_are_looked_at(contents: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in contents.dependencies()]
    assert {"torch", "transformers", "typer"} <= set(names)
    assert "fastapi" not in names  # of an extra
    monkeypatch.setattr(contents, "dependencies", lambda: [("a", "MIT"), ("b", "AGPL-3.0")])
    assert ["AGPL-3.0" in problem for problem in contents._license_problems()] == [True]


@pytest.mark.parametrize("missing", [None, "LICENSE", "shakespeare/README.md", "shakespeare/test/hamlet.txt"])
def test_files_of_the_archives(contents: ModuleType, tmp_path: Path, missing: str | None) -> None:
    wheel, sdist = tmp_path / "a-0.1-py3-none-any.whl", tmp_path / "a-0.1.tar.gz"
    names = [f"a/{name}" for name in FILES if name != missing]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    with tarfile.open(sdist, "w:gz") as archive:
        for name in [*names, "a/README.md", "a/pyproject.toml"]:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    for path in (wheel, sdist):
        problems = contents.archive_problems(path)
        assert bool(problems) == (missing is not None)
        assert all(Path(missing or "").name in problem for problem in problems)


def test_an_sdist_with_some_of_the_tests_is_refused(contents: ModuleType, tmp_path: Path) -> None:
    """setuptools adds some by itself: MANIFEST.in removes them."""
    sdist = tmp_path / "a-0.1.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in [*(f"a/{name}" for name in FILES), "a/README.md", "a/pyproject.toml", "a/tests/test_cli.py"]:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert contents.archive_problems(sdist) == ["a-0.1.tar.gz has tests/test_cli.py"]


def test_an_interpreter_is_of_the_version_that_it_is_taken_for(release: ModuleType, tmp_path: Path) -> None:
    here = "{}.{}".format(*sys.version_info[:2])
    assert release._is(here, sys.executable)
    assert not release._is("3.99", sys.executable)
    shim = tmp_path / "python"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert not release._is(here, str(shim))
    assert release.interpreter("3.99", []) is None
    assert release.interpreter("3.99", ["3.99=/a/python"]) == "/a/python"


@pytest.mark.parametrize(("with_torch", "named"), [(True, "2.13.0+cpu"), (False, "none")])
def test_a_result_names_the_pytorch_that_the_smoke_test_ran_with(
    release: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_torch: bool, named: str
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> CompletedProcess[str]:
        commands.append(command)
        return CompletedProcess(command, 0, stdout="passed with PyTorch 2.13.0+cpu\n", stderr="")

    monkeypatch.setattr(release, "WORK", tmp_path)
    monkeypatch.setattr(release.subprocess, "run", run)
    result = release.test(tmp_path / "a-0.1.tar.gz", "3.14", "python3.14", with_torch=with_torch)
    assert (result.python, result.archive, result.torch, result.failure) == ("3.14", "sdist", named, "")
    assert commands[0][:3] == ["python3.14", "-m", "venv"]
    assert ("--without-torch" in commands[-1]) == (not with_torch)


@pytest.mark.parametrize(("arguments", "code"), [([], 1), (["--allow-missing"], 0)])
def test_a_missing_interpreter_is_listed_and_an_error_unless_it_is_allowed(
    release: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.setattr(release, "WORK", tmp_path)
    monkeypatch.setattr(release, "build", lambda dist: [])
    monkeypatch.setattr(release, "interpreter", lambda version, given: None if version == "3.14" else "python")
    monkeypatch.setattr(sys, "argv", ["release.py", *arguments])
    if code:
        with pytest.raises(SystemExit, match=r"Not tested: Python 3\.14\."):
            release.main()
    else:
        release.main()
    assert "| 3.14 | both | | NOT TESTED | |" in capsys.readouterr().out
