"""docs/cli.md has the options of all commands, and docs/troubleshooting.md messages of the code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
from tests.docs.pages import PAGES, ROOT, blocks, commands


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield import_module("cli_reference")
    sys.path.remove(str(ROOT / "tools"))


def test_the_reference_is_current(script: ModuleType) -> None:
    """If it fails: `python tools/cli_reference.py`."""
    assert script.PAGE.read_text(encoding="utf-8") == script.reference()


def test_the_reference_has_every_flag_of_every_command_and_no_brackets_of_the_terminal(script: ModuleType) -> None:
    import typer

    from octavo.cli import app

    text = script.PAGE.read_text(encoding="utf-8")
    for name, command in script.commands(typer.main.get_command(app)):
        section = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        flags = {one.opts[0] for one in command.params if one.param_type_name == "option"} - {"--help"}
        assert flags == set(re.findall(r"^\| \**`(--[a-z0-9-]+)`", section, re.MULTILINE)), name
    assert "[default" not in text
    assert "\\[" not in text


def test_options_in_running_text_exist(script: ModuleType) -> None:
    """Every `--option` of a page, in text or in a command, is one of octavo's or of a program that is named here."""
    import typer

    from octavo.cli import app

    known = {"--help", "--version", "--no-deps", "--index-url", "--user", "--gpus", "--families", "--only", "--site"}
    known |= {"--suite", "--server", "--ulimit", "--query-gpu", "--format"}  # of the benchmarks, docker, nvidia-smi
    for _, command in script.commands(typer.main.get_command(app)):
        for option in command.params:
            known |= {*option.opts, *option.secondary_opts}
    for page in PAGES:
        if "design" in page.parts:
            continue  # these name options of benchmarks
        text = page.read_text(encoding="utf-8")
        unknown = set(re.findall(r"(?<![\w<!-])--[a-z][a-z0-9-]+", re.sub(r"<!--.*?-->", "", text))) - known
        assert not unknown, (page.name, unknown)


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    code = "\n".join(strings())
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) > 20
    missing = [message for message in messages if not all(part.strip() in code for part in message.split(".."))]
    assert not missing


def strings() -> Iterator[str]:
    """The text of all strings in the source, those of f-strings between their values."""
    for path in (ROOT / "src" / "octavo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_readme_fits_on_a_screen_and_names_the_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    first = blocks(ROOT / "README.md")
    assert [len(commands(first[0])), len(first[1].code.splitlines())] == [4, 9]
    assert first[1].language == "python"


def test_the_readme_names_every_family_of_the_page_of_families() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Models")[2].partition("\n## ")[0]
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    names = {
        "gpt2": "GPT-2", "gptj": "GPT-J", "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral",
        "ministral3": "Ministral 3", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM2 and 3",
        "granite": "Granite 3",
        "olmo2": "OLMo 2", "gemma2": "Gemma 2", "gemma3_text": "Gemma 2 and 3", "olmo3": "OLMo 2 and 3",
        "phi3": "Phi-3 and 4", "gpt_neox": "GPT-NeoX", "gpt_neo": "GPT-Neo", "gemma3": "Gemma 2 and 3",
        "mistral3": "Mistral",
    }  # fmt: skip
    families = re.findall(r"^\| (\w+) \| [A-Z]\w+ \|", page, re.MULTILINE)
    assert set(families) == set(names)
    assert not [family for family in families if names[family] not in text]
