"""Front matter: settings of a static site generator in YAML or TOML before the text of a file."""

from __future__ import annotations

import codecs
import re

MAX_FRONT_MATTER_BYTES = 2**16
_FENCES = {b"---": (b"---", b"..."), b"+++": (b"+++",)}
# Lines of YAML or TOML: settings, items of lists, comments, and continuations, which are indented.
_SETTING = re.compile(rb"""\s*(?:["']?[A-Za-z_][\w .-]*["']?\s*[:=](?:\s|\Z)|\[\[?[\w."-]+\]\]?\s*\Z)""")
_OTHER = re.compile(rb"\s*\Z|\s|\s*#|- |-\Z|[\]})]")


def front_matter(head: bytes) -> int:
    """The number of bytes of the front matter, with its fences, from the first bytes of a file; 0 if it has none.

    A line of three hyphens is also a horizontal line of Markdown. So every line up to the next fence must be a setting
    or belong to one.
    """
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    lines = head[start:].splitlines(keepends=True)
    ends = _FENCES.get(lines[0].rstrip()) if lines else None
    if ends is None:
        return 0
    n_bytes, n_settings = start + len(lines[0]), 0
    for line in lines[1:]:
        n_bytes += len(line)
        bare = line.rstrip()
        if bare in ends:
            return n_bytes if n_settings else 0
        if _SETTING.match(bare):
            n_settings += 1
        elif (not n_settings and bare and not bare.startswith(b"#")) or not _OTHER.match(bare):
            return 0
    return 0
