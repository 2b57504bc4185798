"""Turns errors of the tokenizers library into ModelErrors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from octavo.bounded_json import shortened
from octavo.errors import ModelError


@contextmanager
def name_panics(what: str) -> Iterator[None]:
    """Turns a panic of the tokenizers library into a ModelError about `what`, and likewise a bare Exception of it.

    A panic is a BaseException, so `except Exception` does not catch it.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not panic and type(error) is not Exception:
            raise
        hint = "A regular expression in its tokenizer.json may have no end. " if panic else ""
        raise ModelError(
            f"{what} fails on a text ({shortened(str(error))}).",
            hint=hint + "Take the tokenizer files of the model's publisher.",
        ) from error
