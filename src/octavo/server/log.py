"""The server's log, on stderr. Who does not read it holds up no answer.

A pipe that nobody empties, or a terminal that is stopped, blocks whoever writes to it. So a thread of its own writes,
and what it cannot write in time is counted instead of kept.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
from logging.handlers import QueueHandler
from typing import TextIO

LOGGERS = ("uvicorn", "octavo.server")
MOST_LINES = 10_000  # that wait to be written
LAST_SECONDS = 1.0  # what is left gets these at the end


class Log(QueueHandler):
    """A handler that never waits: lines go through a queue of `MOST_LINES` to a thread that writes them to `stream`."""

    def __init__(self, stream: TextIO, most: int = MOST_LINES) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(most)
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
        except Exception:  # a record whose words do not fit its format: logging's own way to say so
            self.handleError(record)

    def close(self) -> None:
        """Waits for what is left to be written, for LAST_SECONDS at most."""
        try:
            self._lines.put(None, timeout=LAST_SECONDS)
            self._thread.join(LAST_SECONDS)
        except queue.Full:
            pass
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # All that were lost stood behind those that are in the queue now, and before what comes.
            lost, self._lost = (self._lost, 0) if self._lines.empty() else (0, self._lost)
            told = f"{lost:,} lines of the log are lost: stderr was not read.\n" if lost else ""
            try:
                self._stream.write(f"{line}\n{told}")
                self._stream.flush()
            except (OSError, ValueError):  # nobody is there any more
                continue


def log_to_stderr(level: str) -> Log:
    """uvicorn's own setting would write requests to stdout, which is --json's. The caller closes what it gets."""
    handler = Log(sys.stderr)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    return handler
