"""The budget of one rendering of a chat template: steps, characters and seconds.

A template comes with a model, so it is untrusted input. Loops, macros and calls count steps. Everything that makes a
string counts its characters. An operation whose result can be much larger than its inputs is estimated before it runs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import TemplateRuntimeError

MAX_SOURCE_CHARACTERS = 2**20  # the longest template known, which includes rules for tool calls, has 30,000
MAX_STEPS = 1_000_000
MAX_CHARACTERS = 2**24
MAX_SECONDS = 10.0
MAX_INTEGER_ARGUMENT = 2**20
MAX_INTEGER_BITS = 2**12
_NODE = 16  # minimum number of characters that a value counts: writing a short value takes as long

_FIELD_WIDTH = re.compile(r"[%{][^%{}a-zA-Z]{0,100}?(\d{1,30})")
# Filters whose integer arguments are values, not sizes.
_VALUES = frozenset({"d", "default", "map", "select", "reject", "selectattr", "rejectattr", "int", "float", "round"})


class LimitError(TemplateRuntimeError):
    """A rendering exceeded its budget."""


def size_of(value: Any, *, most: int) -> int:
    """The approximate number of characters of a value as text; LimitError above `most`.

    An object that a container holds n times counts n times, since it is written n times: nested lists of one list
    grow exponentially.
    """
    total, pending = 0, [value]
    while pending:
        value = pending.pop()
        total += _NODE
        if isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, int):
            total += value.bit_length() // 3
        elif isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        if total > most:
            raise LimitError("it makes too much text")
    return total


class Budget:
    """The remaining budget of one rendering of `n_messages` messages with `n_characters` in total."""

    def __init__(self, n_messages: int = 0, n_characters: int = 0) -> None:
        self.steps = MAX_STEPS + 1000 * n_messages
        # Some templates concatenate all previous turns in each step of a loop.
        self.characters = MAX_CHARACTERS + (64 + 4 * n_messages) * n_characters
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, n_characters: int = 0) -> str:
        """Counts one pass through a loop, or one call, that writes `n_characters` of fixed text."""
        self.steps -= 1
        if self.steps < 0:
            raise LimitError("it takes too many steps")
        self.charge(n_characters)
        return ""

    def charge(self, n_characters: int) -> None:
        """Counts characters before they are made."""
        self.characters -= n_characters
        if self.characters < 0:
            raise LimitError("it makes too much text")
        if time.monotonic() > self.deadline:
            raise LimitError(f"it takes more than {MAX_SECONDS:g} seconds")

    def size(self, value: Any) -> int:
        """`size_of` the value; LimitError if it exceeds the remaining budget."""
        return size_of(value, most=self.characters)

    def made(self, value: Any) -> Any:
        """Counts the result of a filter or a call, and returns it."""
        if isinstance(value, str | bytes):
            self.charge(len(value))
        elif isinstance(value, list | tuple | dict | set):
            self.charge(len(value))
            self.size(value)
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise LimitError("it makes too large a number")
        return value

    def check_call(self, name: str, value: Any, arguments: Iterable[Any]) -> None:
        """LimitError if the result of the method or filter `name` on `value` would be too large. Called before it."""
        arguments = list(arguments)
        if name not in _VALUES:
            for argument in arguments:
                if isinstance(argument, int) and abs(argument) > MAX_INTEGER_ARGUMENT:
                    raise LimitError(f"it calls {name} with {argument.bit_length()} bits of size")
        grows = _GROWTH.get(name)
        if grows is not None and isinstance(value, str | bytes | list | tuple):
            estimate = grows(self, value, arguments)
            if estimate > self.characters:
                raise LimitError("it makes too much text")

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """LimitError if the result of a binary operator would be too large. Called before it."""
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}.get(operator, 0)
            if bits > MAX_INTEGER_BITS:
                raise LimitError("it makes too large a number")
        elif operator == "%" and isinstance(left, str | bytes):
            self.charge(_formatted(self, left, [right]))
        elif operator == "*":
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(times, int) and isinstance(sequence, str | bytes | list | tuple):
                self.charge(len(sequence) * max(0, times))
        elif operator == "+":
            self.charge(sum(len(side) for side in (left, right) if isinstance(side, str | bytes | list | tuple)))


def _integer(arguments: list[Any], default: int = 0) -> int:
    return max((abs(argument) for argument in arguments if isinstance(argument, int)), default=default)


def _length(arguments: list[Any]) -> int:
    return sum(len(argument) for argument in arguments if isinstance(argument, str | bytes))


def _replaced(budget: Budget, text: str | bytes, arguments: list[Any]) -> int:
    old, new = [*arguments, "", ""][:2]
    if type(old) is not type(text) or not isinstance(new, str | bytes):
        return len(text) * (1 + budget.size(new))
    count: int = text.count(old)  # type: ignore[arg-type]
    return len(text) + (count if old else len(text) + 1) * len(new)


def _joined(budget: Budget, value: Any, arguments: list[Any]) -> int:
    """`', '.join(values)` or `values|join(', ')`: the separator is the string."""
    separator, values = (value, arguments[:1]) if isinstance(value, str | bytes) and arguments else (arguments, value)
    count = sum(len(item) for item in values if hasattr(item, "__len__")) if values is not value else len(value)
    width = len(separator) if isinstance(separator, str | bytes) else _length(list(separator))
    return budget.size(list(values)) + count * width


def _formatted(budget: Budget, text: Any, arguments: list[Any]) -> int:
    shape = text.decode("latin-1") if isinstance(text, bytes) else str(text)
    widths = [int(width) for width in _FIELD_WIDTH.findall(shape)]
    if "*" in shape or "{" in shape:
        widths += [_integer([*arguments, *(x for x in arguments if isinstance(x, tuple) for x in x)])]
    fields = shape.count("%") + shape.count("{")
    width: int = max(widths, default=0)
    return len(shape) + fields * (budget.size(arguments) + width)


def _indented(budget: Budget, text: str, arguments: list[Any]) -> int:
    width = max(_integer(arguments, 4), _length(arguments))
    return len(text) + (text.count("\n") + text.count("\r") + 1) * width


def _translated(budget: Budget, text: str, arguments: list[Any]) -> int:
    return len(text) * (1 + budget.size(arguments))


# An upper bound of the length of a method's or filter's result.
_GROWTH: dict[str, Callable[[Budget, Any, list[Any]], int]] = {
    "replace": _replaced,
    "join": _joined,
    "format": _formatted,
    "format_map": _formatted,
    "indent": _indented,
    "translate": _translated,
    "expandtabs": lambda _, text, arguments: len(text) * (1 + _integer(arguments, 8)),
}
