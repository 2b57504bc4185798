"""A client over ASGI that reads, stalls and leaves when a test says so, and the loop that tests of it run in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 60  # seconds until what does not come counts as never coming, however busy the machine is


class SkippingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock a scene can put forward: what takes long then takes no time, and what is quick has plenty."""

    skipped = 0.0

    def time(self) -> float:
        return super().time() + self.skipped


def skip(seconds: float) -> None:
    """Puts the clock of the scene's loop forward."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SkippingLoop)
    loop.skipped += seconds


@dataclass
class Client:
    """One request over ASGI, whose client reads, stalls and leaves when the test says so."""

    app: Any
    path: str
    body: Any
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    received: bytes = b""
    whole: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    begun: bool = False

    def __post_init__(self) -> None:
        self.reads.set()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        scope = {
            "type": "http", "method": "POST", "path": self.path, "raw_path": self.path.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "server": ("localhost", 80), "client": ("x", 1),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await self.app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self.begun:
            self.begun = True
            return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.received += message["body"]
            self.whole = not message.get("more_body", False)


async def until(condition: Callable[[], bool]) -> None:
    """Lets the other tasks and threads run until something is so, or they count as stuck."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


def play(scene: Coroutine[Any, Any, None], loop: Callable[[], asyncio.AbstractEventLoop] = SkippingLoop) -> None:
    """Runs a scene, with a loop that is made by `loop`."""
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene)
