"""Standard streams that may be closed, full or gone: what is said to people never ends the work.

Standard error carries progress: a terminal that was closed (EIO), a reader that left (EPIPE) or a log on a full disk
(ENOSPC) lose what is said and nothing else. Standard output carries results: there a failure is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


class Forgiving:
    """A text stream whose writes never fail; all else is the stream's own. `stream` gives it at each use, or None."""

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes `text` if that is possible; its length either way."""
        if (stream := self._stream()) is not None:
            with suppress(OSError, ValueError):  # ValueError: the stream was closed
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what is buffered if that is possible."""
        if (stream := self._stream()) is not None:
            with suppress(OSError, ValueError):
                stream.flush()

    def isatty(self) -> bool:
        """Whether a terminal reads."""
        if (stream := self._stream()) is not None:
            with suppress(OSError, ValueError):
                return stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


def standard_error() -> TextIO:
    """What sys.stderr is at the time of each write."""
    # While a bar of rich's is shown, sys.stderr stands for its console, which would come back here.
    return cast(TextIO, Forgiving(lambda: getattr(sys.stderr, "rich_proxied_file", sys.stderr)))


def in_notebook(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a notebook's kernel started this process: its terminal keeps every state of a bar as a line."""
    return any(environ.get(name) for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"))


@contextmanager
def standard_streams() -> Iterator[None]:
    """All three streams can be used, and sys.stderr is `Forgiving`, until the end of the context.

    A descriptor that is closed is taken up by /dev/null: else the next file that is opened, the weights of a checkpoint
    perhaps, would get its number, and what libraries print would be written into it.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, flags)  # gets the lowest free number, this one; results written to 1 still fail
    before = sys.stdin, sys.stdout, sys.stderr
    # Python gives no stream for a descriptor that was closed at its start.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = cast(TextIO, Forgiving(lambda: before[2]))
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


@contextmanager
def output() -> Iterator[None]:
    """Results are written to standard output within this, and handed on at its end. OSError says that it was there."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
            _discard_output()
        raise


def _discard_output() -> None:
    """Sends what is still buffered to /dev/null: Python would try once more at its end, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
