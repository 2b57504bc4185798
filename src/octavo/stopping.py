"""Signals that stop a process: Ctrl-C in every command, also SIGTERM and SIGHUP during training."""

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
    """Yields the list of Ctrl-C signals received so far. Each also raises KeyboardInterrupt.

    The list is needed because a library may swallow the exception. Signals that another handler receives are not in it.
    """
    received: list[int] = []

    def on_interrupt(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    with handled(on_interrupt, (signal.SIGINT,)):
        yield received


@contextmanager
def handled(handler: Handler, numbers: tuple[int, ...]) -> Iterator[None]:
    """Installs `handler` for some signals, except ignored ones. No effect outside the main thread.

    Background jobs of a shell start with SIGINT ignored, and jobs under nohup with SIGHUP ignored: both stay ignored.
    """
    previous_handlers: dict[int, Any] = {}
    try:
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous_handlers[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread, which alone can set handlers
        previous_handlers.clear()
    try:
        yield
    finally:
        for number, previous in previous_handlers.items():
            signal.signal(number, previous)


class StopRequest(KeyboardInterrupt):
    """Raised by a stop signal. `number` is the signal number; the optional text is a message for the user."""

    def __init__(self, number: int, *message: str) -> None:
        super().__init__(*message)
        self.number = number


class StopSignals:
    """Handles Ctrl-C, SIGTERM and SIGHUP of a run. Each raises StopRequest; within `waits` the first one does not."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.received.append(number)
        if not self._waits or len(self.received) > 1:
            raise StopRequest(number)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Context in which the caller checks `received` between steps and saves its state before it stops."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def check(self) -> None:
        """Raises StopRequest if a signal was received whose exception a library swallowed."""
        if self.received:
            raise StopRequest(self.received[0])


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Yields a StopSignals that handles the stop signals. A closed terminal sends SIGHUP, which Windows lacks."""
    signals = StopSignals()
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
    with handled(signals, (signal.SIGINT, signal.SIGTERM, *hangup)):
        yield signals
