"""An ASGI client that a test controls (read, stall, disconnect), and an event loop with an adjustable clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 60  # seconds until a wait counts as failed, also on a busy machine


class ManualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test can advance, so that long timeouts expire without waiting."""

    offset = 0.0

    def time(self) -> float:
        return super().time() + self.offset


def advance_clock(seconds: float) -> None:
    """Advances the clock of the running ManualClockLoop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ManualClockLoop)
    loop.offset += seconds


@dataclass
class Client:
    """One request over ASGI. The test controls when the client reads, stalls and disconnects."""

    app: Any
    path: str
    body: Any
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    received: bytes = b""
    complete: bool = False
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    started: bool = False

    def __post_init__(self) -> None:
        self.reading.set()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        scope = {
            "type": "http", "method": "POST", "path": self.path, "raw_path": self.path.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("localhost", 80), "client": ("x", 1),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await self.app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self.started:
            self.started = True
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reading.wait()
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.received += message["body"]
            self.complete = not message.get("more_body", False)


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks and threads run until `condition` is true. TimeoutError after PATIENCE seconds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


def run_scenario(
    scenario: Coroutine[Any, Any, None], loop: Callable[[], asyncio.AbstractEventLoop] = ManualClockLoop
) -> None:
    """Runs a scenario in an event loop made by `loop`."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario)
