"""A thread that sends the points of a run to one tracker. An error is remembered, and the point is tried again."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable

from octavo.failures import cut
from octavo.tracking.points import Point
from octavo.tracking.writers import Tracker

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 300.0  # before a point is tried again; doubled each time
_LOGIN_IN_URL = re.compile(r"//[^/@\s]+@")
_SECRET_NAME = re.compile(r"key|token|secret|password", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; shorter values are no secrets, and would be replaced in ordinary words


def without_secrets(text: str) -> str:
    """`text` without logins in URLs and without the values of environment variables that hold a key or a password."""
    text = _LOGIN_IN_URL.sub("//***@", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return cut(" ".join(text.split()))


class Sender:
    """Sends points in order. `on_change` is called when sending begins to fail, and when it works again."""

    def __init__(self, name: str, tracker: Tracker, *, on_change: Callable[[], None]) -> None:
        self.name, self.problem, self.failed_to_close = name, "", False
        self._tracker, self._on_change = tracker, on_change
        self._queue: deque[Point] = deque()
        self._condition = threading.Condition()
        self._stopping, self._finished, self._warned = False, False, False
        # A daemon: a call that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"octavo-{name}")
        self._thread.start()

    @property
    def where(self) -> str:
        """A folder or address at which the tracker shows the run; "" if there is none."""
        return without_secrets(self._tracker.where)

    @property
    def waiting(self) -> int:
        """The number of points that are not sent."""
        return len(self._queue)

    @property
    def unsent_step(self) -> int | None:
        """The lowest step of a point that is not sent, while sending fails; else None."""
        with self._condition:
            return min((point.step for point in self._queue), default=None) if self.problem else None

    def put(self, point: Point) -> None:
        """Sends `point` after the others. Returns at once."""
        with self._condition:
            self._queue.append(point)
            self._condition.notify()

    def new_problem(self) -> str:
        """The error with which sending failed, once; else ""."""
        if self._warned or not self.problem:
            return ""
        self._warned = True
        return self.problem

    def stop(self, *, finished: bool) -> None:
        """Ends the tracker's run after the last point. While sending fails there is one more attempt."""
        with self._condition:
            self._stopping, self._finished = True, finished
            self._condition.notify()

    def join(self, seconds: float) -> int:
        """Waits for the thread, at most so long. Returns the number of points that are not sent."""
        self._thread.join(seconds)
        if self._thread.is_alive() and not self.problem:
            self.problem = f"no answer for {seconds:.0f} s"
        return len(self._queue)

    def _run(self) -> None:
        wait = FIRST_WAIT_SECONDS
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._stopping)
                point, stopping = (self._queue[0] if self._queue else None), self._stopping
            if point is None:
                break
            if self._attempt(lambda point=point: self._tracker.send(point)):  # type: ignore[misc]
                wait = FIRST_WAIT_SECONDS
                with self._condition:
                    self._queue.popleft()
                self._recovered()
            elif stopping:
                break
            else:
                with self._condition:
                    self._condition.wait_for(lambda: self._stopping, timeout=wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        self.failed_to_close = not self._attempt(lambda: self._tracker.close(finished=self._finished))

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Whether `call` succeeds. Any error is one of the tracker, which must not end training."""
        try:
            call()
            return True
        except Exception as error:
            first = not self.problem
            self.problem = without_secrets(f"{type(error).__name__}: {error}")
            if first:
                self._on_change()
            return False

    def _recovered(self) -> None:
        if self.problem and not self._queue:
            self.problem = ""
            self._on_change()
