"""Signals that ask a process to stop: Ctrl-C in every command, and SIGTERM and SIGHUP too while a model is trained."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list of the Ctrl-C that came meanwhile. Each raises KeyboardInterrupt too, which a library may swallow.

    Who handles Ctrl-C in another way has a handler of its own meanwhile, and then it is not in the list.
    """
    received: list[int] = []

    def on_interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    with handled(on_interrupt, (signal.SIGINT,)):
        yield received


@contextmanager
def handled(handler: Handler, numbers: tuple[int, ...]) -> Iterator[None]:
    """Has `handler` called for some signals; in the main thread only, and not for a signal that is ignored.

    A shell's background job is started with Ctrl-C ignored, and one under nohup with SIGHUP: so it stays.
    """
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: signals are somebody else's business
        before.clear()
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
