"""Every command and every Python block of the documentation is executed, with a tiny model in place of SmolLM2.

The blocks of a page run in order in a folder with a few texts. Where one uses `runs/mine` before the page has trained
it, a small run is there. What needs a GPU, a download or a running server has a comment before it in the page, with one
of REASONS: its options are parsed and its Python is compiled all the same.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import Octavo
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands

# Pages whose code another test executes.
ELSEWHERE = {
    "docs/python-api.md": "tests/api/test_document.py",
    "docs/adding-a-model.md": "tests/models/test_adding_a_model.py",
}
# Pages whose blocks are executed by `make test`; those of the others by `make test-all`.
FIRST = ("README.md",)
REASONS = {
    "downloads a model": 3,
    "a server runs until it is stopped": 2,
    "needs a running server": 1,
    "needs such a model": 1,
    "needs data sets of the hub, or tasks of your own": 2,
    "searches for half an hour": 1,
}  # reason -> how many blocks may have it
LANGUAGES = {"sh", "python", "yaml", "jsonl", ""}
DATA = {"yaml", "jsonl"}  # blocks that are files; those without a language are formulas and lists
ALL_BLOCKS = [block for page in PAGES if str(page.relative_to(ROOT)) not in ELSEWHERE for block in blocks(page)]
EXECUTED = sorted({block.page for block in ALL_BLOCKS if block.language in ("sh", "python") and not block.not_run})


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_every_block_has_a_language_that_is_executed_or_is_a_file() -> None:
    assert not [block.where for block in ALL_BLOCKS if block.language not in LANGUAGES]
    assert not [block.where for block in ALL_BLOCKS if (block.language in DATA) != bool(block.title)]
    plain = [block for block in ALL_BLOCKS if not block.language]
    looks_executable = re.compile(r"^(\$ |%|!|import |octavo |python |pip |make |from \w+ import )", re.MULTILINE)
    assert not [block.where for block in plain if looks_executable.search(block.code)]


def test_the_reasons_for_not_running_a_block_are_known_and_few() -> None:
    reasons = [block.not_run for block in ALL_BLOCKS if block.not_run]
    assert {reason: reasons.count(reason) for reason in {*reasons}} == REASONS


def test_pages_that_another_test_executes_are_named_there() -> None:
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", [pytest.param(b, id=b.where) for b in ALL_BLOCKS if b.not_run])
def test_what_is_not_run_has_options_that_exist_and_python_that_compiles(
    block: Block, octavo: Octavo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(block.page)
    if block.language == "python":
        compile(block.code, block.where, "exec")
        return
    for words in commands(block):
        if words[0] != "octavo":
            check_other(words)
            continue
        outcome = octavo(*words[1:], "--print-config")
        assert outcome.code == 0, (block.where, words, outcome.err)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=() if name_of(page) in FIRST else pytest.mark.exhaustive)
        for page in EXECUTED
    ],
)
def test_the_blocks_of_a_page_run(
    page: Path, octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("octavo.server.serve.serve", lambda config, report, *, listening: None)  # its options are read
    prepare(page, octavo, tiny_llama, plays, tmp_path)
    names: dict[str, Any] = {"__name__": "document"}
    for block in blocks(page):
        if block.not_run or block.language not in ("sh", "python"):
            continue
        if block.language == "python":
            exec(compile(with_model(block.code, tiny_llama), block.where, "exec"), names)  # noqa: S102
            continue
        for words in commands(block):
            if words[0] != "octavo":
                check_other(words)
                continue
            outcome = octavo(*with_default_model(words[1:], tiny_llama), stdin=b"The king\n")
            assert outcome.code == 0, (block.where, words, outcome.err)


def prepare(page: Path, octavo: Octavo, tiny_llama: Path, plays: Path, folder: Path) -> None:
    """The files that the page speaks of: my-texts/, held-out.txt, blocks with a title, and runs/mine."""
    shutil.copytree(plays / "train", folder / "my-texts")
    shutil.copy(next((plays / "test").iterdir()), folder / "held-out.txt")
    write_files(page)
    words = [
        words for block in blocks(page) if block.language == "sh" and not block.not_run for words in commands(block)
    ]
    first = next((one for one in words if any("runs/mine" in word for word in one)), None)
    if first is not None and (first[1] != "finetune" or "--resume" in first):
        steps = 100 if any("runs/mine@100" in word for one in words for word in one) else 4
        outcome = octavo(
            "finetune", "--model", tiny_llama, "--data", "my-texts", "--out", "runs/mine", "--seq-len", 32,
            "--steps", steps, "--eval-every", steps,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err


def write_files(page: Path) -> None:
    """Blocks with a title, as files of that name. The YAML files name options that exist, with valid values."""
    for block in blocks(page):
        if block.title:
            Path(block.title).write_text(block.code, encoding="utf-8")
            if block.language == "yaml":
                assert isinstance(yaml.safe_load(block.code), dict)


def with_model(code: str, model: Path) -> str:
    return code.replace('"smollm2"', repr(str(model)))


def with_default_model(words: Sequence[str], model: Path) -> list[str]:
    """The words of a command with the tiny model in place of SmolLM2, whether it is named or the default."""
    named = [str(model) if word == "smollm2" else word for word in words]
    if words[0] in ("models", "runs", "compare", "adapters") or "--model" in words or "--resume" in words:
        return named
    return [named[0], "--model", str(model), *named[1:]]


def check_other(words: Sequence[str]) -> None:
    """A command of another program: its targets, extras and files exist."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif words[0] in ("pip", "pipx"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        named = re.findall(r"(?:octavo|\.)\[([\w,]+)\]", " ".join(words))
        assert set(",".join(named).split(",")) - {""} <= set(extras), words
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        assert words[0] == "curl", words
