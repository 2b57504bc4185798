"""The server's log: in order, complete where it is read, and never in the way where it is not."""

from __future__ import annotations

import io
import logging
import threading

import pytest

from octavo.server.log import Log

PATIENCE = 60


class Unread(io.StringIO):
    """A stream like a full pipe: a write returns once somebody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.is_read, self.is_written_to = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.is_written_to.set()
        assert self.is_read.wait(PATIENCE)
        return super().write(text)


def record(number: int) -> logging.LogRecord:
    return logging.LogRecord("octavo.server", logging.INFO, __file__, 1, "line %d", (number,), None)


def messages(stream: io.StringIO) -> list[str]:
    return [line.partition(" INFO ")[2] or line for line in stream.getvalue().splitlines()]


def test_every_line_is_written_in_order_by_the_time_it_is_closed() -> None:
    log = Log(stream := io.StringIO())
    for number in range(500):
        log.emit(record(number))
    log.close()
    assert messages(stream) == [f"line {number}" for number in range(500)]


def test_a_stream_that_is_not_read_holds_nobody_up_and_what_is_lost_is_counted() -> None:
    log = Log(stream := Unread(), most=3)
    log.emit(record(0))
    assert stream.is_written_to.wait(PATIENCE)
    for number in range(1, 9):  # would never return if it waited
        log.emit(record(number))
    stream.is_read.set()
    log.close()
    told = messages(stream)
    assert told == ["line 0", "line 1", "line 2", "line 3", "5 lines of the log are lost: stderr was not read."]


def test_closing_does_not_wait_for_a_reader_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.log.LAST_SECONDS", 0.01)
    log = Log(stream := Unread(), most=1)
    log.emit(record(0))
    assert stream.is_written_to.wait(PATIENCE)
    log.emit(record(1))
    log.close()
    assert stream.getvalue() == ""
    stream.is_read.set()


def test_a_stream_that_is_gone_ends_no_thread() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if "line 0" in text:
                raise BrokenPipeError
            return super().write(text)

    log = Log(stream := Gone())
    for number in range(3):
        log.emit(record(number))
    log.close()
    assert messages(stream) == ["line 1", "line 2"]
