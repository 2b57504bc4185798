"""Reads a settings file in YAML with limits on size and depth, and without aliases.

Aliases to aliases expand exponentially ("billion laughs"), so a small file could exhaust memory.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from octavo.bounded_json import shortened
from octavo.errors import UsageError

MAX_BYTES = 2**20
MAX_DEPTH = 16
# That of libyaml, 15 times as fast, where PyYAML was built with it. It rejects file names that are not UTF-8.
_FAST_LOADER: Any = getattr(yaml, "CSafeLoader", None)


def read_settings(path: Path, *, fast: bool = False) -> dict[str, Any]:
    """The `key: value` lines of a file. UsageError that names the file if it is missing, not text, or over a limit.

    `fast`: with libyaml, if it reads the text. For lists of many files that octavo wrote.
    """
    source = f"The configuration {path}"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{source} is not a regular file.")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError(f"{source} is larger than {MAX_BYTES:,} bytes.", hint="Settings are a few lines.")
        text = content.decode("utf-8-sig")
    except UsageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null character
        reason = error.strerror if isinstance(error, OSError) else f"{error}"
        raise UsageError(f"{source} cannot be read: {reason}.", hint="Check the path.") from error
    if fast and _FAST_LOADER is not None:
        try:
            return parse_settings(text, source, loader=_FAST_LOADER)
        except UsageError:
            pass
    return parse_settings(text, source)


def parse_settings(text: str, source: str, *, loader: Any = yaml.SafeLoader) -> dict[str, Any]:
    """The `key: value` lines of a text; error messages start with `source`. UsageError if the text is anything else."""
    try:
        _check_bounds(text, source, loader)
        content = yaml.load(text, Loader=loader)
    # ValueError: a string with the form of a date that is not one, as 2020-13-45.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{source} is not valid YAML: {shortened(str(error), 400)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{source} must contain lines of `key: value`.")
    return content


def _check_bounds(text: str, source: str, loader: Any) -> None:
    """UsageError for depth and aliases, from the parser's events, before any value is constructed."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = event.start_mark.line + 1 if event.start_mark else 0
        if depth > MAX_DEPTH:
            raise UsageError(f"{source}, line {line}: nested more than {MAX_DEPTH} deep.")
        if isinstance(event, yaml.AliasEvent):
            hint = "Replace the alias by its value."
            raise UsageError(
                f"{source}, line {line}: aliases (*{shortened(str(event.anchor))}) are not supported.", hint=hint
            )
