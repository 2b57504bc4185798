"""The server's log: lines are in order, complete if stderr is read, and never block."""

from __future__ import annotations

import io
import logging
import threading

import pytest

from octavo.server.log import Log

PATIENCE = 60


class Unread(io.StringIO):
    """A stream like a full pipe: a write blocks until it is read."""

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


def test_close_writes_all_lines_in_order() -> None:
    log = Log(stream := io.StringIO())
    for number in range(500):
        log.emit(record(number))
    log.close()
    assert messages(stream) == [f"line {number}" for number in range(500)]


def test_an_unread_stream_does_not_block_and_dropped_lines_are_counted() -> None:
    log = Log(stream := Unread(), max_lines=3)
    log.emit(record(0))
    assert stream.is_written_to.wait(PATIENCE)
    for number in range(1, 9):  # would never return if emit blocked
        log.emit(record(number))
    stream.is_read.set()
    log.close()
    lines = messages(stream)
    assert lines == ["line 0", "line 1", "line 2", "line 3", "5 log lines were dropped: stderr was not read."]


def test_close_does_not_wait_for_a_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.log.CLOSE_SECONDS", 0.01)
    log = Log(stream := Unread(), max_lines=1)
    log.emit(record(0))
    assert stream.is_written_to.wait(PATIENCE)
    log.emit(record(1))
    log.close()
    assert stream.getvalue() == ""
    stream.is_read.set()


def test_a_closed_stream_does_not_end_the_thread() -> None:
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
