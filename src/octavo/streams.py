"""Standard streams that may be closed or full: a failed write of a message never ends a run.

Standard error carries messages and progress. If its terminal was closed (EIO), its reader has exited (EPIPE) or its
disk is full (ENOSPC), only the messages are lost. Standard output carries results: there a failed write is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, TextIO, cast


class Forgiving:
    """A text stream whose writes never fail. `stream` returns the wrapped stream, or None, at each use."""

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes `text` if possible; returns its length in any case."""
        if (stream := self._stream()) is not None:
            with suppress(OSError, ValueError):  # ValueError: the stream was closed
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream if possible."""
        if (stream := self._stream()) is not None:
            with suppress(OSError, ValueError):
                stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        if (stream := self._stream()) is not None:
            with suppress(OSError, ValueError):
                return stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


def standard_error() -> TextIO:
    """A stream that writes to the current sys.stderr."""
    # While a rich progress bar is shown, sys.stderr is a proxy of rich's console, which would write here again.
    return cast(TextIO, Forgiving(lambda: getattr(sys.stderr, "rich_proxied_file", sys.stderr)))


def in_notebook(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a notebook kernel started this process. Its output keeps every state of a progress bar as a line."""
    return any(environ.get(name) for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"))


@contextmanager
def standard_streams() -> Iterator[None]:
    """Makes all three standard streams usable and sys.stderr `Forgiving` within the context.

    A closed descriptor is opened on /dev/null. Otherwise the next opened file, for example a checkpoint, would get its
    number, and the output of libraries would be written into it.
    """
    for descriptor, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, flags)  # gets the lowest free number, which is this one; writes to 1 still fail
    originals = sys.stdin, sys.stdout, sys.stderr
    messages = _unbuffered(sys.stderr)
    # Python sets a stream to None if its descriptor was closed at startup.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = cast(TextIO, Forgiving(lambda: messages))
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = originals


def _unbuffered(stream: TextIO | None) -> TextIO | None:
    """Python's standard error without its buffer; any other stream as it is.

    A buffer keeps what could not be written. At exit Python would flush it again: in vain, which replaces the exit code
    by 120, or for ever, if a thread is still writing into a pipe that nobody reads.
    """
    standard: Any = sys.__stderr__
    # With PYTHONUNBUFFERED there is no buffer.
    if stream is None or stream is not standard or not isinstance(standard.buffer, BufferedWriter):
        return stream
    with suppress(OSError, ValueError):
        stream.flush()
        raw = FileIO(stream.fileno(), "w", closefd=False)
        return TextIOWrapper(
            cast(Any, raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=True
        )
    return stream


@contextmanager
def output() -> Iterator[None]:
    """Context for writing results to standard output; flushes at its end. An OSError names standard output."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is None:
            error.filename = "standard output"
            _discard_output()
        raise


def _discard_output() -> None:
    """Redirects stdout to /dev/null, so that Python does not flush the buffer again at exit and report an error."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
