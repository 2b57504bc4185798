"""Writes docs/cli.md from the options of all commands: `python tools/cli_reference.py`.

`tests/docs/test_reference.py` compares the page with the options.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
HEAD = """# The command line

`octavo COMMAND --help` prints the same, the most used options first. Every option is also a key of a YAML file
(`--config`) and a keyword in Python: `--seq-len` is `seq_len`. A switch has a negative form: `--no-kernels`. Bold
options are those that `--help` shows first. Written by `python tools/cli_reference.py`.
"""


def reference() -> str:
    """The page."""
    from octavo.cli import app

    sections = [line for name, command in commands(typer.main.get_command(app)) for line in _section(name, command)]
    return "\n".join([HEAD, *sections])


def commands(group: Any, name: str = "octavo") -> Iterator[tuple[str, Any]]:
    """(name, command) of all commands, those with subcommands included."""
    for child_name, child in group.commands.items():
        full = f"{name} {child_name}"
        yield full, child
        if hasattr(child, "commands"):
            yield from commands(child, full)


def _section(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}\n"
    yield f"{_text(command.help)}\n"
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    if arguments:
        names = ", ".join(f"`{one.metavar or one.name.upper()}`" for one in arguments)
        yield f"The argument {names} is the option of that name.\n"
    yield "| option | effect | group |"
    yield "|---|---|---|"
    for option in options:
        if option.name == "help":
            continue
        panel = getattr(option, "rich_help_panel", None)
        flag = f"`{option.opts[0]}`"
        yield f"| {flag if panel else f'**{flag}**'} | {_text(option.help)} | {panel or ''} |"
    yield ""


def _text(help_text: str | None) -> str:
    """A help text in Markdown: without rich's escapes, lines and bars of tables."""
    text = " ".join((help_text or "").split()).replace("\\[", "[")
    text = text.replace(f"{PAGE.parents[1] / 'src'}{os.sep}", "")  # the plays of the demo, in the package
    text = re.sub(r"\[([\w-]+(?:\|[\w-]+)+)\]", lambda match: f"({match[1].replace('|', ', ')})", text)
    text = re.sub(r"\[default: (.*?)\]$", r"Default: `\1`.", text)
    text = re.sub(r"(?<![`\w-])(--[a-z][a-z-]+)", r"`\1`", text)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parents[1] / "src"))
    PAGE.write_text(reference(), encoding="utf-8")
