"""Regular expressions of untrusted files, matched with module names in bounded time.

Python's `re` backtracks: a pattern of a downloaded adapter could run for hours. Here a set of positions in the name
goes through the pattern, so that no text is tried twice. The set is an integer: bit i is the position before character
i. A character of the pattern shifts the set, `|` is a union, and a repetition runs until the set no longer grows.

Supported are characters, ., classes, groups, |, greedy and lazy repetitions, ^, $, \\b and lookahead. Whether a whole
name matches does not depend on greed. Back references, lookbehind and flags are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.bounded_json import JsonError, shown

MAX_LENGTH = 4000  # of a pattern; unsloth writes one of 500
MAX_DEPTH = 30  # of groups within groups
MAX_REPEATS = 1000
MAX_STEPS = 20_000  # a name, some milliseconds; unsloth's pattern takes 700
SPECIAL = frozenset("*+?{}()[]|^$.\\")
_GROUP = re.compile(r"\?:|\?P<\w+>|(?P<ahead>\?[=!])|(?!\?)")
_REPEAT = re.compile(r"(?:(?P<sign>[*+?])|\{(?P<least>\d{0,4})(?P<comma>,(?P<most>\d{0,4}))?\})\??(?![*+?])")
_CLASS = re.compile(r"\[\^?\]?(?:(?!--|&&|~~|\|\|)[^\]\\\[]|\\.)*\]")  # no set operations, which Python reserves


@dataclass
class _Name:
    """A name that is matched: for each condition on a character, the positions before characters that meet it."""

    text: str
    steps: int = 0
    masks: dict[str, int] = field(default_factory=dict)

    def where(self, condition: str) -> int:
        """The positions before characters that match a class or an escape such as \\d."""
        if condition not in self.masks:
            one = re.compile(condition)
            self.masks[condition] = sum(1 << i for i, char in enumerate(self.text) if one.fullmatch(char))
        return self.masks[condition]

    @property
    def boundaries(self) -> int:
        """The positions between a character of a word and another one."""
        words = self.where(r"\w")
        return words ^ words << 1

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise JsonError("a regular expression takes too long; octavo takes names")


Node = Callable[[_Name, int], int]  # (name, positions where it starts) -> positions where it ends


class NamePattern:
    """A pattern that matches whole names, as re.fullmatch does. JsonError for one that is not supported."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._node = _Parser(pattern).parse()

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name matches. JsonError if the pattern takes too long."""
        return bool(self._node(_Name(name), 1) >> len(name) & 1)


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0
        if len(pattern) > MAX_LENGTH:
            raise self._unsupported()

    def parse(self) -> Node:
        node = self._alternatives()
        if self.at < len(self.pattern):
            raise self._unsupported()
        return node

    def _alternatives(self) -> Node:
        branches = [self._sequence()]
        while self._next("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _union(branches)

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            nodes.append(self._repeated(self._atom()))
        return _sequence(nodes)

    def _repeated(self, node: Node) -> Node:
        match = _REPEAT.match(self.pattern, self.at)
        if match is None:
            if self.pattern[self.at : self.at + 1] in ("*", "+", "?", "{"):
                raise self._unsupported()
            return node
        self.at = match.end()
        if match["sign"]:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[match["sign"]]
        else:
            least = int(match["least"] or 0)
            most = least if not match["comma"] else int(match["most"]) if match["most"] else None
            if not (match["least"] or match["most"]) or max(least, most or 0) > MAX_REPEATS:
                raise self._unsupported()
        return _repeat(node, least, most)

    def _atom(self) -> Node:
        char = self.pattern[self.at]
        if char == "(":
            return self._group()
        if char == "[":
            match = _CLASS.match(self.pattern, self.at)
            if match is None:
                raise self._unsupported()
            self.at = match.end()
            return self._character(match[0])
        if char == "\\":
            return self._escape()
        if char in SPECIAL - set(".^$"):
            raise self._unsupported()
        self.at += 1
        if char == "^":
            return _start
        return _end if char == "$" else self._character("." if char == "." else re.escape(char))

    def _escape(self) -> Node:
        escaped = self.pattern[self.at : self.at + 2]
        self.at += 2
        if escaped == r"\b":
            return _boundary
        if escaped in (r"\A", r"\Z"):
            return _start if escaped == r"\A" else _end
        if len(escaped) < 2 or (escaped[1].isalnum() and escaped[1] not in "dDwWsS"):
            raise self._unsupported()
        return self._character(escaped)

    def _group(self) -> Node:
        start = _GROUP.match(self.pattern, self.at + 1)
        self.depth += 1
        if start is None or self.depth > MAX_DEPTH:
            raise self._unsupported()
        self.at = start.end()
        node = self._alternatives()
        self.depth -= 1
        if not self._next(")"):
            raise self._unsupported()
        return _lookahead(node, wanted=start["ahead"] == "?=") if start["ahead"] else node

    def _character(self, condition: str) -> Node:
        try:
            re.compile(condition)
        except re.error as error:
            raise self._unsupported() from error
        return _character(condition)

    def _next(self, char: str) -> bool:
        found = self.pattern.startswith(char, self.at)
        self.at += found
        return found

    def _unsupported(self) -> JsonError:
        return JsonError(f"it has {shown(self.pattern)}, a regular expression that octavo does not read")


def _character(condition: str) -> Node:
    def ends(name: _Name, starts: int) -> int:
        return (starts & name.where(condition)) << 1

    return ends


def _sequence(nodes: list[Node]) -> Node:
    def ends(name: _Name, starts: int) -> int:
        name.step()
        for node in nodes:
            name.step()
            starts = node(name, starts)
        return starts

    return ends


def _union(branches: list[Node]) -> Node:
    def ends(name: _Name, starts: int) -> int:
        result = 0
        for branch in branches:
            result |= branch(name, starts)
        return result

    return ends


def _repeat(node: Node, least: int, most: int | None) -> Node:
    def ends(name: _Name, starts: int) -> int:
        for _ in range(least):
            name.step()
            starts = node(name, starts)
        result, count = starts, least
        while starts and (most is None or count < most):
            name.step()
            starts = node(name, starts) & ~result  # positions that were reached before lead nowhere new
            result |= starts
            count += 1
        return result

    return ends


def _lookahead(node: Node, *, wanted: bool) -> Node:
    def ends(name: _Name, starts: int) -> int:
        return sum(1 << i for i in range(len(name.text) + 1) if starts >> i & 1 and bool(node(name, 1 << i)) is wanted)

    return ends


def _start(name: _Name, starts: int) -> int:
    return starts & 1


def _end(name: _Name, starts: int) -> int:
    return starts & 1 << len(name.text)


def _boundary(name: _Name, starts: int) -> int:
    return starts & name.boundaries
