"""Matrices of cases: `make test-gpu` runs a selection that covers all code paths, `make test-gpu-all` all cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def matrix(**axes: Iterable[Any]) -> Callable[[Callable[..., bool]], pytest.MarkDecorator]:
    """Parametrizes a test with all combinations of the values; those for which `quick` is false are marked exhaustive.

    Every new combination of dtypes, shapes and schemes compiles kernels, which takes most of the tests' time.
    """

    def parametrized(quick: Callable[..., bool]) -> pytest.MarkDecorator:
        cases = []
        for values in product(*axes.values()):
            marks = [] if quick(*values) else [pytest.mark.exhaustive]
            cases.append(pytest.param(*values, marks=marks, id="-".join(map(named, values))))
        return pytest.mark.parametrize(tuple(axes), cases)

    return parametrized


def named(value: Any) -> str:
    """The part of a test's id for a value."""
    return (
        "packed" if value is True else "one document per row" if value is False else str(value).removeprefix("torch.")
    )
