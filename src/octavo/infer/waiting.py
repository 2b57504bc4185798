"""The queue of waiting requests and the counters, which the engine's thread shares with the threads that submit."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable

from octavo.infer.requests import Request, Stream


class WaitingQueue:
    """First in, first out. `changed` guards the queue and the counters, and is notified of every new request."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.counts: Counter[str] = Counter()  # the fields of Stats that only increase
        self._streams: deque[Stream] = deque()

    def __len__(self) -> int:
        return len(self._streams)

    def streams(self) -> list[Stream]:
        """The waiting requests, the oldest first."""
        with self.changed:
            return list(self._streams)

    def put(self, stream: Stream) -> None:
        with self.changed:
            self._streams.append(stream)
            self.count("requests_total")
            self.changed.notify()

    def take(self, accepts: Callable[[Request], bool]) -> Stream | None:
        """Removes and returns the oldest request; None if there is none or `accepts` refuses it.

        A refused request is not passed over: a later one must not delay it.
        """
        with self.changed:
            if not self._streams or not accepts(self._streams[0].request):
                return None
            return self._streams.popleft()

    def take_cancelled(self) -> list[Stream]:
        """Removes and returns the cancelled requests."""
        with self.changed:
            cancelled = [stream for stream in self._streams if stream.cancelled]
            self._streams = deque(stream for stream in self._streams if not stream.cancelled)
        return cancelled

    def count(self, name: str, increment: int = 1) -> None:
        """Adds to the counter of a field of Stats."""
        with self.changed:
            self.counts[name] += increment
