"""The settings of a run as its report needs them."""

from __future__ import annotations

import re

_LINE = re.compile(r"^([a-z_0-9]+):[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


def plain_settings(text: str) -> dict[str, str]:
    """The `key: value` lines of config.yaml whose value is on the same line, as text without quotes.

    No error: a report is also made of a damaged file.
    """
    return {key: value[1:-1] if value[0] == value[-1] in "'\"" else value for key, value in _LINE.findall(text)}
