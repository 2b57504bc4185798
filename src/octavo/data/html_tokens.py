"""HTML as a stream of texts and tags.

The time is linear in the length of any page. The parser of the standard library is quadratic: it scans the rest of the
page again for each tag that is never closed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

RAW = {"script", "style", "title", "textarea", "iframe"}  # their content is not parsed as markup
Token = tuple[str, str, str]  # ("text", characters, "") or ("start" | "end" | "empty", tag name, attributes as written)

_NAME = re.compile(r"[a-zA-Z][^\s/>]*")
_STOP = re.compile(r"""=\s*["']|>""")


def tokens(html: str) -> Iterator[Token]:
    """The texts and tags of a page, in its order.

    Linear time: every search continues from the end of the last one, and a search that found nothing is not repeated.
    `quotes` and `comments` are False once the rest of the page has no end of a quoted tag or of a comment.
    """
    at, quotes, comments = 0, True, True
    closings: dict[str, int] = {}
    while (begin := html.find("<", at)) >= 0:
        if at < begin:
            yield "text", html[at:begin], ""
        at = begin
        if comments and html.startswith("<!--", at):
            short = next((mark for mark in ("<!-->", "<!--->") if html.startswith(mark, at)), "")
            end = html.find("-->", at + 4) if not short else at
            comments = end >= 0
            at = at + len(short) if short else end + 3 if comments else at + 4
            continue
        is_end = html.startswith("</", at)
        name = _NAME.match(html, at + 1 + is_end)
        if name is None and html[at + 1 : at + 2] not in ("!", "?", "/"):
            yield "text", "<", ""
            at += 1
            continue
        end = _tag_end(html, name.end()) if name and quotes and not is_end else -1
        if end < 0:
            quotes = quotes and (name is None or is_end)
            end = html.find(">", at) + 1
        if not end:
            break  # no further tag is closed
        tag, at, begin = (name[0].lower() if name else ""), end, at
        if not tag or name is None:
            continue
        attributes = html[name.end() : end - 1]
        if is_end or html[end - 2] == "/":
            yield "end" if is_end else "empty", tag, attributes
            continue
        if tag in RAW:
            if 0 <= closings.get(tag, 0) < end:
                closings[tag] = _closing(html, tag, end)
            if closings[tag] < 0 and tag in ("script", "style"):
                return  # the rest is script or style
            at = max(end, closings[tag])
        yield "start", tag, attributes
    if at < len(html):
        yield "text", html[at:], ""


def _tag_end(html: str, at: int) -> int:
    """The index after the `>` that ends a tag; a `>` in a quoted value does not. -1 for none."""
    while stop := _STOP.search(html, at):
        if stop[0] == ">":
            return stop.end()
        closing = html.find(stop[0][-1], stop.end())
        at = closing + 1 if closing >= 0 else stop.end()
    return -1


def _closing(html: str, tag: str, at: int) -> int:
    """The index of the next end tag of this name; -1 for none."""
    match = re.compile(rf"</{tag}(?=[\s/>])", re.IGNORECASE).search(html, at)
    return match.start() if match else -1
