"""Absolute paths in texts of a report: only their last name is shown, since reports are shared."""

from __future__ import annotations

import re

# A path that begins where a word could: of POSIX, of a Windows drive, of a Windows share, or of the home folder.
_PATH = re.compile(
    r"(?<![\w.~/\\:])(?:~[\w.-]*(?=[/\\])|[A-Za-z]:(?=[/\\])|(?=[/\\]))(?:[/\\]+[^\s/\\:'\"`,;|<>()]+){2,}"
)


def last_name(path: str) -> str:
    """A path as it was given; of one that is absolute, from the home folder, or leaves the folder, `../` and its last
    name. Unlike `without_folders` it is right for names with spaces and quotes too."""
    parts = re.split(r"[/\\]+", path.rstrip("/\\"))
    if re.match(r"(\w+:)?([/\\~]|[A-Za-z]:[/\\]|\.\.[/\\])", path) and len(parts) > 1:
        return f"../{parts[-1]}"
    return path


def without_folders(text: str) -> str:
    """`text` with `../name` in place of every absolute path of at least two parts."""
    return _PATH.sub(lambda match: "../" + re.split(r"[/\\]+", match[0])[-1], text)
