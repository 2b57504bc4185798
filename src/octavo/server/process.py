"""The server's process: the socket, uvicorn, and how both end.

SIGTERM, SIGHUP and Ctrl-C finish the answers at work within the grace time. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from octavo.config import ServeOptions
from octavo.errors import UsageError
from octavo.server.log import log_to_stderr
from octavo.server.protocol import Connection
from octavo.stopping import INTERRUPTED, handled

HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none
# What uvicorn still waits for answers after the engine has ended them all: they have only to be sent.
SENDING_SECONDS = 5
# A server that ended a moment ago is no obstacle. On Windows that is so by itself, and SO_REUSEADDR would let two
# processes have one address.
_SHARING: int = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. UsageError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends at once (TCP_NODELAY) only on sockets whose protocol is named: else each piece of a stream may wait
    # 40 ms for the client's acknowledgement of the piece before.
    held = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        held.setsockopt(socket.SOL_SOCKET, _SHARING, 1)
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise UsageError(
            f"The address {host}:{port} cannot be listened on ({error.strerror or error}).",
            hint="Choose another one with --host and --port.",
        ) from error
    return held


def run(
    app: FastAPI,
    held: socket.socket,
    *,
    options: ServeOptions,
    listening: Callable[[], None],
    stop_engine: Callable[[float], None],
) -> bool:
    """Serves `app` until SIGTERM, SIGHUP or Ctrl-C; answers at work are finished within the grace time.

    True if it was Ctrl-C. A second one ends the process with exit code 130, without returning.

    `listening` is called once requests can come, `stop_engine` with the grace time once no more do.
    """
    config = uvicorn.Config(
        app, http=partial(Connection, most=options.max_connections),  # type: ignore[arg-type]  # called like a class
        log_config=None, log_level=options.log_level, access_log=options.log_level in ("info", "debug"),
        ws="none", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(options.grace_seconds) + SENDING_SECONDS,
    )  # fmt: skip
    server = _Server(config, listening, lambda: _drain(app, stop_engine, options.grace_seconds))
    with closing(log_to_stderr(options.log_level)), _signals_end_quietly(), handled(server.handle_exit, HANGUP):
        server.run([held])
    return signal.SIGINT in server.received


class _Server(uvicorn.Server):
    """uvicorn's, which calls `listening`, and has the engine stop while it waits for the last answers.

    `received` are the signals that have asked it to stop.
    """

    def __init__(
        self, config: uvicorn.Config, listening: Callable[[], None], drain: Callable[[], threading.Thread]
    ) -> None:
        super().__init__(config)
        self._listening, self._drain = listening, drain
        self.received: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and signal.SIGINT in self.received:
            _end_now()
        self.received.append(sig)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = self._drain()
        await super().shutdown(sockets)
        while stopping.is_alive():
            await asyncio.sleep(0.02)


def _end_now() -> NoReturn:
    """Ends the process in the midst of whatever its threads do.

    The interpreter's own end would wait for some of them, cancel what answers with a traceback each, and abort where
    the engine's thread is within a matmul: that is C++, which must not be unwound.
    """
    with suppress(OSError):
        # A pipe that nobody empties would hold us up. Windows selects among sockets alone.
        if os.name == "nt" or select.select([], [2], [], 0)[1]:
            os.write(2, b"octavo: Stopped at once.\n")  # not print: the signal may have come amid another one's
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(INTERRUPTED)


def _drain(app: FastAPI, stop_engine: Callable[[float], None], grace_seconds: float) -> threading.Thread:
    app.state.service.draining = True
    thread = threading.Thread(target=stop_engine, args=(grace_seconds,), name="octavo-drain", daemon=True)
    thread.start()
    return thread


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signals that ended it again once it is done: they have had their effect by then."""
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda *_: None) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
