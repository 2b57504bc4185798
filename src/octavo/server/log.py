"""The server's log on stderr, which never blocks a request.

A write blocks if stderr is a pipe that is not read or a stopped terminal. So a separate thread writes, and lines that
do not fit in its queue are dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from logging.handlers import QueueHandler
from typing import TextIO

LOGGERS = ("uvicorn", "octavo.server")
MAX_LINES = 10_000  # in the queue
CLOSE_SECONDS = 1.0  # to write the remaining lines when the log is closed


class Log(QueueHandler):
    """A non-blocking handler. Lines go through a queue of `max_lines` to a thread that writes them to `stream`."""

    def __init__(self, stream: TextIO, max_lines: int = MAX_LINES) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        super().__init__(self._lines)
        self._stream, self._lost = stream, 0
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._thread = threading.Thread(target=self._write, name="octavo-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1
        except Exception:  # the record's arguments do not match its format
            self.handleError(record)

    def close(self) -> None:
        """Waits until the remaining lines are written, for CLOSE_SECONDS at most."""
        try:
            self._lines.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        except queue.Full:
            pass
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # Lines are dropped only while the queue is full. Once it is empty, the notice is in the right position.
            lost, self._lost = (self._lost, 0) if self._lines.empty() else (0, self._lost)
            notice = f"{lost:,} log lines were dropped: stderr was not read.\n" if lost else ""
            try:
                self._stream.write(f"{line}\n{notice}")
                self._stream.flush()
            except (OSError, ValueError):  # stderr is closed
                continue


def log_to_stderr(level: str) -> Log:
    """Sets up logging to stderr. The caller closes the handler returned.

    uvicorn's default configuration writes requests to stdout, which is reserved for --json.
    """
    handler = Log(sys.stderr)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    return handler
