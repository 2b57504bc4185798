"""Matrices of cases: `make test-gpu` runs those that each check something of their own, `make test-gpu-all` all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def matrix(**axes: Iterable[Any]) -> Callable[[Callable[..., bool]], pytest.MarkDecorator]:
    """All combinations of some arguments' values; those that the function given next refuses are exhaustive ones.

    Each new combination of types, shapes and schemes has kernels compiled, which takes most of the tests' time.
    """

    def parametrized(quick: Callable[..., bool]) -> pytest.MarkDecorator:
        cases = []
        for values in product(*axes.values()):
            marks = [] if quick(*values) else [pytest.mark.exhaustive]
            cases.append(pytest.param(*values, marks=marks, id="-".join(map(named, values))))
        return pytest.mark.parametrize(tuple(axes), cases)

    return parametrized


def named(value: Any) -> str:
    """A value's part of a test's name."""
    return "packed" if value is True else "one a row" if value is False else str(value).removeprefix("torch.")
