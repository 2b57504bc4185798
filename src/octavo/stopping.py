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


class StopRequest(KeyboardInterrupt):
    """A signal that asks to stop, where it is raised. `number` is the signal's; the text, if any, is for people."""

    def __init__(self, number: int, *said: str) -> None:
        super().__init__(*said)
        self.number = number


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP of a run. Each raises StopRequest at once; within `waits` the first one does not."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler of the signals."""
        self.received.append(number)
        if not self._waits or len(self.received) > 1:
            raise StopRequest(number)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Within this somebody looks at `received` between two steps, and puts things into order first."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def check(self) -> None:
        """StopRequest if a signal came, in case that a library swallowed it."""
        if self.received:
            raise StopRequest(self.received[0])


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Has the signals that ask to stop handled by what is yielded. A closed terminal sends SIGHUP; Windows has none."""
    signals = StopSignals()
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    with handled(signals, (signal.SIGINT, signal.SIGTERM, *hangup)):
        yield signals
